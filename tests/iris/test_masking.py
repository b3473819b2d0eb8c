"""Passwords in addresses are masked wherever an address is shown."""

from __future__ import annotations

import pytest

from iris.io.masking import masked, secrets


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://me:secret@host/x", "https://me:***@host/x"),
        ("postgresql+psycopg2://me:se/cr@et@host:5432/x", "postgresql+psycopg2://me:***@host:5432/x"),
        ("http://:secret@host", "http://:***@host"),
        (
            "mssql+pyodbc://host/x?driver=a&password=secret&timeout=3",
            "mssql+pyodbc://host/x?driver=a&password=***&timeout=3",
        ),
        ("https://host/x?access_token=secret#top", "https://host/x?access_token=***"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dsecret", "mssql+pyodbc:///?odbc_connect=***"),
        ("track.uri=http://me:secret@host:5000", "track.uri=http://me:***@host:5000"),
        ("uri: http://host\nname: me@home\n", "uri: http://host\nname: me@home\n"),
        ("sqlite:////home/a:b@c/mlflow.db", "sqlite:////home/a:b@c/mlflow.db"),
        ("http://127.0.0.1:5000/prefix", "http://127.0.0.1:5000/prefix"),
    ],
)
def test_what_is_secret_is_masked_and_nothing_else(address, shown):
    assert masked(address) == shown
    assert all(secret not in shown for secret in secrets(address)) and bool(secrets(address)) == ("***" in shown)
