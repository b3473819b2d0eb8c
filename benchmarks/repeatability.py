"""Does a ratio of two mixers come out the same twice? ``uv run python -m benchmarks.repeatability``.

One generator evaluation of IRIS tiny with each mixer, in turn, in fresh processes; the whole measurement is done twice
on the machine as it is, and twice with processes beside it that keep all its processors busy. Writes
reports/repeatability.md. Run it on a quiet machine: rows measured on another are marked.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.presets import command
from eval.speed.latency import LatencyResult, few_rounds, measure_latency
from iris.io.machine import processor_name
from eval.speed.workers import Loader

TARGET = 0.10  # of the ratio
OUT = Path("reports/repeatability.md")


@dataclass(frozen=True)
class Pair:
    """Two measurements of the second mixer against the first, one condition of the machine."""

    condition: str
    runs: tuple[LatencyResult, LatencyResult]

    @property
    def difference(self) -> float:
        """Between the two ratios of wall time, as a share of the first."""
        return abs(self.runs[1].ratio_to_first / self.runs[0].ratio_to_first - 1)

    @property
    def processor_difference(self) -> float:
        """The same of processor time."""
        return abs(self.runs[1].processor_ratio / self.runs[0].processor_ratio - 1)


def measure(mixers: Sequence[str], preset: str, rounds: int, warmup: int) -> LatencyResult:
    """The second mixer's times, with ratios to the first's, on one thread."""
    loaders = {
        name: Loader(
            "eval.models.loading:load_for_measuring",
            {"preset": preset, "changes": {"mixer": name}, "part": "generator"},
        )
        for name in mixers
    }
    return measure_latency(loaders, rounds, warmup, threads=1, timeout=1200.0)[mixers[1]]


@contextmanager
def busy(count: int) -> Iterator[None]:
    """``count`` processes that compute all the time."""
    others = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def page(pairs: Sequence[Pair], given: argparse.Namespace) -> str:
    """The report."""
    first, second = given.mixers
    lines = [
        "# Repeatability of a latency ratio",
        "",
        f"`{command('benchmarks.repeatability')}` on {processor_name()}, one thread of {os.cpu_count()}, torch "
        f"{torch.__version__}. {second} over {first}: one generator evaluation of IRIS {given.preset} at 256x256, "
        f"drawn weights, float32; the median of {given.rounds} rounds, in each of which the two run in turn. Each run "
        f"is in fresh processes. Target: two runs' ratios differ by at most {TARGET:.0%}.",
        "",
        "| machine | run | ratio of wall time (quartiles) | of processor time | wall time, ms | contended |",
        "|---|---|---|---|---|---|",
    ]
    for pair in pairs:
        for number, one in enumerate(pair.runs, 1):
            reasons = "; ".join(one.reasons) if one.contended else "no"
            lines.append(
                f"| {pair.condition} | {number} | {one.ratio_to_first:.3f} ({one.ratio_q1:.3f} to "
                f"{one.ratio_q3:.3f}) | {one.processor_ratio:.3f} | {one.median_ms:.0f} | {reasons} |"
            )
    lines += ["", few_rounds(given.rounds), ""] if few_rounds(given.rounds) else [""]
    for pair in pairs:
        met = "met" if pair.difference <= TARGET else "missed"
        lines.append(
            f"- {pair.condition}: the two ratios differ by {pair.difference:.1%} (target {met}), those of "
            f"processor time by {pair.processor_difference:.1%}."
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.repeatability", description=__doc__)
    parser.add_argument("--mixers", nargs=2, default=["attention", "grfm"])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()

    def pair(condition: str) -> Pair:
        return Pair(condition, tuple(measure(given.mixers, given.preset, given.rounds, given.warmup) for _ in range(2)))

    pairs = [pair("as it is")]
    with busy(os.cpu_count() or 1):
        pairs.append(pair(f"with {os.cpu_count()} busy processes beside"))
    text = page(pairs, given)
    print(text)
    given.out.write_text(text)


if __name__ == "__main__":
    main()
