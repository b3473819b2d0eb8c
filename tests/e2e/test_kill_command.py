"""Kill -9 any process of the real command at any moment, run it again: the same numbers, each step trained once.

IRIS_KILLS sets how often; the moments are drawn from a seed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from mlflow import MlflowClient
from noted_mixers import FOLDER
from small_grid import PATIENCE

from ablations.launch.job import RESULT
from iris.io.files import read_json
from iris.io.tensors import load_tensors
from iris.stages.engine import SETTINGS

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("IRIS_KILLS", "1"))
ARMS, STEPS = ("One", "Two"), 40
MIXERS = [f"noted_mixers:{arm}" for arm in ARMS]
COMMAND = (
    "grid=mixers",
    "scale=smoke",
    "threads=1",
    f"train.steps={STEPS}",
    "compute.checkpoint_seconds=0",
    "grid.match=none",
    f"grid.axes={{model.mixer: {MIXERS}}}",
    f"grid.baseline={{model.mixer: '{MIXERS[0]}'}}",
    "track.models_mb=0",
    "measure.latency.rounds=2",
)
KINDS = {
    "ablations.run": "driver",
    "submitit": "worker or job",
    "report.process": "report",
    "eval.speed": "speed",
    "track.follow": "follower",
}
MADE = ("data", "latent", "encoded", "reference", "text", "images", "features", "quality", "skills")  # kinds of stages


@dataclass
class Grid:
    """A folder in which the command runs."""

    root: Path

    def start(self) -> subprocess.Popen[bytes]:
        self.root.mkdir(exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
        environment |= {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", FOLDER: str(self.root)}
        with open(self.root / "said", "a") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "ablations.run", *COMMAND],
                cwd=self.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )

    @property
    def said(self) -> str:
        return (self.root / "said").read_text()

    def processes(self) -> Iterator[tuple[str, int]]:
        """Everything that works for the grid, whoever started it: kind and number."""
        for process in psutil.process_iter():
            try:
                if process.environ().get(FOLDER) == str(self.root) and process.status() != psutil.STATUS_ZOMBIE:
                    words = " ".join(process.cmdline())
                    yield next((kind for mark, kind in KINDS.items() if mark in words), "other"), process.pid
            except psutil.Error:
                continue

    @property
    def trials(self) -> dict[str, Path]:
        """Arm -> folder."""
        found = {path.parent: read_json(path) for path in self.root.glob("runs/trials/*/settings.json")}
        return {settings["model"]["mixer"].partition(":")[2]: folder for folder, settings in found.items() if settings}

    def metrics(self) -> dict[str, dict[str, float]]:
        return {arm: json.loads((folder / "result.json").read_text())["metrics"] for arm, folder in self.trials.items()}

    def evaluations(self) -> dict[str, int]:
        """How often a mixer of each arm was evaluated in training."""
        return {arm: len((self.root / arm).read_text().splitlines()) for arm in ARMS}

    def moment(self, seconds: float, draw: random.Random) -> tuple[str, Callable[[], bool]]:
        """Any moment of a run that takes ``seconds``, or one at which a stage is made, a checkpoint written, a step computed."""
        kind, stage = draw.choice(["any", "any", "checkpoint", "stage", "training"]), draw.choice(MADE)
        folders, trained = self.root / "runs" / "stages", draw.choice(["latent", "text"])
        if kind == "checkpoint" and not any(folders.glob(f"{trained}-*/{RESULT}")):
            return f"{trained}'s checkpoint", lambda: any(folders.glob(f"{trained}-*/.checkpoint*"))
        if kind == "stage" and not any(folders.glob(f"{stage}-*/{RESULT}")):
            begun = f"{stage}-*/{SETTINGS}"
            return stage, lambda: any(not (path.parent / RESULT).exists() for path in folders.glob(begun))
        if kind == "training" and not all((self.root / arm).exists() for arm in ARMS):
            many = draw.randrange(40 * STEPS)
            return kind, lambda: sum(path.stat().st_size for arm in ARMS if (path := self.root / arm).exists()) > many
        at = time.monotonic() + draw.uniform(0, seconds)
        return "any", lambda: time.monotonic() >= at


def strike(grid: Grid, driver: subprocess.Popen[bytes], moment: Callable[[], bool], draw: random.Random) -> str | None:
    """Kill a process at this moment; its kind, or None when the command ended before."""
    while driver.poll() is None:
        if not moment():
            time.sleep(0.002)
            continue
        by_kind: dict[str, list[int]] = {}
        for kind, pid in grid.processes():
            by_kind.setdefault(kind, []).append(pid)
        if by_kind:
            kind = draw.choice(sorted(by_kind))
            os.kill(draw.choice(by_kind[kind]), signal.SIGKILL)
            return kind
    return None


READERS: dict[str, Callable[[Path], object]] = {
    ".json": lambda path: json.loads(path.read_text()),
    ".safetensors": load_tensors,
    ".npy": lambda path: np.load(path, mmap_mode="r"),
    ".npz": lambda path: dict(np.load(path)),
}


def check_files(grid: Grid) -> None:
    """Whatever is finished is whole, and so is each checkpoint and whatever a driver reads of the rest."""
    finished = {path.parent for path in grid.root.glob(f"runs/*/*/{RESULT}")}
    for path in (path for path in grid.root.glob("runs/**/*") if path.suffix in READERS and path.name[0] != "."):
        if path.suffix != ".json" and "checkpoint" not in path.name and finished.isdisjoint(path.parents):
            continue
        for tries_left in (2, 1, 0):
            try:
                READERS[path.suffix](path)
                break
            except (OSError, ValueError, RuntimeError) as error:  # workers go on: it may have been replaced just now
                assert tries_left or not path.exists(), f"{path}: {error}"


def check_tracked(grid: Grid) -> None:
    """MLflow has each point once."""
    client = MlflowClient(f"sqlite:///{grid.root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mixers").experiment_id
    found = {run.data.tags["kind"]: [] for run in client.search_runs([experiment])}
    for run in client.search_runs([experiment]):
        found[run.data.tags["kind"]].append(run)
        assert run.info.status == "FINISHED"
    assert len(found["grid"]) == 1 and len(found["trial"]) == len(ARMS)
    for run in found["trial"]:
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
        assert len(steps) == len(set(steps)) and max(steps) == STEPS


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Grid, float]:
    """The grid never disturbed, and its seconds."""
    grid, started = Grid(tmp_path_factory.mktemp("whole") / "grid"), time.monotonic()
    assert grid.start().wait(PATIENCE) == 0, grid.said
    check_tracked(grid)
    return grid, time.monotonic() - started


def test_any_process_of_the_command_killed_at_any_moment(whole, tmp_path):
    reference, seconds = whole
    once, draw, done, killed = reference.evaluations(), random.Random(13), 0, Counter()
    assert all(count and count % STEPS == 0 for count in once.values())
    for number in range(10 * KILLS):
        grid, kills, code = Grid(tmp_path / f"grid{number}"), 0, 1
        while code:
            driver, wanted = grid.start(), done < KILLS
            if wanted:
                when, moment = grid.moment(seconds, draw)
                if kind := strike(grid, driver, moment, draw):
                    kills, done = kills + 1, done + 1
                    killed[kind, when] += 1
                    print(f"{done} of {KILLS}, grid {number}: {kind}, {when}", flush=True)  # many take hours
            code = driver.wait(PATIENCE)
            check_files(grid)
            assert wanted or code == 0, grid.said
        assert grid.metrics() == reference.metrics()
        check_tracked(grid)
        for arm, count in grid.evaluations().items():
            assert once[arm] <= count <= once[arm] * (1 + kills / STEPS)
        if done == KILLS:
            print(f"{done} kills of {number + 1} grids in {seconds:.0f} s each:", *sorted(killed.items()), sep="\n")
            return
    pytest.fail(f"only {done} of {KILLS} kills could be placed")
