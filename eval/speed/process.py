"""What the kernel says about this process and machine: memory and processor time. Imports nothing but Python."""

from __future__ import annotations

import os
from pathlib import Path

MB = 1e6


def resident_mb(field: str = "VmHWM") -> float | None:
    """Resident memory of this process in MB (10^6 bytes); None where there is no /proc.

    ``VmHWM`` is the peak, ``VmRSS`` the present. Unlike ``ru_maxrss``, VmHWM does not start from the peak of the
    process that forked this one.
    """
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / MB
    return None


def reset_peak() -> bool:
    """Set VmHWM back to the present resident memory; False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def processor_seconds(pid: int) -> float:
    """Processor time that a process has used, its threads included; 0 when it is gone or there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def machine_seconds() -> tuple[float, float] | None:
    """(busy, stolen) processor seconds of the whole machine since boot; None where there is no /proc/stat."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(v) for v in fields[:8])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / tick, steal / tick
