"""What the engine hands to the tracker, the terminal and the report: one record a trial, one outcome a grid."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PlannedTrial:
    """One trial of a grid before it runs, as ``ablations.question.grid.Trial``, which torch would be imported for.

    ``curves`` and ``model`` are relative to the runs folder, since stages are shared by trials.
    """

    key: str  # hash of what determines the result
    arm: str  # name shared by all seeds of one arm, e.g. "grfm" or "mixer=grfm iterations=8"
    values: dict[str, Any]  # axis -> value, e.g. {"model.mixer": "grfm"}
    seed: int
    baseline: bool
    settings: dict[str, Any]
    matched: str | None = None  # what `match` changed, in words
    curves: tuple[str, ...] = ("trials/{key}/metrics.jsonl",)  # of its trainings, the last one its own
    model: str | None = "trials/{key}/model"  # folder of its saved pipeline

    def __post_init__(self) -> None:
        object.__setattr__(self, "curves", tuple(file.replace("{key}", self.key) for file in self.curves))
        object.__setattr__(self, "model", self.model and self.model.replace("{key}", self.key))

    @classmethod
    def of(cls, trial: Any) -> PlannedTrial:
        """The same of something that has these attributes, a Trial or a TrialRecord."""
        return cls(**{name.name: getattr(trial, name.name) for name in fields(cls) if hasattr(trial, name.name)})

    @property
    def label(self) -> str:
        """Name of the trial for people: the arm and its seed."""
        return f"{self.arm}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class TrialRecord(PlannedTrial):
    """One trial of a grid after it ran (or failed, or was found finished).

    ``metrics`` uses the names of the table of measures in README; ``folder`` holds settings.json, metrics.jsonl,
    samples.npz and, for gated mixers, gates.json. ``error`` is None or {"cause", "message", "traceback", "log"}.
    """

    state: str  # done | failed
    cached: bool  # finished before this invocation
    metrics: dict[str, float]
    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    error: dict[str, str] | None = None


@dataclass(frozen=True)
class GridOutcome:
    """A grid's question and everything measured to answer it."""

    name: str
    question: str
    claim: str
    match: str  # params | flops | none
    decide: dict[str, Any]  # {"metric": "fid", "better": "lower", "practical": 0.05}
    axes: dict[str, list[Any]]
    records: list[TrialRecord]
    judge: dict[str, Any]  # {"name": "shapes", "sha256": …, plus its record}
    data: dict[str, Any]  # {"name": "shapes", "fingerprint": …, "train": n, …}
    command: str  # what the user typed
    commit: str  # git commit, "+changes" appended when the tree is dirty, or "unknown"
    hardware: dict[str, Any]  # {"cpu": …, "cores": …, "threads": …, "memory_gb": …, "device": …, "torch": …}
    notes: list[str] = field(default_factory=list)  # warnings that belong in the report
    wall_seconds: float = 0.0
