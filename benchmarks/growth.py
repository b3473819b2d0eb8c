"""Time and memory of every mixer against the number of tokens: ``uv run python -m benchmarks.growth``.

One forward of one mixer at batch 1, from 8x8 to 128x128 tokens, all mixers in turn, each in a process of its own. On
one thread the quoted time is the processor's, which other processes do not lengthen. Writes reports/growth.md and its
figure.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes

from ablations.report.charts import STYLE, log_axis, new_figure
from ablations.report.palette import DASHES, HUES, MARKERS
from benchmarks.presets import command
from eval.speed.growth import Curve, growth_table, measure_growth
from eval.speed.workers import Loader
from iris.io.machine import processor_name
from iris.nn.mixers import MIXERS

REFERENCE = "attention"
SIDES = (8, 16, 32, 64, 128)
FITTED = 3  # largest sizes that the exponent is fitted to
OUT = Path("reports/growth.md")


def measure(
    mixers: Sequence[str], sides: Sequence[int], dim: int, heads: int, rounds: int, budget_s: float
) -> dict[str, Curve]:
    """Curves by mixer, on one thread."""
    given = {"dim": dim, "heads": heads, "sides": list(sides)}
    loaders = {name: Loader("eval.models.loading:load_mixer", {"mixer": name, **given}) for name in mixers}
    return measure_growth(loaders, [side * side for side in sides], rounds, threads=1, budget_s=budget_s)


def memory_table(curves: Mapping[str, Curve]) -> list[str]:
    """Peak of live tensors by tokens, MB."""
    sizes = sorted({size for curve in curves.values() for size in curve.activations_mb})
    lines = [f"| MB | {' | '.join(f'{size:,}' for size in sizes)} |", f"|---{'|---' * len(sizes)}|"]
    for name, curve in curves.items():
        cells = [f"{curve.activations_mb[size]:.2f}" if size in curve.activations_mb else "skipped" for size in sizes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def draw(curves: Mapping[str, Curve], path: Path) -> None:
    """Both axes logarithmic, a line a mixer with its name at its end; ``path`` without suffix gets .svg and .png."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": path.name}):
        figure = new_figure(4.4, 6.4)
        axes = figure.add_subplot()
        ends = {}
        for number, (name, curve) in enumerate(sorted(curves.items(), key=lambda item: item[0] != REFERENCE)):
            sizes, times = zip(*sorted(curve.milliseconds.items()), strict=True)
            turn, hue = divmod(number - 1, len(HUES) - 1)
            colour, dash, width = (HUES[0], DASHES[0], 2) if name == REFERENCE else (HUES[hue + 1], DASHES[turn], 1.5)
            axes.plot(
                sizes,
                times,
                color=colour,
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                linestyle=dash,
                linewidth=width,
            )
            ends[name] = (sizes[-1], times[-1], colour)
        axes.set_xscale("log", base=2)
        log_axis(axes, "y", [time for curve in curves.values() for time in curve.milliseconds.values()])
        shown = sorted({size for curve in curves.values() for size in curve.latency})
        axes.set_xticks(shown, [f"{size:,}" for size in shown])
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        axes.set_ylabel("processor time of one forward, ms")
        _label(axes, ends)
        for suffix, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 200})):
            figure.savefig(path.with_suffix(suffix), **options)


def _label(axes: Axes, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Names at the right, moved apart until none covers another."""
    low, high = (math.log(value) for value in axes.get_ylim())
    line, right = (high - low) * 0.045, max(x for x, _, _ in ends.values())
    order = sorted(ends, key=lambda name: ends[name][1])
    places = [math.log(ends[name][1]) for name in order]
    for _ in range(200):
        for i in range(1, len(places)):
            push = max(0.0, places[i - 1] + line - places[i]) / 2
            places[i - 1], places[i] = places[i - 1] - push, places[i] + push
    for name, place in zip(order, places, strict=True):
        axes.annotate(
            name,
            (right, math.exp(place)),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=ends[name][2],
            annotation_clip=False,
        )


def report(curves: Mapping[str, Curve], given: argparse.Namespace) -> str:
    """The page."""
    since = sorted(given.sides)[-FITTED:][0] ** 2
    skipped = [
        f"{name} at {size:,} tokens: {why}" for name, curve in curves.items() for size, why in curve.skipped.items()
    ]
    reasons = worst([why for curve in curves.values() for one in curve.latency.values() for why in one.reasons])
    return "\n".join(
        [
            "# Growth with the number of tokens",
            "",
            f"`{command('benchmarks.growth')}` on {processor_name()}, one thread, torch {torch.__version__}. One forward of "
            f"one mixer, {given.dim} channels, {given.heads} heads, batch 1, float32; the median of {given.rounds} rounds, "
            "in each of which all mixers run in turn. Milliseconds of processor time, so that other processes do not count "
            "but for what they take of caches and of memory's bandwidth. The exponent p of tokens^p is fitted by least "
            f"squares to the logarithms from {since:,} tokens on, ± its standard error from the residuals; crossovers are "
            "interpolated in the logarithms of both.",
            "",
            *growth_table(curves, REFERENCE, since),
            "",
            *([f"(c): contended; at most: {'; '.join(reasons)}.", ""] if reasons else []),
            *([f"Skipped: {'; '.join(skipped)}.", ""] if skipped else []),
            f"![time against tokens]({given.out.with_suffix('.png').name})",
            "",
            "Peak of the tensors alive in the same forward, the input not counted:",
            "",
            *memory_table(curves),
            "",
        ]
    )


def worst(reasons: Sequence[str]) -> list[str]:
    """Of each kind of reason, told by its first three words, the one with the largest figure."""
    ascending = sorted(reasons, key=lambda why: float(re.search(r"\d+(\.\d+)?", why)[0]))
    return list({tuple(why.split()[:3]): why for why in ascending}.values())


def main() -> None:
    """Measure, print, write the page and the figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS))
    parser.add_argument("--sides", nargs="+", type=int, default=list(SIDES))
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds that one forward may be predicted to take")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    mixers = list(dict.fromkeys([REFERENCE, *given.mixers]))
    curves = measure(mixers, sorted(given.sides), given.dim, given.heads, given.rounds, given.budget)
    text = report(curves, given)
    print(text)
    given.out.write_text(text)
    # the identity takes a microsecond whatever the size, and would flatten all others
    draw({name: curve for name, curve in curves.items() if name != "identity"}, given.out.with_suffix(""))


if __name__ == "__main__":
    main()
