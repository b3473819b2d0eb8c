"""What a grid's invocation leaves for later ones: which trials it has, so that it can be looked at without planning it again."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iris.io.files import read_json, write_json
from iris.io.hashing import digest

if TYPE_CHECKING:
    from ablations.question.plan import Plan
    from ablations.question.settings import Launcher, Settings

CANCELLED = ".cancelled"  # suffix of a file beside the record: whoever follows the grid is to stop
# Settings that change nothing about which trials a grid has.
HOW = ("launcher", "threads", "runs_dir", "reports_dir", "dry_run", "action", "track", "reason")


@dataclass(frozen=True)
class Entry:
    """A trial or a piece of shared work; ``folder`` is relative to the runs folder, which may move."""

    key: str
    label: str
    folder: str
    arm: str = ""
    seed: int = 0


@dataclass(frozen=True)
class GridRecord:
    """A grid as last planned, below ``runs_dir``/grids.

    ``cost``: what a trial occupies, as ``cost_of`` says.
    """

    name: str
    question: str
    command: str
    launcher: str
    threads: int
    trials: list[Entry]
    stages: list[Entry]
    cost: list[Any]
    driver: dict[str, Any] = field(
        default_factory=lambda: {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}
    )

    @classmethod
    def of(cls, plan: Plan, name: str, question: str, command: str, launcher: Launcher) -> GridRecord:
        """The record of a plan."""
        trials = [Entry(t.key, t.label, f"trials/{t.key}", t.arm, t.seed) for t in plan.trials]
        stages = {s.key: Entry(s.key, s.label, f"stages/{s.key}") for trial in plan.trials for s in trial.chain.stages}
        return cls(
            name,
            question,
            command,
            launcher.name,
            plan.threads,
            trials,
            list(stages.values()),
            list(cost_of(launcher, plan.threads)),
        )

    def save(self, path: Path) -> None:
        """Write it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if asdict(self) | {"driver": None} != (read_json(path) or {}) | {"driver": None}:
            write_json(path, asdict(self))


def cost_of(launcher: Launcher, threads: int) -> tuple[int, str]:
    """What a trial occupies: how many, and of what."""
    gpus = launcher.gpus_per_trial * launcher.nodes
    return (gpus, "GPU") if gpus else (threads * launcher.nodes, "core")


def record_path(settings: Settings) -> Path:
    """Where the record of a grid with these settings is: the same for every way to run it."""
    what = {key: value for key, value in asdict(settings).items() if key not in HOW}
    return Path(settings.runs_dir).absolute() / "grids" / f"{settings.grid.name}-{digest(what)}.json"


def load_record(path: Path) -> GridRecord | None:
    """The record, or None where the grid was never started."""
    stored = read_json(path)
    if stored is None:
        return None
    listed = {name: [Entry(**entry) for entry in stored[name]] for name in ("trials", "stages")}
    return GridRecord(**{**stored, **listed})
