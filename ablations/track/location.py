"""Where MLflow's runs go: its tracking URI, checked before anything is computed."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from iris.errors import SettingError
from iris.io.masking import masked, secrets

VARIABLE = "MLFLOW_TRACKING_URI"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
SCHEMES = (*DATABASES, "http", "https", "databricks")  # MLflow's own; plugins register others
PLUGINS = "mlflow.tracking_store"  # the entry points they use


@dataclass(frozen=True)
class Location:
    """A tracking URI and what follows from it.

    Attributes:
        uri: absolute: a relative sqlite file is one of ``root``.
        root: folder of the default store, and of artifacts that no server keeps.
        setting: what chose the URI, for messages.
    """

    uri: str
    root: Path
    setting: str

    @classmethod
    def of(cls, given: str | None, root: Path, setting: str = "track.uri") -> Location:
        """The place that a setting, or else the environment, or else nothing names.

        Without a name it is ``sqlite:///<root>/mlflow.db`` with artifacts in ``<root>/mlartifacts``, which a plain
        ``mlflow ui`` started in ``root`` shows. (Artifacts stay out of ``mlruns/``: a folder of that name from an older
        MLflow makes ``mlflow ui`` choose the retired file store.)
        """
        root = Path(root).resolve()
        if given:
            return cls(_absolute(given, root), root, setting)
        if os.environ.get(VARIABLE):
            return cls(_absolute(os.environ[VARIABLE], root), root, VARIABLE)
        return cls(f"sqlite:///{root / 'mlflow.db'}", root, setting)

    @property
    def shown(self) -> str:
        """The URI without its password."""
        return masked(self.uri)

    @property
    def is_default(self) -> bool:
        """Whether it is the store that a plain ``mlflow ui`` in ``root`` opens."""
        return self.uri == f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def scheme(self) -> str:
        """Of the URI, without a driver; empty: it is a folder's path."""
        scheme = self.uri.partition(":")[0].partition("+")[0]
        return scheme if ":" in self.uri or scheme == "databricks" else ""

    @property
    def file(self) -> Path | None:
        """The file of a sqlite store."""
        path = self.uri.partition("sqlite:///")[2].partition("?")[0]
        return Path(path) if path and self.scheme == "sqlite" else None

    @property
    def command(self) -> str:
        """The command (or address) that shows the runs, as typed in the current folder."""
        if self.uri.startswith(("http", "databricks")):
            return self.shown
        # MLflow's own rule: numbered folders with a meta.yaml in ./mlruns select the file store over ./mlflow.db.
        old_store = any(Path("mlruns").glob("[0-9]*/meta.yaml"))
        if self.is_default and Path.cwd() == self.root and not old_store:
            return "uv run mlflow ui"
        return f"uv run mlflow ui --backend-store-uri {self.shown}"

    def check(self) -> Location:
        """Returns itself when something may answer there; that nothing does yet is no error.

        Raises:
            SettingError: MLflow can never write there: an unknown scheme, no host, a missing or read-only folder, no
                driver for the database.
        """
        allowed = (*SCHEMES, *sorted({entry.name for entry in importlib.metadata.entry_points(group=PLUGINS)}))
        if self.scheme in DATABASES:
            self._check_database()
        elif self.scheme in ("http", "https"):
            self._check_server()
        elif self.scheme in ("", "file") and self.scheme not in allowed:
            if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("1", "true"):
                raise self._refused("MLflow no longer writes runs to folders; allowed: sqlite:///mlflow.db, a server")
        elif self.scheme not in allowed:
            raise self._refused(f"scheme {self.scheme!r} is unknown; allowed: {', '.join(allowed)}")
        return self

    def explained(self, error: Exception) -> str:
        """One sentence about what MLflow raised, without the password."""
        text = self._without_secrets(str(error).strip() or type(error).__name__)
        if "Connection refused" in text or "NameResolutionError" in text:
            return "nothing answers there"
        if "timed out" in text or "timeout exception" in text:
            return "no answer in time"
        if any(f"error code {code}" in text or f"{code} Client Error" in text for code in (401, 403)):
            return (
                "access is refused (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
                f"MLFLOW_TRACKING_TOKEN): {text.splitlines()[0][:200]}"
            )
        return text.splitlines()[0][:300]

    def artifacts(self, experiment: str) -> str | None:
        """Where a database's artifacts go: MLflow would take ``mlruns`` in the current folder. None: a server decides."""
        if self.scheme not in DATABASES:
            return None
        return ((self.file.parent if self.file else self.root) / "mlartifacts" / experiment).as_uri()

    def _check_server(self) -> None:
        try:
            host, _ = urlsplit(self.uri).hostname, urlsplit(self.uri).port
        except ValueError as error:  # of a password with a / in it, the first half is taken for the port
            why = "its password must be percent-encoded, / as %2F" if secrets(self.uri) else str(error)
            raise self._refused(why) from None
        if not host:
            raise self._refused(f"no host; expected {self.scheme}://host:port")

    def _check_database(self) -> None:
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        try:
            make_url(self.uri).get_dialect().import_dbapi()
        except ModuleNotFoundError as error:
            hint = ": install it, or name one that is, as postgresql+psycopg2://" if "psycopg" in str(error) else ""
            raise self._refused(f"the Python package {error.name} is not installed{hint}") from None
        except (ArgumentError, ValueError) as error:
            raise self._refused(str(error).splitlines()[0]) from None
        if self.scheme != "sqlite":
            return
        if self.file is None or self.file.name == ":memory:":
            raise self._refused("a sqlite store needs a file, as sqlite:///mlflow.db")
        if not self.file.parent.is_dir():
            raise self._refused(f"the folder {self.file.parent} does not exist")
        if self.file.is_dir():
            raise self._refused(f"{self.file} is a folder")
        if not os.access(self.file if self.file.exists() else self.file.parent, os.W_OK):
            raise self._refused(f"{self.file} cannot be written to")

    def _refused(self, why: str) -> SettingError:
        return SettingError(f"{self.setting}={self.shown}: {self._without_secrets(why)}")

    def _without_secrets(self, text: str) -> str:
        text = text.replace(self.uri, self.shown)
        for secret in secrets(self.uri):
            text = text.replace(secret, "***").replace(unquote(secret), "***")
        return text


def unreachable(error: Exception) -> bool:
    """Whether the store could not be reached, so that the next call would fail too."""
    signs = (
        "failed with exception",
        "timeout exception",
        "OperationalError",
        "Connection refused",
        "Connection aborted",
        "error code 502",
        "error code 503",
    )
    return any(sign in str(error) for sign in signs)


def _absolute(uri: str, root: Path) -> str:
    """A relative sqlite file as one of ``root``."""
    scheme, mark, path = uri.partition(":///")
    relative = scheme.startswith("sqlite") and mark and path and not path.startswith(("/", ":memory:"))
    return f"{scheme}:///{root / path}" if relative else uri
