"""What tests of tracking share."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tracked_grid import runs_of, tell

from ablations.track.location import Location
from ablations.track.store import Store
from ablations.track.work import Work


@dataclasses.dataclass
class Told:
    """A sqlite store and its folder; read through MLflow's own client."""

    root: Path

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def client(self) -> Any:
        return MlflowClient(self.uri)

    def store(self) -> Store:
        return Store(Location.of(self.uri, self.root))

    def tell(self, work: Work, alive: bool = False) -> Work:
        return tell(work, self.uri, alive)

    def runs(self, experiment: str = "mixers") -> tuple[Any, dict[str, Any]]:
        """The grid's run, and the trials' by key, of which there is one each."""
        (parent,), trials = runs_of(self.client, experiment)
        return parent, {key: run for key, (run,) in trials.items()}

    def run(self, experiment: str) -> Any:
        """The only run of an experiment."""
        (run,) = self.client.search_runs([self.client.get_experiment_by_name(experiment).experiment_id])
        return run


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sqlite store with its tables, which take seconds to make."""
    root = tmp_path_factory.mktemp("store")
    Store(Location.of("sqlite:///mlflow.db", root)).runs("Default")
    return root / "mlflow.db"


@pytest.fixture
def told(empty_store: Path, tmp_path: Path) -> Told:
    """A new store at mlflow.db of the current folder."""
    shutil.copy(empty_store, tmp_path)
    return Told(tmp_path)


@pytest.fixture(scope="module")
def module_told(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """One for a module's tests."""
    root = tmp_path_factory.mktemp("told")
    shutil.copy(empty_store, root)
    return Told(root)
