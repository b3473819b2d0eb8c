"""Two commands on the same grid at the same time: every trial and every piece of shared work is made once, both report it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = ("grid=mixers", "scale=smoke", "threads=1", "grid.axes={model.mixer: [grfm, attention]}", "track.models_mb=0")


def start(folder: Path, log: Path, *more: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"} | {"PYTHONPATH": str(ROOT)}
    with open(log, "w") as file:
        return subprocess.Popen([sys.executable, "-m", "ablations.run", *COMMAND, *more], cwd=folder, env=environment, text=True,
                                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)


def begun(folder: Path, key: str) -> list[str]:
    """What workers say of the processes that they started for a job."""
    said = "".join(path.read_text() for path in (folder / "runs" / "logs").glob("*/*_log.out"))
    return [line for line in said.splitlines() if line.startswith(key)]


def test_they_share_every_trial(tmp_path):
    logs = [tmp_path / "one", tmp_path / "two"]
    commands = [start(tmp_path, log) for log in logs]
    assert [command.wait(900) for command in commands] == [0, 0], [log.read_text() for log in logs]
    trials = sorted((tmp_path / "runs" / "trials").glob("*"))
    assert len(trials) == 2
    with open(tmp_path / "reports" / "mixers" / "results.csv", newline="") as file:
        rows = {row["key"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {trial.name for trial in trials}
    for trial in trials:
        assert len(begun(tmp_path, trial.name)) == 1
        steps = [json.loads(line)["step"] for line in (trial / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps)) and steps[-1] == 12
        assert all(f"{rows[trial.name]['arm']}, seed 0: " in log.read_text() for log in logs)
    assert len(begun(tmp_path, "prepare")) == 1
    assert len(list((tmp_path / "runs" / "speed").glob("*.json"))) == 1
