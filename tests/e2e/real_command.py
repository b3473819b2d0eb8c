"""The commands that a user types, in processes of their own, and what they leave in a folder."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TRAINED = ("latent-", "class-", "text-", "aesthetic-", "student-")


def command(
    folder: Path, *words: str, module: str = "ablations.run", tracking: str | None = None
) -> subprocess.CompletedProcess[str]:
    """``python -m module`` in ``folder``, as a user without a terminal would start it; ``tracking``: MLFLOW_TRACKING_URI."""
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"} | {"PYTHONPATH": str(ROOT)}
    environment |= {} if tracking is None else {"MLFLOW_TRACKING_URI": tracking}
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
    )


def succeeded(folder: Path, *words: str, module: str = "ablations.run") -> str:
    """The same, which must go well; what it printed."""
    done = command(folder, *words, module=module)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def rows_of(report: Path) -> list[dict[str, str]]:
    """results.csv of a report."""
    with open(report / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def report_of(said: str, folder: Path) -> Path:
    """The report's folder, from what the command printed last."""
    line = next(line for line in said.splitlines() if line.startswith("report "))
    return folder / Path(line.split(maxsplit=1)[1]).parent


def made(folder: Path, kinds: tuple[str, ...] = TRAINED) -> dict[str, int]:
    """Keys of the finished stages of these kinds -> when they were finished."""
    found = (folder / "runs" / "stages").glob("*/result.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in found if path.parent.name.startswith(kinds)}


def training_of(trial: Path) -> Path:
    """The folder of the training that a trial ends with."""
    keys = json.loads((trial / "stages.json").read_text())
    return trial.parents[1] / "stages" / [key for key in keys if key.startswith(TRAINED)][-1]


def json_of(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())
