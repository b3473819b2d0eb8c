"""Several commands on one grid: two at once share every trial; one leaves, another follows, a third stops it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from real_command import ROOT, made, report_of, rows_of, training_of

from ablations.launch.pool import is_locked

pytestmark = pytest.mark.long
COMMAND = ("grid=mixers", "scale=smoke", "threads=1", "grid.axes={model.mixer: [grfm, attention]}", "track.models_mb=0")
PATIENCE = 900.0  # seconds that a loaded machine may take for anything


def start(folder: Path, log: Path, *more: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"} | {
        "PYTHONPATH": str(ROOT)
    }
    with open(log, "w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "ablations.run", *COMMAND, *more],
            cwd=folder,
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def results(log: Path) -> dict[str, dict[str, str]]:
    """Rows by key of the report that a command made."""
    return {row["key"]: row for row in rows_of(report_of(log.read_text(), log.parent))}


def begun(folder: Path, key: str) -> list[str]:
    """What workers say of the processes that they started for a job."""
    said = "".join(path.read_text() for path in (folder / "runs" / "logs").glob("*/*_log.out"))
    return [line for line in said.splitlines() if line.startswith(key)]


def tracked(folder: Path) -> list[str]:
    """Status of each run in MLflow."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return [run.info.status for run in client.search_runs([one.experiment_id for one in client.search_experiments()])]


def test_two_commands_at_once_share_every_trial(tmp_path):
    logs = [tmp_path / "one", tmp_path / "two"]
    commands = [start(tmp_path, log) for log in logs]
    assert [command.wait(PATIENCE) for command in commands] == [0, 0], [log.read_text() for log in logs]
    trials = sorted((tmp_path / "runs" / "trials").glob("*"))
    assert len(trials) == 2
    rows = results(logs[0])
    assert rows == results(logs[1]) and rows.keys() == {trial.name for trial in trials}
    for trial in trials:
        assert len(begun(tmp_path, trial.name)) == 1
        curve = (training_of(trial) / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in curve]
        assert steps == sorted(set(steps)) and steps[-1] == 12
        assert all(f"{rows[trial.name]['arm']}, seed 0: " in log.read_text() for log in logs)
    shared = made(tmp_path, ("latent-", "reference-"))
    assert len(shared) == 2 and all(len(begun(tmp_path, key)) <= 1 for key in made(tmp_path, ("",)))
    assert len(made(tmp_path, ("speed-",))) == 1
    # The runs folder may move: the report is made anew from it, and nothing is measured again.
    (tmp_path / "runs").rename(tmp_path / "moved")
    again = start(tmp_path, tmp_path / "again", "action=report", "runs_dir=moved", "reports_dir=rebuilt")
    assert again.wait(PATIENCE) == 0, (tmp_path / "again").read_text()
    assert "rebuilt/mixers/" in (tmp_path / "again").read_text()
    assert results(tmp_path / "again") == rows and "measuring speed" not in (tmp_path / "again").read_text()
    assert tracked(tmp_path) == ["FINISHED"] * 3


def test_one_leaves_another_follows_and_a_third_stops_the_grid(tmp_path):
    long = ("train.steps=100000", "launcher.interrupt=detach")
    first = start(tmp_path, tmp_path / "first", *long)
    until(lambda: first.poll() is not None or any((tmp_path / "runs" / "stages").glob("text-*/metrics.jsonl")))
    first.send_signal(signal.SIGINT)
    assert first.wait(PATIENCE) == 0, (tmp_path / "first").read_text()
    assert "the trials run on" in (tmp_path / "first").read_text()
    second = start(tmp_path, tmp_path / "second", *long)
    until(lambda: second.poll() is not None or "seed 0: train" in (tmp_path / "second").read_text())
    status = start(tmp_path, tmp_path / "status", *long, "action=status")
    assert status.wait(PATIENCE) == 0 and " running" in (tmp_path / "status").read_text()
    report = start(tmp_path, tmp_path / "report", *long, "action=report")
    assert report.wait(PATIENCE) == 1 and "it is still running" in (tmp_path / "report").read_text()
    told = report_of((tmp_path / "report").read_text(), tmp_path)
    assert "it is still running" in (told / "report.md").read_text()
    assert tracked(tmp_path) == ["RUNNING"] * 3  # the grid and its trials
    third = start(tmp_path, tmp_path / "third", *long, "action=cancel")
    assert third.wait(PATIENCE) == 0 and "stopped 2 workers here" in (tmp_path / "third").read_text()
    assert second.wait(PATIENCE) == 130
    told = (tmp_path / "second").read_text()
    assert (
        "stopped by action=cancel; the same command continues" in told
        and "Traceback" not in told
        and "failed" not in told
    )
    trials = sorted((tmp_path / "runs" / "trials").glob("*"))
    until(lambda: not any(is_locked(trial / "claim") for trial in trials))
    assert all(len(begun(tmp_path, trial.name)) == 1 for trial in trials)  # followed, not started again
    assert any((tmp_path / "runs" / "stages").glob("text-*/checkpoint.safetensors"))
    assert not any((trial / "error.json").exists() for trial in trials)
