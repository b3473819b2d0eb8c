"""The linear recurrence against a loop and a linear layer, forward and backward: ``python benchmarks/scan.py [threads]``.

Prints ratios of medians; rounds are interleaved, so that a drift of the machine's speed meets all of them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from iris.nn.scan import linear_scan, sequential_scan


def indexed_loop(a: Tensor, b: Tensor) -> Tensor:
    """The loop as one writes it first: indexing under autograd."""
    state, states = torch.zeros_like(b[:, 0]), []
    for t in range(a.shape[1]):
        state = a[:, t] * state + b[:, t]
        states.append(state)
    return torch.stack(states, 1)


def main() -> None:
    """Measure at [8, 256, 384]."""
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    a = torch.rand(8, 256, 384, requires_grad=True)
    b = torch.randn(8, 256, 384, requires_grad=True)
    layer = torch.nn.Linear(384, 384)
    runs: dict[str, Callable[[], Tensor]] = {
        "linear_scan": lambda: linear_scan(a, b),
        "loop, unbind + addcmul": lambda: sequential_scan(a, b),
        "loop, indexed": lambda: indexed_loop(a, b),
        "Linear(384, 384)": lambda: layer(b),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(12):
        for name, run in runs.items():
            started = time.perf_counter()
            run().sum().backward()
            times[name].append(time.perf_counter() - started)
    base = statistics.median(times["linear_scan"][2:])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), [8, 256, 384] float32, forward + backward")
    for name, values in times.items():
        median = statistics.median(values[2:])
        print(f"{name:24} {median * 1e3:8.1f} ms   {median / base:6.2f} x linear_scan")


if __name__ == "__main__":
    main()
