"""What the kernel and the dispatcher say about this process and machine: memory, processor time, live tensors."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eval.speed.process import MB, machine_seconds, processor_seconds, reset_peak, resident_mb

__all__ = ["MB", "ActivationTracker", "machine_seconds", "processor_seconds", "reset_peak", "resident_mb"]


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

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch's question; its default imports torch._dynamo on first use, 1.6 s that no measured model needs."""
        return False

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
