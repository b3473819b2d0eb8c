"""What the kernel and the dispatcher say about this process and machine: memory, processor time, live tensors."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class ActivationTracker(TorchDispatchMode):
    """Peak bytes of the tensors made and still alive inside the context, exact and the same on every machine.

    Storages are followed by weak references. One that an operation takes before any made it (weights, inputs) is
    foreign and counts nothing, nor does a view of it. Scratch memory inside a kernel is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, Any] = {}

    def _watch(self, tensor: Tensor, own: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if own else 0

        def freed(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._watch(leaf, own=False)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._watch(leaf, own=True)
        return out
