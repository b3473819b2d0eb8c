"""How a job says where it is: one small JSON file, replaced atomically."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iris.io.files import write_json
from iris.io.machine import host_name

STATUS = "status.json"


class Status:
    """Writes ``status.json`` of a trial or stage; at most twice a second, except when the phase changes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / STATUS
        self._phase, self._written = "", 0.0

    def __call__(self, phase: str, state: str = "running", **facts: Any) -> None:
        """Say ``phase`` and ``facts`` (step, steps, loss, images_per_s, eta_s, …)."""
        now = time.monotonic()
        if phase == self._phase and state == "running" and now - self._written < 0.5:
            return
        self._phase, self._written = phase, now
        write_json(
            self.path,
            {"state": state, "phase": phase, "pid": os.getpid(), "host": host_name(), "time": time.time(), **facts},
            durable=False,
        )

    def training(self, phase: str, row: Mapping[str, float], batch: int) -> None:
        """Say how a training loop goes, from a row of its metrics."""
        left = (row["steps"] - row["step"]) * batch / max(row["images_per_s"], 1e-9)
        facts = {k: row[k] for k in ("step", "steps", "loss", "images_per_s", "psnr") if k in row}
        self(phase, **facts, eta_s=left)


class StatusProgress:
    """What stages say goes to the log, how far they are to a status.

    Args:
        status: None: to nobody, as the first of several processes tells it.
    """

    def __init__(self, status: Status | None) -> None:
        self.status = status

    def say(self, text: str) -> None:
        """A line of the log."""
        if self.status is not None:
            print(text, flush=True)

    def done(self, work: str, count: int, total: int | None = None) -> None:
        """``work`` has come to ``count`` of ``total``."""
        if self.status is not None:
            self.status(work, **({"step": count, "steps": total} if total else {}))

    def training(self, work: str, row: Mapping[str, float], batch: int) -> None:
        """How a training loop goes."""
        if self.status is not None:
            self.status.training(work, row, batch)
