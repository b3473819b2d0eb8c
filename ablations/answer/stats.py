"""Every arm against the baseline, on plain numbers: intervals that count seed noise, and one word for each.

Training an arm again with another seed moves FID about three times more than drawing other samples from it ("The FID
Lottery", arXiv 2606.20536), so the noise that decides is the spread between seeds. Ratio-like metrics (FID, latency)
are compared on the log scale, where the seed noise is a percentage shared by good and bad arms. How wide an interval
must be is in ``ablations.answer.intervals``; a word is decided by an interval and the margin, here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from ablations.answer.intervals import LEVEL, Design, level_of, noise_range, widths

BETTER, WORSE, EQUIVALENT, WITHIN_NOISE = "better", "worse", "equivalent", "within noise"
NOT_BETTER, NOT_WORSE = "not better", "not worse"
NOT_ENOUGH_SEEDS, FAILED, NOT_COMPARABLE = "not enough seeds", "failed", "not comparable"
NOT_ENOUGH_ROUNDS = "not enough rounds"  # of a measurement of speed
LOG_METRICS = frozenset(
    {
        "fid",
        "fid_reference",
        "latency_ms",
        "latency_ratio",
        "peak_memory_mb",
        "weights_mb",
        "activations_mb",
        "params_m",
        "gflops",
        "validation_loss",
        "train_seconds",
    }
)
BLOCK_LEVEL = 0.05  # evidence of a shared seed effect needed before pairing replaces pooling
OWN_MEAN = 0.15  # of an arm's interval by its own spread; it is the wider of this and the pooled one at LEVEL

Values = Mapping[str, Mapping[int, float]]  # arm -> seed -> value


@dataclass(frozen=True)
class Noise:
    """Seed noise of a set of arms, in working units (log units or the metric's own)."""

    method: str  # pooled | paired | none | rounds (of a measurement that no seed changes)
    sd: float | None  # standard deviation of one trial around its arm (paired: after the seed effect)
    df: int  # degrees of freedom of sd
    correlation: float | None  # between arms at equal seeds, None where it cannot be measured

    @property
    def range(self) -> tuple[float, float] | None:
        """Where the true standard deviation lies, by 90 %."""
        return None if self.sd is None else noise_range(self.sd, self.df)


@dataclass(frozen=True)
class ArmSummary:
    """One arm's value over its seeds; low and high are its own two-sided 95 % interval, None where unknown."""

    arm: str
    values: dict[int, float]
    mean: float | None  # geometric mean on the log scale
    low: float | None
    high: float | None
    sampling_only: bool  # the interval holds the metric's sampling error alone

    @property
    def half_width(self) -> float | None:
        """Half the interval's width, in the metric's units."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Comparison:
    """One arm against the baseline: arm minus baseline, as a fraction of it on the log scale, else in metric units.

    ``detectable``: how far beyond the margin a true gap is decided with 80 % power, in standard deviations of a trial.
    """

    arm: str
    verdict: str  # better | worse | equivalent | not better | not worse | within noise | not enough seeds | failed | …
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    method: str = "none"  # pooled | paired | sampling | rounds | none
    seeds: int = 0
    detectable: float | None = None


@dataclass(frozen=True)
class Analysis:
    """All arms of a grid compared with its baseline in one metric."""

    metric: str
    baseline: str
    better: str  # lower | higher
    scale: str  # log | linear
    margin: float  # what difference matters, in the units of Comparison.difference
    noise: Noise
    arms: dict[str, ArmSummary]
    comparisons: dict[str, Comparison]  # without the baseline
    failed: frozenset[str] = field(default_factory=frozenset)
    look: int = 1  # how often the data were looked at while seeds were added

    @property
    def seeds(self) -> int:
        """The fewest seeds of any arm that has values, 0 without values."""
        return min((len(a.values) for a in self.arms.values() if a.values), default=0)

    @property
    def working_margin(self) -> float:
        """The margin in working units."""
        return math.log1p(self.margin) if self.scale == "log" else self.margin

    def detectable(self, sd: float | None = None) -> float | None:
        """Smallest true gap that every comparison here decides with 80 % power, as in ``Comparison.difference``.

        None without an estimate of the noise. ``sd``: were this the standard deviation of a trial.
        """
        units = [c.detectable for c in self.comparisons.values() if c.detectable is not None]
        sd = self.noise.sd if sd is None else sd
        if not units or sd is None:
            return None
        gap = self.working_margin + sd * max(units)
        return math.expm1(gap) if self.scale == "log" else gap


def seed_blocks(tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two-way analysis of complete tables [..., arms, seeds] with an effect for each arm and for each seed.

    Returns the intraclass correlation of arms at equal seeds (ICC(3,1), Shrout & Fleiss 1979) and the p value of "seeds
    have no common effect" (F test), both [...].
    """
    arms, seeds = tables.shape[-2:]
    centred = tables - tables.mean(-1, keepdims=True)
    effect = centred.mean(-2, keepdims=True)
    df = (arms - 1) * (seeds - 1)
    within = ((centred - effect) ** 2).sum((-2, -1)) / df
    between = arms * (effect**2).sum((-2, -1)) / (seeds - 1)
    with np.errstate(invalid="ignore", divide="ignore"):  # no spread at all says nothing of seeds
        correlation = (between - within) / (between + (arms - 1) * within)
        p_value = stats.f.sf(between / within, seeds - 1, df)
    return np.nan_to_num(correlation), np.where(np.isnan(p_value), 1.0, p_value)


def word_of(low: float, high: float, margin: float) -> str:
    """The one word for an arm that is better than the baseline by something in [low, high]; negative is worse.

    "better" and "worse" are beyond the margin for sure, "equivalent" inside it for sure; "not better" and "not worse"
    are sure of one side alone. An interval that reaches beyond the margin on both sides is within noise.
    """
    not_better, not_worse = high < margin or high <= 0, low > -margin or low >= 0
    if low >= margin and low > 0:
        return BETTER
    if high <= -margin and high < 0:
        return WORSE
    if not_better and not_worse:
        return EQUIVALENT
    return NOT_BETTER if not_better else NOT_WORSE if not_worse else WITHIN_NOISE


def _finite(seeds: Mapping[int, float | None]) -> dict[int, float]:
    return {seed: float(v) for seed, v in seeds.items() if v is not None and math.isfinite(v)}


def _table(working: Values, arms: list[str]) -> tuple[np.ndarray, bool]:
    """Values [arms, seeds], NaN where there is none; and whether every arm has all seeds."""
    seeds = sorted(set().union(*(working[arm] for arm in arms)))
    table = np.array([[working[arm].get(seed, math.nan) for seed in seeds] for arm in arms])
    return table, bool(np.isfinite(table).all())


def measure_noise(table: np.ndarray, complete: bool) -> Noise:
    """The seed noise of arms with two values or more; paired where an F test (5 %) finds an effect of the seed.

    Args:
        table: [arms, seeds], NaN where there is no value.
        complete: every arm has all seeds.
    """
    correlation, paired = None, False
    if complete and len(table) > 1:
        correlation, p_value = (float(found) for found in seed_blocks(table))
        paired = p_value < BLOCK_LEVEL
    if len(table) == 1:
        values = table[0][np.isfinite(table[0])]
        return Noise("pooled", float(values.std(ddof=1)), len(values) - 1, None)
    found = widths(table[None], paired)
    return Noise("paired" if paired else "pooled", float(found.noise[0]), found.df, correlation)


def _summary(arm: str, values: dict[int, float], errors: Mapping[int, float], noise: Noise, log: bool) -> ArmSummary:
    """Mean and own interval: from the seed noise where there is an estimate, else from the sampling error."""
    if not values:
        return ArmSummary(arm, {}, None, None, None, False)
    working = [math.log(v) if log else v for v in values.values()]
    centre, count = float(np.mean(working)), len(values)
    show = math.exp if log else float
    own = float(np.std(working, ddof=1)) / math.sqrt(count) if count >= 2 else 0.0
    # A paired residual leaves the seed effect out, which a mean still carries; so each arm's own spread is used there.
    if noise.method == "paired" and count >= 2:
        half = stats.t.ppf(1 - LEVEL / 2, count - 1) * own
    elif noise.sd is not None and noise.method == "pooled":
        half = stats.t.ppf(1 - LEVEL / 2, noise.df) * noise.sd / math.sqrt(count)
        half = max(half, stats.t.ppf(1 - OWN_MEAN / 2, count - 1) * own) if count >= 2 else half
    else:
        error = _sampling_error(values, errors, log)
        if error is None:
            return ArmSummary(arm, values, show(centre), None, None, True)
        half = stats.norm.ppf(1 - LEVEL / 2) * error
        mean = show(centre)
        low, high = (mean * math.exp(-half), mean * math.exp(half)) if log else (mean - half, mean + half)
        return ArmSummary(arm, values, mean, low, high, True)
    return ArmSummary(arm, values, show(centre), show(centre - half), show(centre + half), False)


def _sampling_error(values: Mapping[int, float], errors: Mapping[int, float], log: bool) -> float | None:
    """Sampling standard error of the arm's mean, in working units; None when a seed has none."""
    known = _finite(errors)
    if not values or any(seed not in known for seed in values):
        return None
    parts = [known[seed] / value if log else known[seed] for seed, value in values.items()]
    return math.sqrt(sum(p * p for p in parts)) / len(parts)


def _undecided(
    arm: str, working: Values, baseline: str, errors: Mapping[str, float | None], count: int, noise: Noise, log: bool
) -> Comparison:
    """An arm or a baseline with one seed: what was seen, and sampling error or the others' noise around it."""
    ours, base = working[arm], working[baseline]
    show = math.expm1 if log else float
    shift, seeds = float(np.mean([*ours.values()]) - np.mean([*base.values()])), min(len(ours), len(base))
    if noise.sd is not None:
        half = stats.t.ppf(1 - LEVEL / (2 * count), noise.df) * noise.sd * math.sqrt(1 / len(ours) + 1 / len(base))
        method = noise.method
    elif errors[arm] is not None and errors[baseline] is not None:
        half = stats.norm.ppf(1 - LEVEL / (2 * count)) * math.hypot(errors[arm] or 0.0, errors[baseline] or 0.0)
        method = "sampling"
    else:
        return Comparison(arm, NOT_ENOUGH_SEEDS, show(shift), seeds=seeds)
    return Comparison(arm, NOT_ENOUGH_SEEDS, show(shift), show(shift - half), show(shift + half), method, seeds)


def _family(
    table: np.ndarray, arms: list[str], noise: Noise, margin: float, better: str, log: bool, level: float
) -> list[Comparison]:
    """Arms that have two seeds or more against a baseline that has, all intervals together at ``level``."""
    paired = noise.method == "paired"
    found = widths(table[None], paired, level)
    counts = tuple(int(n) for n in np.isfinite(table).sum(1))
    half = found.half(Design((counts[0], *sorted(counts[1:])), paired, level).critical)[0]
    show = math.expm1 if log else float
    comparisons = []
    for i, arm in enumerate(arms[1:]):
        shift, width = float(found.difference[0, i]), float(half[i])
        gain = (shift - width, shift + width) if better == "higher" else (-shift - width, -shift + width)
        first = (counts[0], counts[1 + i], *sorted(counts[1 : 1 + i] + counts[2 + i :]))
        comparisons.append(
            Comparison(
                arm,
                word_of(*gain, margin),
                show(shift),
                show(shift - width),
                show(shift + width),
                noise.method,
                min(counts[0], counts[1 + i]),
                Design(first, paired, level).gap,
            )
        )
    return comparisons


def _decide(
    working: Values, baseline: str, margin: float, better: str, log: bool, level: float
) -> tuple[Noise, dict[str, Comparison]]:
    """The seed noise of all arms with two seeds or more, and their comparisons if the baseline is one of them."""
    family = sorted((arm for arm in working if len(working[arm]) >= 2), key=lambda arm: arm != baseline)
    if not family:
        return Noise("none", None, 0, None), {}
    table, complete = _table(working, family)
    noise = measure_noise(table, complete)
    if family[0] != baseline or len(family) == 1:
        return noise, {}
    return noise, {c.arm: c for c in _family(table, family, noise, margin, better, log, level)}


def analyse_measured(
    values: Mapping[str, float | None],
    ratios: Mapping[str, tuple[float, float]],
    baseline: str,
    *,
    metric: str,
    better: str,
    practical: float,
    failed: Collection[str] = (),
) -> Analysis:
    """Compares what was measured of each arm's network once, whatever its seeds: speed and memory.

    ``ratios``: arm -> the interval of its ratio to the baseline, with equal ends where the figure is exact; an arm that is
    missing was measured in too few rounds. Raises ValueError as ``analyse`` does.
    """
    _check(values, baseline, better, practical, "log")
    base, margin, sign = values[baseline], math.log1p(practical), 1 if better == "higher" else -1
    comparisons = {}
    for arm in (arm for arm in values if arm != baseline):
        value = values[arm]
        if arm in failed:
            comparisons[arm] = Comparison(arm, FAILED)
        elif not value or not base:
            comparisons[arm] = Comparison(arm, NOT_COMPARABLE)
        elif arm not in ratios:
            comparisons[arm] = Comparison(arm, NOT_ENOUGH_ROUNDS, value / base - 1)
        else:
            low, high = ratios[arm]
            gain = sorted(sign * math.log(end) for end in (low, high))
            comparisons[arm] = Comparison(
                arm, word_of(gain[0], gain[1], margin), value / base - 1, low - 1, high - 1, "rounds"
            )
    arms = {arm: ArmSummary(arm, {} if v is None else {0: v}, v, None, None, False) for arm, v in values.items()}
    noise = Noise("rounds", None, 0, None)
    return Analysis(metric, baseline, better, "log", practical, noise, arms, comparisons, frozenset(failed))


def _check(values: Collection[str], baseline: str, better: str, practical: float, scale: str | None) -> None:
    if better not in ("lower", "higher"):
        raise ValueError(f"decide.better must be lower or higher, got {better!r}")
    if scale not in (None, "log", "linear"):
        raise ValueError(f"scale must be log or linear, got {scale!r}")
    if practical < 0:
        raise ValueError(f"decide.practical must not be negative, got {practical}")
    if baseline not in values:
        raise ValueError(f"baseline {baseline!r} is none of the arms: {', '.join(values)}")


def analyse(
    values: Mapping[str, Mapping[int, float | None]],
    baseline: str,
    *,
    metric: str = "fid",
    better: str = "lower",
    practical: float = 0.05,
    errors: Mapping[str, Mapping[int, float]] | None = None,
    failed: Collection[str] = (),
    scale: str | None = None,
    look: int = 1,
) -> Analysis:
    """Compares every arm with the baseline.

    ``values``: arm -> seed -> value (missing or not finite: left out); ``errors``: the same shape, the sampling
    standard error of each value; ``failed``: arms of which no trial finished; ``practical``: the difference that
    matters, as a fraction of the baseline; ``look``: how often the data were looked at, this time included, while seeds were
    added. Intervals are two-sided and hold together in 95 % of grids, at a further look in more (``level_of``).
    Raises ValueError for an unknown direction or scale, a negative ``practical`` and a baseline that is no arm.
    """
    _check(values, baseline, better, practical, scale)
    clean = {arm: _finite(seeds) for arm, seeds in values.items()}
    positive = all(v > 0 for seeds in clean.values() for v in seeds.values())
    log = positive if scale is None and metric in LOG_METRICS else scale == "log"
    if log and not positive:
        raise ValueError(f"scale log needs positive values of {metric}")
    working = {arm: {s: math.log(v) if log else v for s, v in seeds.items()} for arm, seeds in clean.items()}
    centre = abs(float(np.mean(list(clean[baseline].values())))) if clean[baseline] else 0.0
    margin = practical if log else practical * centre
    beyond = math.log1p(margin) if log else margin
    noise, found = _decide(working, baseline, beyond, better, log, level_of(look))
    errors = errors or {}
    sampling = {arm: _sampling_error(clean[arm], errors.get(arm, {}), log) for arm in values}
    count = max(1, sum(bool(clean[arm]) for arm in values) - 1)
    comparisons = {}
    for arm in (arm for arm in values if arm != baseline):
        if arm in found:
            comparisons[arm] = found[arm]
        elif arm in failed:
            comparisons[arm] = Comparison(arm, FAILED)
        elif not clean[arm] or not clean[baseline]:
            comparisons[arm] = Comparison(arm, NOT_COMPARABLE, seeds=len(clean[arm]))
        else:
            comparisons[arm] = _undecided(arm, working, baseline, sampling, count, noise, log)
    arms = {arm: _summary(arm, clean[arm], errors.get(arm, {}), noise, log) for arm in values}
    kind = "log" if log else "linear"
    return Analysis(metric, baseline, better, kind, margin, noise, arms, comparisons, frozenset(failed), look)
