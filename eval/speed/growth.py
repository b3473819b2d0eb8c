"""How a model's time and memory grow with its number of tokens, several models against each other.

Each model's process offers its work on several sizes as parts named by the number of tokens, "64", "256", …
(``eval.speed.workers.Loader``). Sizes go up; at each, models are timed in turn, there and back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import linregress

from eval.speed.latency import LatencyResult, Timed, interleave
from eval.speed.parts import repeat_for
from eval.speed.workers import Loader, Worker

ALWAYS, NEVER = "at every size", "at no size"


@dataclass(frozen=True)
class Curve:
    """One model's figures by number of tokens, ascending; ``skipped`` says why a size has none."""

    latency: dict[int, LatencyResult] = field(default_factory=dict)
    activations_mb: dict[int, float] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)

    @property
    def milliseconds(self) -> dict[int, float]:
        """The time that is quoted: processor time, which others do not lengthen on one thread; on CUDA the wall's."""
        return {
            tokens: one.median_ms if one.device.startswith("cuda") else one.processor_ms
            for tokens, one in self.latency.items()
        }


@dataclass(frozen=True)
class Exponent:
    """time ~ tokens^value, fitted by least squares to the logarithms of ``points`` sizes from ``since`` tokens on.

    ``error`` is the slope's standard error from the residuals: how far the curve is from a power, not clock noise.
    """

    value: float
    error: float
    points: int
    since: int


@dataclass(frozen=True)
class Crossover:
    """From how many tokens on a model takes less time than the reference, for good.

    ``tokens``: interpolated between two sizes in the logarithms of both; None where ``where`` says that it is cheaper
    at every size measured, or at no size up to the largest.
    """

    tokens: float | None
    where: str


def measure_growth(
    loaders: Mapping[str, Loader],
    tokens: Sequence[int],
    rounds: int = 7,
    warmup: int = 1,
    threads: int = 1,
    budget_s: float = 60.0,
    timeout: float = 600.0,
) -> dict[str, Curve]:
    """Time and peak of live tensors of each model at each size.

    Args:
        loaders: name -> loader of a model with one part for each number of tokens.
        tokens: sizes, ascending.
        rounds, warmup, threads, timeout: as ``eval.speed.latency.measure_models``.
        budget_s: a size is skipped for a model if one run is predicted to take longer: by the growth between its last
            two sizes, or quadratic growth from the only one.

    Raises:
        ValueError: no models; sizes that do not ascend or of which a model has no part; rounds below 2, a negative
            warmup, or a budget that is not positive.
        WorkerError: a model failed.
    """
    if not loaders or not tokens or list(tokens) != sorted(set(tokens)) or rounds < 2 or warmup < 0 or budget_s <= 0:
        raise ValueError(
            f"loaders must not be empty, tokens ascend, rounds >= 2, warmup >= 0 and budget_s > 0, got "
            f"{len(loaders)} loaders, {list(tokens)}, {rounds}, {warmup} and {budget_s}"
        )
    curves = {name: Curve() for name in loaders}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(name, loader, threads, timeout)) for name, loader in loaders.items()
        }
        for name, worker in workers.items():
            if missing := [str(size) for size in tokens if str(size) not in worker.loaded["parts"]]:
                raise ValueError(f"{name} has no part for {', '.join(missing)} tokens")
        for size in tokens:
            chosen = [name for name in workers if _affordable(curves[name], size, budget_s)]
            timed = [Timed(workers[name], str(size), repeat_for(workers[name], str(size))) for name in chosen]
            results = interleave(timed, rounds, warmup, threads) if timed else []
            for name, one in zip(chosen, results, strict=True):
                curves[name].latency[size] = one
                curves[name].activations_mb[size] = workers[name].ask("activations", part=str(size))["activations_mb"]
    return curves


def _affordable(curve: Curve, size: int, budget_s: float) -> bool:
    seconds = predicted_seconds({tokens: one.median_ms / 1000 for tokens, one in curve.latency.items()}, size)
    if curve.skipped:
        curve.skipped[size] = "a smaller size was skipped"
    elif seconds > budget_s:
        curve.skipped[size] = f"predicted to take {seconds:.0f} s, more than {budget_s:g} s"
    return size not in curve.skipped


def predicted_seconds(known: Mapping[int, float], size: int) -> float:
    """Seconds at ``size`` from those of smaller ones: a power through the last two, at least linear; 0 from none."""
    if not known:
        return 0.0
    sizes = sorted(known)[-2:]
    power = 2.0
    if len(sizes) == 2 and min(known[s] for s in sizes) > 0:
        power = max(1.0, math.log(known[sizes[1]] / known[sizes[0]]) / math.log(sizes[1] / sizes[0]))
    return known[sizes[-1]] * (size / sizes[-1]) ** power


def fit_exponent(milliseconds: Mapping[int, float], since: int) -> Exponent | None:
    """The growth of times by number of tokens from ``since`` on; None with fewer than three sizes or a time of 0."""
    sizes = [size for size in sorted(milliseconds) if size >= since]
    if len(sizes) < 3 or min(milliseconds[size] for size in sizes) <= 0:
        return None
    fit = linregress(np.log(sizes), np.log([milliseconds[size] for size in sizes]))
    return Exponent(float(fit.slope), float(fit.stderr), len(sizes), sizes[0])


def crossover(milliseconds: Mapping[int, float], reference: Mapping[int, float]) -> Crossover:
    """Where a model's times fall below the reference's, by sizes that both have.

    Raises:
        ValueError: they have no size in common, or a time is not positive.
    """
    sizes = sorted(set(milliseconds) & set(reference))
    if not sizes or min(min(milliseconds[s], reference[s]) for s in sizes) <= 0:
        raise ValueError(
            f"crossover needs positive times at common sizes, got {dict(milliseconds)} and {dict(reference)}"
        )
    ratios = np.log([milliseconds[size] / reference[size] for size in sizes])
    if ratios[-1] >= 0:
        return Crossover(None, NEVER)
    dearer = np.flatnonzero(ratios >= 0)
    if not len(dearer):
        return Crossover(None, ALWAYS)
    before = dearer[-1]
    low, high = math.log(sizes[before]), math.log(sizes[before + 1])
    share = ratios[before] / (ratios[before] - ratios[before + 1])
    return Crossover(math.exp(low + share * (high - low)), "between")


def growth_table(curves: Mapping[str, Curve], reference: str, since: int) -> list[str]:
    """Markdown: milliseconds by tokens, the exponent with its standard error, and the crossover with ``reference``."""
    sizes = sorted({size for curve in curves.values() for size in (*curve.latency, *curve.skipped)})
    lines = [
        f"| | {' | '.join(f'{size:,}' for size in sizes)} | exponent from {since:,} | cheaper than {reference} |",
        f"|---{'|---' * len(sizes)}|---|---|",
    ]
    for name, curve in curves.items():
        times = curve.milliseconds
        cells = [_marked(f"{times[size]:.3g}", curve.latency[size]) if size in times else "skipped" for size in sizes]
        fit = fit_exponent(times, since)
        power = "-" if fit is None else f"{fit.value:.2f} ± {fit.error:.2f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {power} | {_crossing(curves, name, reference)} |")
    return lines


def _marked(text: str, one: LatencyResult) -> str:
    return f"{text} (c)" if one.contended else text


def _crossing(curves: Mapping[str, Curve], name: str, reference: str) -> str:
    if name == reference:
        return "-"
    found = crossover(curves[name].milliseconds, curves[reference].milliseconds)
    if found.tokens is not None:
        return f"from {found.tokens:,.0f} tokens"
    largest = max(set(curves[name].latency) & set(curves[reference].latency))
    return found.where if found.where == ALWAYS else f"none up to {largest:,}"
