"""What GRFM's gates do while images are made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from iris.nn.generator import Generator


@contextmanager
def record_gates(generator: Generator, iterations: int) -> Iterator[list[dict[str, Any]]]:
    """Collects the mean weight of each GRFM pathway at every pass of the core.

    Yields a list filled, one entry a core layer, with {"layer": i, "iterations": [{"iteration": k, "fourier": …}, …]}
    averaged over all generator evaluations made inside the context, each of ``iterations`` passes; empty when the mixer
    has no gates.
    """
    layers: list[dict[str, Any]] = []
    seen = {layer.mixer: [] for layer in generator.core if hasattr(layer.mixer, "observe")}
    for mixer, values in seen.items():
        mixer.observe = values.append
    try:
        yield layers
    finally:
        for mixer in seen:
            mixer.observe = None
    for index in range(generator.config.core if seen else 0):
        passes = [_values(generator, seen, index, k, iterations) for k in range(iterations)]
        rows = [
            {"iteration": k + 1} | {name: sum(v[name] for v in group) / len(group) for name in group[0]}
            for k, group in enumerate(passes)
            if group
        ]
        layers.append({"layer": index, "iterations": rows})


def _values(
    generator: Generator, seen: dict[nn.Module, list[dict[str, float]]], index: int, k: int, iterations: int
) -> list[dict[str, float]]:
    """What layer ``index`` of the core said at pass ``k`` of each evaluation."""
    if generator.config.depth.share:
        return seen[generator.core[index].mixer][k::iterations]
    return seen[generator.core[k * generator.config.core + index].mixer]
