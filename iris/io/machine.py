"""What this process computes on. Imports no torch until it is asked for a device."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path
from typing import Any

from iris.errors import SettingError


def processor_name() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def host_name() -> str:
    """This node as the cluster calls it, or this machine's name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def device_named(wanted: str, setting: str = "device") -> str:
    """The device that a setting names: cpu, cuda, mps, or auto for the best that there is.

    Raises:
        SettingError: this machine has none.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, found in there.items() if found)
    if not there.get(wanted):
        found = ", ".join(name for name, one in there.items() if one)
        raise SettingError(f"{setting}={wanted}: there is none on this machine; there is {found}")
    return wanted


def environment(device: Any = "cpu") -> dict[str, Any]:
    """What a result was made on, for the record.

    Args:
        device: a torch device, or its name.
    """
    import torch

    kind = torch.device(device)
    name = torch.cuda.get_device_name(kind) if kind.type == "cuda" else kind.type
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": processor_name(),
        "host": platform.node(),
        "python": platform.python_version(),
        "device": name,
    }
