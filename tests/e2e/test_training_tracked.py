"""``python -m iris.training`` and MLflow: rows, settings and pictures of a stage arrive, now or later, whatever becomes of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from iris.io.follower import MARK
from iris.training.__main__ import main

ROOT = Path(__file__).parents[2]
WORDS = ("stage=vae", "scale=smoke", "data.train=64", "data.validation=16", "vae.steps=12", "compute.validate_every=6")


def tracked(place: Path) -> list[Path]:
    """Folders of the stages that MLflow is to have."""
    return [mark.parent for mark in place.glob(f"runs/stages/*/{MARK}")]


def run_of(place: Path, store: str = "mlflow.db") -> Any:
    """The only run of the experiment, and its client."""
    client = MlflowClient(f"sqlite:///{place / store}")
    (run,) = client.search_runs([client.get_experiment_by_name("training").experiment_id])
    return run, client


def statuses(store: Path) -> list[str]:
    """Of the runs of a store, which may not be there yet."""
    if not store.exists():
        return []
    client = MlflowClient(f"sqlite:///{store}")
    return [run.info.status for run in client.search_runs([one.experiment_id for one in client.search_experiments()])]


def assert_rows_are_there(run: Any, client: Any, folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "images_per_s", "psnr"):
        points = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        assert points == [(row["step"], row[name]) for row in rows if name in row], name


def test_a_uri_is_refused_before_anything_is_computed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://me:secret@x")
    assert main([*WORDS]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: MLFLOW_TRACKING_URI=gopher://me:***@x: scheme 'gopher' is unknown")
    assert not (tmp_path / "runs").exists()


def test_a_stage_whose_server_was_down_is_sent_by_the_next_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nothing listens there
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", dead)
        assert main([*WORDS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(dead in line and "nothing answers there" in line for line in lines) == 1
    assert sum("MLflow at" in line and "Nothing is lost" in line for line in lines) == 1
    assert not (tmp_path / "mlflow.db").exists()

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main([*WORDS]) == 0 and "MLflow gets what it missed" in capsys.readouterr().out
    (folder,) = tracked(tmp_path)
    run, client = run_of(tmp_path)
    assert (run.info.status, run.info.run_name, run.data.params["vae.steps"]) == ("FINISHED", folder.name, "12")
    assert_rows_are_there(run, client, folder)
    pictures = [item.path for item in client.list_artifacts(run.info.run_id, "pictures")]
    assert pictures == [f"pictures/reconstructions-{step:06d}.png" for step in (6, 12)]
    assert main([*WORDS]) == 0 and "MLflow gets what it missed" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_training_that_fails_and_one_that_is_killed_are_told_as_such(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main([*WORDS, "vae.learning_rate=1e30", "vae.optimiser=adamw"]) == 1
    (folder,) = tracked(tmp_path)
    assert run_of(tmp_path)[0].info.status == "FAILED"
    assert json.loads((folder / "error.json").read_text())["cause"] == "NonFiniteLoss"

    long = [sys.executable, "-m", "iris.training", *WORDS, "vae.steps=100000", "compute.checkpoint_seconds=0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "sqlite:///killed.db"}
    with subprocess.Popen(long, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as command:
        while not any((one / "metrics.jsonl").exists() for one in tracked(tmp_path) if one != folder):
            assert command.poll() is None
            time.sleep(0.05)
        command.send_signal(signal.SIGKILL)
    (killed,) = (one for one in tracked(tmp_path) if one != folder)
    deadline = time.monotonic() + 120
    while statuses(tmp_path / "killed.db") != ["KILLED"]:
        assert time.monotonic() < deadline, "the process that tells MLflow went with the command"
        time.sleep(0.2)
    run, client = run_of(tmp_path, "killed.db")
    assert run.info.run_name == killed.name
    assert_rows_are_there(run, client, killed)
