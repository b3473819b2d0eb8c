"""Where an answer comes from: the command, the commit, the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from iris.io.command import written
from iris.io.machine import processor_name


def hardware(threads: int) -> dict[str, Any]:
    """What this machine is, for the record."""
    import psutil
    import torch

    return {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": "cpu",
        "torch": torch.__version__,
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "python": platform.python_version(),
    }


def commit() -> str:
    """The git commit, "+changes" appended when the tree is dirty, or "unknown"."""
    root = Path(__file__).parents[1]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", ".", "../iris", "../eval")
        return git("rev-parse", "--short=10", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def command() -> str:
    """What the user typed, as a shell takes it."""
    return written(sys.argv[1:], "ablations.run")
