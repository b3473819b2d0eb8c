"""The command on a real Slurm: the numbers of local workers, also after a requeue in mid-training and on two nodes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from iris.io.files import read_json

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.long, pytest.mark.parametrize("cluster", ["none"], indirect=True, ids=["no accounting"])]
STEPS = 100
SETTINGS = (
    "grid=mixers",
    "scale=smoke",
    f"train.steps={STEPS}",
    "compute.checkpoint_seconds=0",
    "model.iterations=2",
    "threads=1",
    "track.models_mb=0",
)
ARMS = ("grfm", "attention", "fourier", "recurrence", "spatial")
SHARED = {"data": 2, "latent": 1, "encoded": 2, "reference": 1}  # stages of all trials: of two splits, or one
SLURM = (
    "launcher=slurm",
    "launcher.gpus_per_trial=0",
    "launcher.memory_gb=3",
    "launcher.timeout_min=30",
    "launcher.workers=2",
)


@dataclass(frozen=True)
class Grid:
    """The command's folder."""

    folder: Path

    def run(self, *overrides: str, tick: Callable[[], None] = lambda: None) -> str:
        """Run the command and return what it prints; ``tick`` is called meanwhile."""
        environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"} | {
            "PYTHONPATH": str(ROOT)
        }
        with open(self.folder / "said", "w") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "ablations.run", *SETTINGS, *overrides],
                cwd=self.folder,
                text=True,
                env=environment,
                stdout=said,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
            try:
                deadline = time.monotonic() + 900
                while process.poll() is None:
                    assert time.monotonic() < deadline, "the grid does not go on"
                    tick()
                    time.sleep(0.1)
            finally:
                process.kill()
                process.wait()
        text = (self.folder / "said").read_text()
        assert process.returncode == 0, text
        return text

    @property
    def trials(self) -> dict[str, Path]:
        """Arm -> folder, of the trials that have begun."""
        return self._by_arm("trials/*")

    @property
    def stages(self) -> Path:
        return self.folder / "runs" / "stages"

    def _by_arm(self, folders: str) -> dict[str, Path]:
        found = {folder: read_json(folder / "settings.json") for folder in (self.folder / "runs").glob(folders)}
        return {settings["model"]["mixer"]: folder for folder, settings in found.items() if settings}

    def metrics(self, arm: str) -> dict[str, float]:
        return json.loads((self.trials[arm] / "result.json").read_text())["metrics"]

    def curve(self, arm: str) -> list[dict[str, Any]]:
        """Whole lines of its training's metrics.jsonl; none while that has not begun."""
        path = self._by_arm("stages/text-*").get(arm, self.folder) / "metrics.jsonl"
        return (
            [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            if path.exists()
            else []
        )

    def requeue(self, arm: str, before: list[dict[str, Any]]) -> None:
        """Once it trains, have its job queued again; ``before`` becomes its curve at that moment."""
        if not before and (rows := self.curve(arm)):
            number = json.loads((self.trials[arm] / "job.json").read_text())["id"]
            subprocess.run(["scontrol", "requeue", number], check=True)
            before.extend(rows)

    def job(self, arm: str) -> str:
        """What the cluster says of an arm's job."""
        number = json.loads((self.trials[arm] / "job.json").read_text())["id"]
        return subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """Two of the grid's arms by a local worker, on as many threads: another number rounds otherwise."""
    grid = Grid(tmp_path_factory.mktemp("local"))
    grid.run("grid.axes={model.mixer: [grfm, attention]}", "launcher.workers=1", "measure.latency.rounds=0")
    return grid


@pytest.fixture(scope="module")
def requeued(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Grid, list[dict[str, Any]], str]:
    """The whole grid by the cluster, attention's job requeued in mid-training; its curve at that moment; what was printed."""
    grid, before = Grid(tmp_path_factory.mktemp("slurm")), []
    said = grid.run(*SLURM, tick=lambda: grid.requeue("attention", before))
    return grid, before, said


def test_the_cluster_gives_the_numbers_of_local_workers(local, requeued):
    grid, _, said = requeued
    assert all(grid.metrics(arm) == local.metrics(arm) for arm in local.trials) and len(local.metrics("grfm")) > 20
    assert "grfm, seed 0: done" in said and "Restarts=0" in grid.job("grfm") and "NumNodes=1 " in grid.job("grfm")
    (results,) = grid.folder.glob("reports/mixers/*/results.csv")
    with open(results, newline="") as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert rows.keys() == set(ARMS)
    assert all(float(row["latency_ms"]) > 0 and float(row["peak_memory_mb"]) > 0 for row in rows.values())


def test_a_trial_requeued_in_mid_training_ends_with_the_same_numbers(local, requeued):
    grid, before, _ = requeued
    assert "Restarts=1" in grid.job("attention") and 0 < before[-1]["step"] < STEPS
    rows = grid.curve("attention")
    assert rows[: len(before) - 1] == before[:-1]  # kept, with their times; the last may have had no checkpoint yet
    assert [row["step"] for row in rows] == [row["step"] for row in local.curve("attention")]
    assert [row["loss"] for row in rows] == [row["loss"] for row in local.curve("attention")]
    assert grid.metrics("attention") == local.metrics("attention")


def test_shared_work_is_made_once_before_the_trials(requeued):
    grid, _, said = requeued
    kinds = Counter(path.name.partition("-")[0] for path in grid.stages.glob("*") if (path / "result.json").exists())
    assert {kind: kinds[kind] for kind in SHARED} == SHARED and kinds["text"] == len(ARMS)
    (record,) = (path for kind in SHARED for path in grid.stages.glob(f"{kind}-*/job.json"))
    number = read_json(record)["id"]
    scripts = [path.read_text() for path in (grid.folder / "runs" / "logs").glob("*/*.sh")]
    assert any(f"--dependency=afterany:{number}\n" in script and "--array=0-4%2" in script for script in scripts)
    assert said.index("latent wavelet_vae") < said.index("grfm, seed 0")


def test_two_nodes_share_a_trial_that_is_requeued_in_mid_training(local, cluster, tmp_path):
    grid, before = Grid(tmp_path), []
    for made in (path for kind in SHARED for path in local.stages.glob(f"{kind}-*")):
        shutil.copytree(made, grid.stages / made.name)
    grid.run(
        "grid.axes={model.mixer: [grfm]}",
        *SLURM,
        "launcher.nodes=2",
        "measure.latency.rounds=0",
        tick=lambda: grid.requeue("grfm", before),
    )
    assert "NumNodes=2 " in grid.job("grfm") and "Restarts=1" in grid.job("grfm") and 0 < before[-1]["step"] < STEPS
    expected = local.curve("grfm")
    assert [row["step"] for row in grid.curve("grfm")] == [row["step"] for row in expected]
    # Sums in another order; Muon's bfloat16 iteration lets a last bit grow.
    assert [row["loss"] for row in grid.curve("grfm")] == pytest.approx([row["loss"] for row in expected], rel=0.02)
    assert grid.metrics("grfm").keys() == local.metrics("grfm").keys()
    assert grid.metrics("grfm")["fid"] == pytest.approx(local.metrics("grfm")["fid"], rel=0.1)
