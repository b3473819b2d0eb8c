"""How a trial stands, from its files alone: no torch, no driver, no cluster is asked."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablations.launch.job import ERROR, RESULT
from ablations.launch.pool import is_locked
from ablations.launch.progress import STATUS
from iris.io.files import read_json

# A status is written at least this often while a trial computes; beyond it only a lock or a heart shows life.
FRESH_SECONDS = 60.0
LOCKS = ("claim", "lock")  # of a job, and of a stage, held as long as it is made


@dataclass(frozen=True)
class TrialState:
    """State (done, failed, running, stopped, waiting) and what is known of it."""

    state: str
    status: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Compute time of a finished trial."""
        return sum(self.result.get("seconds", {}).values())


def state_of(folder: Path) -> TrialState:
    """The state of the trial or stage in ``folder``.

    "stopped" has begun and is not being computed now; the same command goes on with it.
    """
    result, error = read_json(folder / RESULT), read_json(folder / ERROR)
    status = read_json(folder / STATUS) or {}
    if result is not None:
        return TrialState("done", status, result)
    if alive(folder, status):
        return TrialState("running", status)
    if error is not None:
        return TrialState("failed", status, error=error)
    return TrialState("stopped" if status else "waiting", status)


def alive(folder: Path, status: dict[str, Any]) -> bool:
    """Whether somebody computes in ``folder``: holds its lock here, or wrote to it a moment ago anywhere."""
    if any((folder / name).exists() and is_locked(folder / name) for name in LOCKS):
        return True
    beat = folder / "alive"
    try:
        return time.time() - beat.stat().st_mtime < FRESH_SECONDS
    except OSError:
        return False
