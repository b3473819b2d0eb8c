"""How a job says where it is: one small JSON file, replaced atomically."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from iris.io.files import write_json

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

    def training(self, phase: str, row: dict[str, float], batch: int) -> None:
        """Say how a training loop goes, from a row of its metrics."""
        left = (row["steps"] - row["step"]) * batch / max(row["images_per_s"], 1e-9)
        facts = {k: row[k] for k in ("step", "steps", "loss", "images_per_s", "psnr") if k in row}
        self(phase, **facts, eta_s=left)


def host_name() -> str:
    """This node as the cluster calls it, or this machine's name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
