"""Intervals and verdicts that count seed noise, on plain numbers.

Training an arm again with another seed moves FID about three times more than drawing other samples from it ("The FID
Lottery", arXiv 2606.20536), so the noise that decides is the spread between seeds. It is estimated once, pooled over
all arms: with 2-5 seeds an arm that sees smaller gaps than tests of each pair by itself. Ratio-like metrics (FID,
latency) are compared on the log scale, where the seed noise is a percentage shared by good and bad arms.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from scipy import optimize, stats

BETTER, WORSE, EQUIVALENT, WITHIN_NOISE = "better", "worse", "equivalent", "within noise"
NOT_ENOUGH_SEEDS, FAILED, NOT_COMPARABLE = "not enough seeds", "failed", "not comparable"
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
SPREAD_LEVEL = 0.01  # evidence of unequal seed noise needed before pooling is given up

Values = Mapping[str, Mapping[int, float]]  # arm -> seed -> value


@dataclass(frozen=True)
class Noise:
    """Seed noise of a set of arms, in working units (log units or the metric's own)."""

    method: str  # pooled | paired | unequal | none
    sd: float | None  # standard deviation of one trial around its arm (paired: after the seed effect)
    df: int  # degrees of freedom of sd
    correlation: float | None  # between arms at equal seeds, None where it cannot be measured


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
    """One arm against the baseline: arm minus baseline, as a fraction of it on the log scale, else in metric units."""

    arm: str
    verdict: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    method: str = "none"  # pooled | paired | unequal | sampling | none
    seeds: int = 0
    p_value: float | None = None  # Bonferroni-corrected
    detectable: float | None = None  # smallest true gap seen with 80 % power


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
    confidence: float = 0.95
    failed: frozenset[str] = field(default_factory=frozenset)

    @property
    def seeds(self) -> int:
        """The fewest seeds of any arm that has values, 0 without values."""
        return min((len(a.values) for a in self.arms.values() if a.values), default=0)

    @property
    def detectable(self) -> float | None:
        """Smallest true gap that every comparison here sees with 80 % power, None without an estimate of the noise."""
        return max((c.detectable for c in self.comparisons.values() if c.detectable is not None), default=None)

    @property
    def working_margin(self) -> float:
        """The margin in the units of ``gain``."""
        return math.log1p(self.margin) if self.scale == "log" else self.margin

    def gain(self, arm: str) -> tuple[float, float] | None:
        """Interval of how much better the arm is than the baseline (negative: worse), in log units on the log scale.

        None where nothing was decided: a missing value, a failed arm, not enough seeds.
        """
        comparison = self.comparisons[arm]
        if comparison.low is None or comparison.high is None or comparison.verdict == NOT_ENOUGH_SEEDS:
            return None
        low, high = comparison.low, comparison.high
        if self.scale == "log":
            low, high = math.log1p(low), math.log1p(high)
        return (low, high) if self.better == "higher" else (-high, -low)


def pooled_variance(samples: Collection[Collection[float]]) -> tuple[float | None, int]:
    """Variance within groups, pooled, and its degrees of freedom; (None, 0) when no group has two values."""
    groups = [np.asarray(list(s), dtype=float) for s in samples if len(s) >= 2]
    df = sum(len(g) - 1 for g in groups)
    if df == 0:
        return None, 0
    return float(sum(((g - g.mean()) ** 2).sum() for g in groups) / df), df


def seed_blocks(table: np.ndarray) -> tuple[float, int, float, float]:
    """Two-way analysis of a complete table [arms, seeds] with an effect for each arm and for each seed.

    Returns the residual variance, its degrees of freedom (A - 1)(S - 1), the intraclass correlation of arms at equal
    seeds (ICC(3,1), Shrout & Fleiss 1979) and the p value of "seeds have no common effect" (F test).
    """
    arms, seeds = table.shape
    centred = table - table.mean(axis=1, keepdims=True)
    effect = centred.mean(axis=0)
    residual = centred - effect
    df = (arms - 1) * (seeds - 1)
    within = float((residual**2).sum() / df)
    between = float(arms * (effect**2).sum() / (seeds - 1))
    if between == 0 and within == 0:
        return 0.0, df, 0.0, 1.0
    p_value = float(stats.f.sf(between / within, seeds - 1, df)) if within > 0 else 0.0
    return within, df, (between - within) / (between + (arms - 1) * within), p_value


def measure_noise(working: Values, comparisons: int, alpha: float = 0.05) -> Noise:
    """Chooses how the seed noise is estimated: paired only where the measured correlation pays for the lost df.

    Picking the narrowest interval after seeing it would be wrong too often, so pairing also needs evidence of a seed
    effect (F test, 5 %) and giving up the pooled variance needs evidence that arms differ in spread (Bartlett's test,
    1 %).
    """
    groups = {arm: seeds for arm, seeds in working.items() if seeds}
    variance, df = pooled_variance([list(s.values()) for s in groups.values()])
    if variance is None:
        return Noise("none", None, 0, None)
    shared = set.intersection(*(set(s) for s in groups.values()))
    complete = len(groups) >= 2 and len(shared) >= 2 and all(set(s) == shared for s in groups.values())
    correlation = None
    if complete:
        table = np.array([[groups[arm][seed] for seed in sorted(shared)] for arm in groups])
        residual, paired_df, correlation, p_value = seed_blocks(table)
        level = 1 - alpha / (2 * max(comparisons, 1))
        pays = stats.t.ppf(level, paired_df) ** 2 * residual < stats.t.ppf(level, df) ** 2 * variance
        if p_value < BLOCK_LEVEL and pays:
            return Noise("paired", math.sqrt(residual), paired_df, correlation)
    spreads = [list(s.values()) for s in groups.values()]
    testable = len(groups) >= 2 and min(map(len, spreads)) >= 3 and all(np.var(s) > 0 for s in spreads)
    if testable and stats.bartlett(*spreads).pvalue < SPREAD_LEVEL:
        return Noise("unequal", math.sqrt(variance), df, correlation)
    return Noise("pooled", math.sqrt(variance), df, correlation)


def detectable_gap(se: float, df: float, comparisons: int = 1, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest true difference that a two-sided t test finds with this power, in the units of ``se``.

    ``se`` is the standard error of the difference; ``comparisons`` tests share ``alpha`` (Bonferroni). Solved from the
    noncentral t distribution. Raises ValueError for a power or alpha outside (0, 1).
    """
    if not (0 < power < 1 and 0 < alpha < 1):
        raise ValueError(f"power and alpha must lie between 0 and 1, got {power} and {alpha}")
    return _detectable_shift(float(df), comparisons, power, alpha) * se if se > 0 else 0.0


@cache
def _detectable_shift(df: float, comparisons: int, power: float, alpha: float) -> float:
    """The detectable gap in standard errors."""
    critical = stats.t.ppf(1 - alpha / (2 * comparisons), df)

    def missing(shift: float) -> float:
        # The lower tail is left out: it adds less than 1e-4 wherever the power is above one half.
        return float(stats.nct.sf(critical, df, shift)) - power

    return float(optimize.brentq(missing, 1e-3, 10 * critical + 10))


def seeds_needed(sd: float, gap: float, arms: int, comparisons: int, power: float = 0.8, most: int = 50) -> int | None:
    """Seeds an arm for which this gap would be seen with pooled noise ``sd``; None when even ``most`` are too few."""
    for seeds in range(2, most + 1):
        if detectable_gap(sd * math.sqrt(2 / seeds), arms * (seeds - 1), comparisons, power) <= gap:
            return seeds
    return None


def verdict_word(low: float, high: float, margin: float, better: str) -> str:
    """The word for a difference known to lie in [low, high] (arm minus baseline)."""
    if -margin <= low and high <= margin:
        return EQUIVALENT
    if low > 0:
        return BETTER if better == "higher" else WORSE
    if high < 0:
        return BETTER if better == "lower" else WORSE
    return WITHIN_NOISE


def _finite(seeds: Mapping[int, float | None]) -> dict[int, float]:
    return {seed: float(v) for seed, v in seeds.items() if v is not None and math.isfinite(v)}


def _summary(
    arm: str, values: dict[int, float], errors: Mapping[int, float], noise: Noise, log: bool, alpha: float
) -> ArmSummary:
    """Mean and own interval: from the seed noise where there is an estimate, else from the sampling error."""
    if not values:
        return ArmSummary(arm, {}, None, None, None, False)
    working = [math.log(v) if log else v for v in values.values()]
    centre = float(np.mean(working))
    mean = math.exp(centre) if log else centre
    count = len(values)
    # A paired residual leaves the seed effect out, which a mean still carries; so each arm's own spread is used there.
    if noise.method in ("paired", "unequal") and count >= 2:
        half = stats.t.ppf(1 - alpha / 2, count - 1) * float(np.std(working, ddof=1)) / math.sqrt(count)
    elif noise.sd is not None and noise.method == "pooled":
        half = stats.t.ppf(1 - alpha / 2, noise.df) * noise.sd / math.sqrt(count)
    else:
        error = _sampling_error(values, errors, log)
        if error is None:
            return ArmSummary(arm, values, mean, None, None, True)
        half = stats.norm.ppf(1 - alpha / 2) * error
        low, high = (mean * math.exp(-half), mean * math.exp(half)) if log else (mean - half, mean + half)
        return ArmSummary(arm, values, mean, low, high, True)
    low, high = (math.exp(centre - half), math.exp(centre + half)) if log else (centre - half, centre + half)
    return ArmSummary(arm, values, mean, low, high, False)


def _sampling_error(values: Mapping[int, float], errors: Mapping[int, float], log: bool) -> float | None:
    """Sampling standard error of the arm's mean, in working units; None when a seed has none."""
    known = _finite(errors)
    if not values or any(seed not in known for seed in values):
        return None
    parts = [known[seed] / value if log else known[seed] for seed, value in values.items()]
    return math.sqrt(sum(p * p for p in parts)) / len(parts)


def _difference_error(arm: list[float], base: list[float], noise: Noise) -> tuple[float, float]:
    """Standard error of the difference of two means and its degrees of freedom (Welch 1947 where spreads differ)."""
    if noise.method != "unequal":
        assert noise.sd is not None
        return noise.sd * math.sqrt(1 / len(arm) + 1 / len(base)), noise.df
    parts = [float(np.var(g, ddof=1)) / len(g) for g in (arm, base)]
    total = sum(parts)
    return math.sqrt(total), total**2 / sum(p * p / (len(g) - 1) for p, g in zip(parts, (arm, base), strict=True))


def _compare(
    arm: str,
    working: Values,
    baseline: str,
    noise: Noise,
    errors: tuple[float | None, float | None],
    count: int,
    log: bool,
    margin: float,
    better: str,
    alpha: float,
) -> Comparison:
    """One arm against the baseline; both have at least one value."""
    ours, base = list(working[arm].values()), list(working[baseline].values())
    shift = float(np.mean(ours) - np.mean(base))
    show = math.expm1 if log else float
    seeds = min(len(ours), len(base))
    if noise.sd is None:
        if errors[0] is None or errors[1] is None:
            return Comparison(arm, NOT_ENOUGH_SEEDS, show(shift), seeds=seeds)
        half = stats.norm.ppf(1 - alpha / (2 * count)) * math.hypot(errors[0], errors[1])
        return Comparison(arm, NOT_ENOUGH_SEEDS, show(shift), show(shift - half), show(shift + half), "sampling", seeds)
    se, df = _difference_error(ours, base, noise)
    half = float(stats.t.ppf(1 - alpha / (2 * count), df)) * se
    low, high = shift - half, shift + half
    # One trained network says nothing about its own spread, whatever the other arms' is: shown, not judged.
    word = verdict_word(low, high, math.log1p(margin) if log else margin, better) if seeds >= 2 else NOT_ENOUGH_SEEDS
    p_value = min(1.0, count * 2 * float(stats.t.sf(abs(shift) / se, df))) if se > 0 else float(shift == 0)
    gap = detectable_gap(se, df, count, alpha=alpha)
    return Comparison(arm, word, show(shift), show(low), show(high), noise.method, seeds, p_value, show(gap))


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
    alpha: float = 0.05,
) -> Analysis:
    """Compares every arm with the baseline.

    ``values``: arm -> seed -> value (missing or not finite: left out); ``errors``: the same shape, the sampling
    standard error of each value; ``failed``: arms of which no trial finished; ``practical``: the difference that
    matters, as a fraction of the baseline. Intervals are two-sided, 1 - alpha over all comparisons (Bonferroni).
    Raises ValueError for an unknown direction or scale, a negative ``practical`` and a baseline that is no arm.
    """
    _check(values, baseline, better, practical, scale)
    clean = {arm: _finite(seeds) for arm, seeds in values.items()}
    positive = all(v > 0 for seeds in clean.values() for v in seeds.values())
    ratio = metric in LOG_METRICS
    log = positive if scale is None and ratio else scale == "log"
    if log and not positive:
        raise ValueError(f"scale log needs positive values of {metric}")
    working = {arm: {s: math.log(v) if log else v for s, v in seeds.items()} for arm, seeds in clean.items()}
    rivals = [arm for arm in values if arm != baseline]
    count = max(1, sum(bool(clean[arm]) for arm in rivals))
    noise = measure_noise(working, count, alpha)
    errors = errors or {}
    sampling = {arm: _sampling_error(clean[arm], errors.get(arm, {}), log) for arm in values}
    centre = abs(float(np.mean(list(clean[baseline].values())))) if clean[baseline] else 0.0
    margin = practical if log else practical * centre
    comparisons = {}
    for arm in rivals:
        if arm in failed:
            comparisons[arm] = Comparison(arm, FAILED)
        elif not clean[arm] or not clean[baseline]:
            comparisons[arm] = Comparison(arm, NOT_COMPARABLE, seeds=len(clean[arm]))
        else:
            comparisons[arm] = _compare(
                arm, working, baseline, noise, (sampling[arm], sampling[baseline]), count, log, margin, better, alpha
            )
    arms = {arm: _summary(arm, clean[arm], errors.get(arm, {}), noise, log, alpha) for arm in values}
    kind = "log" if log else "linear"
    return Analysis(metric, baseline, better, kind, margin, noise, arms, comparisons, 1 - alpha, frozenset(failed))
