"""Floating-point operations of one call, with the FFTs and scans that torch's own counter takes for zero."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iris.nn import scan

NOT_WRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "unsafe_view"}
SCAN_OPERATIONS = 3  # per element: multiply and add along the tokens, and the product of decays across chunks
aten = torch.ops.aten


@dataclass(frozen=True)
class Flops:
    """Operations of one call; one multiply-add counts as two.

    ``by_op``: operation -> count, largest first. ``uncounted``: operation -> bytes written by operations that have no
    formula (elementwise, norms, copies): they cost memory traffic that no FLOP count shows.
    """

    total: int
    by_op: dict[str, int]
    uncounted: dict[str, int]

    @property
    def gflops(self) -> float:
        """Operations in units of 10^9."""
        return self.total / 1e9


def count_flops(fn: Callable[[], Any]) -> Flops:
    """Run ``fn`` once and count its operations.

    Matrix products, convolutions and attention are counted by torch's FlopCounterMode, real FFTs as 2.5 n log2 n and
    complex ones as 5 n log2 n for n points a transform, and the linear recurrence of ``iris.nn.scan`` as 3 an element.
    Operations inside a compiled graph are not seen.
    """
    from torch.utils.flop_counter import FlopCounterMode  # takes 70 MB where triton is installed; a plan counts nothing

    scanned = Counter[str]()

    def observe(shape: torch.Size) -> None:
        scanned["linear_scan"] += SCAN_OPERATIONS * math.prod(shape)

    counter = FlopCounterMode(display=False, custom_mapping=FFT_FORMULAS)
    traffic = _Traffic(counter.flop_registry)
    scan.OBSERVERS.append(observe)
    try:
        with traffic, counter:
            fn()
    finally:
        scan.OBSERVERS.remove(observe)
    by_op = {_name(op): int(count) for op, count in counter.get_flop_counts().get("Global", {}).items() if count}
    by_op.update(scanned)
    by_op = dict(sorted(by_op.items(), key=lambda item: -item[1]))
    return Flops(sum(by_op.values()), by_op, dict(traffic.bytes.most_common()))


def _name(op: Any) -> str:
    return str(op).removeprefix("aten.").removeprefix("_")


def _points(shape: tuple[int, ...], dims: list[int]) -> int:
    return math.prod(shape[d] for d in dims)


def _fft_cost(shape: tuple[int, ...], dims: list[int], each: float) -> int:
    """each * n log2 n for every transform of n points, over the real-space (largest) shape."""
    return int(each * math.prod(shape) * math.log2(max(_points(shape, dims), 1)))


def _r2c_flop(shape, dim, *args, out_shape=None, **kwargs) -> int:
    return _fft_cost(shape, dim, 2.5)


def _c2r_flop(shape, dim, *args, out_shape=None, **kwargs) -> int:
    return _fft_cost(out_shape, dim, 2.5)


def _c2c_flop(shape, dim, *args, out_shape=None, **kwargs) -> int:
    return _fft_cost(shape, dim, 5.0)


FFT_FORMULAS = {aten._fft_r2c: _r2c_flop, aten._fft_c2r: _c2r_flop, aten._fft_c2c: _c2c_flop}


class _Traffic(TorchDispatchMode):
    """Bytes written by operations without a formula."""

    def __init__(self, counted: dict[Any, Any]) -> None:
        super().__init__()
        self.counted = counted
        self.bytes = Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = getattr(func, "_overloadpacket", func)
        # a view writes nothing, though its output looks like a tensor of full size
        if packet not in self.counted and not getattr(func, "is_view", False) and _name(packet) not in NOT_WRITTEN:
            written = sum(t.numel() * t.element_size() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            if written:
                self.bytes[_name(packet)] += written
        return out
