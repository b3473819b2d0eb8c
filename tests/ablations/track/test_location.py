"""Tracking URIs: what cannot work is refused before anything is computed, and no password is shown."""

from __future__ import annotations

import os

import pytest

from ablations.track.location import SCHEMES, Location
from iris.errors import SettingError


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("ftp://somewhere/x", "scheme 'ftp' is unknown; allowed: sqlite, postgresql"),
        ("htp://me:secret@somewhere", "allowed: sqlite"),
        ("http://", "no host; expected http://host:port"),
        ("http://host:port", "Port could not be cast"),
        ("http://me:sec/ret@host", "its password must be percent-encoded, / as %2F"),
        ("mlruns", "MLflow no longer writes runs to folders; allowed: sqlite:///mlflow.db"),
        ("file:///tmp/x", "no longer writes runs to folders"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("sqlite:////no/such/folder/x.db", "/no/such/folder does not exist"),
        ("sqlite:////tmp", "/tmp is a folder"),
        ("postgresql+nothing://u:secret@h/x", "postgresql.nothing"),
        ("postgresql+psycopg2://u:sec/ret@h:port/x", "invalid literal for int"),
        ("mysql://u:secret@h/x", "package MySQLdb is not installed"),
    ],
)
def test_a_uri_that_cannot_work_is_refused_with_the_setting(uri, said, tmp_path):
    with pytest.raises(SettingError) as caught:
        Location.of(uri, tmp_path).check()
    message = str(caught.value)
    assert message.startswith("track.uri=") and said in message and "sec" not in message.replace("psycopg2", "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(SettingError, match="closed/x.db cannot be written to"):
        Location.of("sqlite:///closed/x.db", tmp_path).check()


def test_what_can_work_is_taken_as_it_is(tmp_path, monkeypatch):
    pytest.importorskip("psycopg2")
    for uri in (
        "http://127.0.0.1:9",
        "https://user:x@h/prefix",
        "databricks",
        "databricks://profile",
        "postgresql+psycopg2://me:with/slash@h/x",
        f"sqlite:///{tmp_path}/new.db",
    ):
        assert Location.of(uri, tmp_path).check().uri == uri
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert Location.of("file:///x", tmp_path).check().uri == "file:///x"


def test_the_setting_comes_before_the_environment_and_both_before_the_default(tmp_path, monkeypatch):
    default = Location.of(None, tmp_path)
    assert (default.uri, default.is_default) == (f"sqlite:///{tmp_path}/mlflow.db", True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://x")
    with pytest.raises(SettingError, match="MLFLOW_TRACKING_URI=gopher://x"):
        Location.of(None, tmp_path).check()
    assert Location.of("sqlite:///mlflow.db", tmp_path).check() == default  # relative: a file of the root


def test_an_error_is_told_without_the_password(tmp_path):
    location = Location.of("postgresql://me:a%2Fb@h/x", tmp_path)
    error = RuntimeError(f"cannot connect to {location.uri} as me with a/b\nand more")
    assert location.explained(error) == "cannot connect to postgresql://me:***@h/x as me with ***"


def test_the_command_that_shows_the_runs(tmp_path, monkeypatch):
    from mlflow.tracking._tracking_service.utils import _get_default_tracking_uri

    monkeypatch.chdir(tmp_path)
    location = Location.of(None, tmp_path)
    assert location.command == "uv run mlflow ui"
    assert _get_default_tracking_uri() == "sqlite:///mlflow.db", "what a plain `mlflow ui` opens here"
    monkeypatch.chdir("/")
    assert location.command == f"uv run mlflow ui --backend-store-uri sqlite:///{tmp_path / 'mlflow.db'}"
    assert Location.of("http://me:secret@host:5000", tmp_path).command == "http://me:***@host:5000"


def test_the_schemes_are_mlflows():
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry

    theirs = {name for name in _tracking_store_registry._registry if name not in ("", "file", "databricks-uc", "uc")}
    assert theirs == set(SCHEMES)


def test_no_command_shows_or_keeps_the_password(monkeypatch, capsys):
    """What a person typed goes into records, reports, journals and tags."""
    from ablations.answer.provenance import command
    from ablations.run import main as run
    from eval.__main__ import main as evaluate

    uri = "postgresql://me:sec/ret@host/x"
    monkeypatch.setattr("sys.argv", ["run", "grid=mixers", f"track.uri={uri}"])
    assert command() == "python -m ablations.run grid=mixers 'track.uri=postgresql://me:***@host/x'"
    assert run(["grid=mixers", f"track.uri={uri}", "--cfg", "job"]) == 0
    assert evaluate(["model=x", f"track={uri}", "--cfg", "job"]) == 0
    said = capsys.readouterr().out
    assert said.count("postgresql://me:***@host/x") == 2 and "sec/ret" not in said
