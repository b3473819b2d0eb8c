"""Trials and stages as they are left on disk, written without running any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_stage(runs: Path, key: str, done: bool = True) -> Path:
    """A stage's folder; a model's has weights and what its training went on from."""
    folder = runs / "stages" / key
    write(folder / "settings.json", {})
    if key.startswith("text"):
        (folder / "weights").mkdir()
        (folder / "weights" / "model.safetensors").write_bytes(b"x" * 1_000_000)
        (folder / "checkpoint-12").mkdir()
        (folder / "checkpoint-12" / "state.safetensors").write_bytes(b"x" * 2_000_000)
    if done:
        write(folder / "result.json", {})
    return folder


def write_trial(runs: Path, key: str, dim: int = 64, fid: float | None = 3.0, stages: tuple[str, ...] = ()) -> Path:
    """A trial's folder; without FID it has failed."""
    folder = runs / "trials" / key
    write(folder / "settings.json", {"model": {"dim": dim, "mixer": "grfm"}, "seed": 0})
    write(folder / "status.json", {"state": "done", "phase": "done", "host": "here"})
    write(folder / "stages.json", list(stages))
    if fid is None:
        told = {"cause": "nan", "message": "step 3: loss nan", "traceback": "Traceback: of the trial"}
        write(folder / "error.json", told)
        return folder
    result = {"metrics": {"fid": fid, "samples": 96}, "seconds": {"train": 36.0}, "environment": {"cpu": "a"}}
    write(folder / "result.json", result)
    (folder / "samples.npz").write_bytes(b"x" * 3_000_000)
    return folder


def write_runs(runs: Path) -> Path:
    """Two finished trials, the stages that they need, a failed trial, and a stage that nobody needs."""
    write_trial(runs, "aaaa11112222", stages=("data-1", "text-1"))
    write_trial(runs, "bbbb11112222", dim=128, fid=4.5, stages=("data-1", "text-2"))
    write_trial(runs, "bbbb33334444", fid=None)
    for key in ("data-1", "latent-old", "text-1", "text-2"):
        write_stage(runs, key)
    return runs
