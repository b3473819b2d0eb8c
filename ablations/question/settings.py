"""The settings of ``python -m ablations.run``: those of a trial, the question, and where and how it is run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ablations.question.track import Track
from eval import settings as measuring
from eval.export import Runtime
from eval.metrics.quality import METRICS
from eval.settings import JudgeChoice, Measure
from iris.errors import SettingError, require_folder_name
from iris.settings import Tree, load_yaml, setting
from iris.stages import settings as training
from iris.stages.settings import Recipe

CLUSTER_THREADS = 4  # of a trial on Slurm, whose nodes are not this machine
GRIDS = Path(__file__).parents[1] / "conf" / "grid"
ALSO = "settings"  # of a grid file: what its question needs beside its axes


@dataclass(frozen=True, kw_only=True)
class TrialSettings(Recipe):
    """All that a trial's result depends on, and how it is computed."""

    judge: JudgeChoice
    measure: Measure
    runtime: Runtime


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Settings grid.*: what is varied (``ablations.question.axes``), against what, and what difference matters."""

    name: str = setting("", "of the report's folder")
    question: str = setting("", "that the grid answers")
    claim: str = setting("", "what is thought to be true")
    baseline: dict = setting({}, "the arm that others are compared with: {model.mixer: grfm}")
    axes: dict = setting({}, "setting: values, multiplied")
    zip: list = setting([], "axes that move together: [{model.dim: [64, 96], model.heads: [4, 6]}]")
    when: dict = setting(
        {}, "an axis only where others have these values: {fourier.form: {model.mixer: [grfm, fourier]}}"
    )
    exclude: list = setting([], "points to leave out: [{model.mixer: conv3, model.iterations: [8, 16]}]")
    points: list = setting([], "further points: [{model.mixer: conv7, model.dim: 96}]")
    include: list = setting([], "other grids whose points join: [depth]")
    match: str = setting(
        "none", "resize the mixer until an arm has the baseline's", choices=("params", "flops", "latency", "none")
    )
    decide: dict = setting({}, "metric, better (lower, higher), practical (a margin such as 5%), expect {arm: word}")

    def __post_init__(self) -> None:
        if self.name:
            require_folder_name("grid.name", self.name)


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Settings launcher.*: where trials run, through submitit in every case. What is Slurm's is read by Slurm alone."""

    name: str = setting("local", "inline: in this process", choices=("local", "inline", "slurm"))
    workers: int = setting(2, "trials at a time; of a job array on Slurm", low=1)
    timeout_min: int = setting(720, "of a trial; on Slurm before it is queued again", low=1)
    gpus_per_trial: int = setting(0, "on each of its nodes: a process each", low=0)
    trials_per_gpu: int = setting(1, "at a time on this machine, where launcher.workers allows it", low=1)
    setup: list = setting([], "shell lines before a worker or trial starts")
    interrupt: str = setting("ask", "Ctrl-C; detach: trials run on", choices=("ask", "detach", "cancel"))
    partition: str | None = setting(None, "of Slurm")
    account: str | None = setting(None, "of Slurm")
    qos: str | None = setting(None, "of Slurm")
    constraint: str | None = setting(None, "features that a node must have")
    nodes: int = setting(1, "of a trial: its processes share each batch", low=1)
    memory_gb: float | None = setting(None, "of a node", low=0, above=True)
    requeues: int = setting(3, "times that a trial over its time is queued again, to go on", low=0)
    signal_s: int = setting(90, "seconds before the end of its time at which a trial is told to stop", low=1)
    array_size: int = setting(1000, "trials of one job array", low=1)
    python: str | None = setting(None, "how Python is started on a node: apptainer exec image.sif python")
    speed_constraint: str | None = setting(None, "features of the node that speed is measured on; null: as constraint")
    sbatch: dict = setting({}, "further options of sbatch by name")

    def __post_init__(self) -> None:
        if self.name != "slurm" and self.gpus_per_trial > 1:
            raise SettingError(
                f"launcher.gpus_per_trial={self.gpus_per_trial} with launcher={self.name}: a trial is one process there, "
                "on one GPU; allowed: 0, 1 (or launcher=slurm)"
            )

    @property
    def processes(self) -> int:
        """Processes that share each batch of a trial: one for each GPU of each node."""
        return self.nodes * max(1, self.gpus_per_trial) if self.name == "slurm" else 1

    def threads_of(self, threads: int | None) -> int:
        """Processor threads of a trial: ``threads``, or the machine's cores divided among the workers."""
        if threads is not None:
            return threads
        return CLUSTER_THREADS if self.name == "slurm" else max(1, (os.cpu_count() or 1) // self.workers)


@dataclass(frozen=True, kw_only=True)
class Settings(TrialSettings):
    """The whole configuration."""

    grid: Grid
    launcher: Launcher
    track: Track
    seeds: list = setting([0], "a verdict needs at least 2; up to 4 decide large gaps alone")
    threads: int | None = setting(
        None, "processor threads a trial; null: all cores / launcher.workers; on Slurm 4", low=1
    )
    runs_dir: str = setting("runs", "stages, trials, logs")
    reports_dir: str = setting("reports", "a folder a grid")
    reason: str | None = setting(None, "why this run departs from what was registered", result=False)
    dry_run: bool = setting(False, "print the plan and its cost, train nothing")
    action: str = setting(
        "run",
        "retry: only what failed; report: from what is there",
        choices=("run", "status", "cancel", "retry", "report"),
    )

    def __post_init__(self) -> None:
        if self.seed != 0:
            raise SettingError(f"seed={self.seed}: the trials' seeds are seeds=[{self.seed}]")


# The settings of a trial that an axis may have, by name; its seed is none of them.
TRIAL = tuple(name for name in TrialSettings.__dataclass_fields__ if name != "seed")
LAUNCHERS: dict[str, dict[str, Any]] = {
    "local": {},
    "inline": {"name": "inline", "workers": 1},
    "slurm": {"name": "slurm", "workers": 16, "gpus_per_trial": 1},
}
# What this command sets otherwise than the groups themselves: a trial is looked at when it is finished.
CHANGES: dict[str, Any] = {
    "measure": {"heldout": 256, "quality": {"metrics": [name for name in METRICS if name != "fid_infinity"]}}
}


@cache
def grids() -> Mapping[str, Mapping[str, Any]]:
    """Name -> what ``grid=name`` sets: the question, and what it needs beside its axes."""
    return {path.stem: _grid(load_yaml(path.read_text(encoding="utf-8"))) for path in sorted(GRIDS.glob("*.yaml"))}


def _grid(stored: dict[str, Any]) -> dict[str, Any]:
    return {"grid": {key: value for key, value in stored.items() if key != ALSO}, **stored.get(ALSO, {})}


@cache
def scales() -> Mapping[str, Mapping[str, Any]]:
    """Name -> what ``scale=name`` sets of training, measuring and launching."""
    own = {"gpu": {"launcher": {"gpus_per_trial": 1}}}
    parts = (training.SCALES, measuring.SCALES, own)
    return {name: {k: v for part in parts for k, v in part.get(name, {}).items()} for name in training.SCALES}


TREE = Tree(
    Settings,
    training.RECIPE_GROUPS | measuring.GROUPS | {"launcher": LAUNCHERS},
    {"grid": grids, "scale": scales},
    {"grid": "mixers", "scale": "default"},
    training.RECIPE_CHANGES | CHANGES,
    "grid=mixers or train.steps=2000",
)
