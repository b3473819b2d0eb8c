"""How wide an interval must be: the widest of three, so that no arm is believed because of what others are like.

Seed noise pooled over all arms sees the smallest gaps, and is wrong when arms differ in noise: with a baseline four times
noisier than its four rivals 16 to 18 % of grids without any difference would show one (simulated, 2 to 10 seeds). So the
half width of an arm's interval is the largest of

- **shared**: the noise pooled over all arms, times a critical value that makes all intervals hold together (as Dunnett
  1955, with the correlation of comparisons that share a baseline);
- **own**: the spread of this arm and of the baseline alone (Welch 1947; paired: of their differences, seed by seed);
- **baseline**: the spread of the baseline alone (paired: of its difference to the mean of all others).

The critical value of the first is set by simulation of this very rule, so that where arms are alike in noise all
intervals hold together in 95 % of grids. The levels of the others were set by benchmarks/error_rates.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats

LEVEL = 0.05  # of all comparisons of a grid together
OWN = 0.042  # of a comparison by the noise of its two arms alone
FLOOR = 0.8  # of Dunnett's critical value: what the wider intervals spend is not all given back
POWER = 0.8
DRAWS, LEAST_DRAWS, NUMBERS = 20_000, 4_000, 4_000_000  # grids of a simulation, and numbers in it
SIMULATED = 8  # seeds up to which the gap of a design is simulated when seeds are advised


@dataclass(frozen=True)
class Widths:
    """Of R grids of A arms, the baseline first: differences to it, and what their half widths are made of.

    Attributes:
        difference: arm minus baseline [R, A - 1].
        noise: standard deviation of one trial, pooled over all arms [R].
        df: its degrees of freedom.
        error: standard error of a difference by the pooled noise [R, A - 1].
        least: half widths by an arm's own noise and the baseline's [R, A - 1].
    """

    difference: np.ndarray
    noise: np.ndarray
    df: int
    error: np.ndarray
    least: np.ndarray

    def half(self, critical: float) -> np.ndarray:
        """Half widths of the intervals [R, A - 1]."""
        return np.maximum(critical * self.error, self.least)


def level_of(look: int) -> float:
    """Of all comparisons together at the k-th look at growing data: 5 %, 1.25 %, 0.56 %.

    Looks at 3, 5 and 10 seeds are wrong in 5.5 to 5.8 % of grids in all (benchmarks/error_rates.md).
    """
    return LEVEL / look**2


def widths(tables: np.ndarray, paired: bool, level: float = LEVEL) -> Widths:
    """What intervals are made of.

    Args:
        tables: values [R, A, S] in working units, the baseline first; NaN where there is no trial, at the same places in
            all grids. Each arm has two values at least.
        paired: whether an effect of the seed that all arms share is taken out; every arm then has all seeds.
        level: at which all intervals of a grid miss together.
    """
    there = np.isfinite(tables[0])
    count = there.sum(-1)
    mean = np.nanmean(tables, -1)
    centred = np.where(there, tables - mean[..., None], 0.0)
    difference = mean[:, 1:] - mean[:, :1]
    if paired:
        noise, df, own, alone = _paired(tables, centred, level / LEVEL)
    else:
        noise, df, own, alone = _unpaired(centred, count, level / LEVEL)
    error = noise[:, None] * np.sqrt(1 / count[1:] + 1 / count[0])
    least = own if len(count) == 2 else np.maximum(own, alone[:, None])  # of two arms both say the same
    return Widths(difference, noise, df, error, least)


def _paired(tables: np.ndarray, centred: np.ndarray, stricter: float) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
    _, arms, seeds = tables.shape
    df = (arms - 1) * (seeds - 1)
    residual = centred - centred.mean(1, keepdims=True)
    noise = np.sqrt((residual**2).sum((1, 2)) / df)
    own = (tables[:, 1:] - tables[:, :1]).var(-1, ddof=1) / seeds
    alone = (tables[:, 0] - tables[:, 1:].mean(1)).var(-1, ddof=1) / seeds
    quantile = _quantile(stricter * OWN, seeds - 1)
    baseline = _quantile(stricter * baseline_level(arms, seeds), seeds - 1)
    return noise, df, quantile * np.sqrt(own), baseline * np.sqrt(alone)


def _unpaired(
    centred: np.ndarray, count: np.ndarray, stricter: float
) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
    squares = (centred**2).sum(-1)
    df = int((count - 1).sum())
    noise = np.sqrt(squares.sum(-1) / df)
    parts = squares / (count - 1) / count  # variance of each arm's mean
    ours, base = parts[:, 1:], parts[:, :1]
    with np.errstate(invalid="ignore"):  # no spread at all
        degrees = (ours + base) ** 2 / (ours**2 / (count[1:] - 1) + base**2 / (count[0] - 1))
    own = stats.t.ppf(1 - stricter * OWN / 2, np.nan_to_num(degrees, nan=1.0)) * np.sqrt(ours + base)
    level = stricter * baseline_level(len(count), int(count[0]))
    return noise, df, own, _quantile(level, int(count[0]) - 1) * np.sqrt(base[:, 0])


def _quantile(level: float, df: int) -> float:
    return float(stats.t.ppf(1 - level / 2, df))


def baseline_level(arms: int, seeds: int) -> float:
    """Of the interval by the baseline's noise: stricter the more arms are compared with it, as they are wrong together."""
    return LEVEL * (arms - 1) ** (-0.5 * min(1.0, (seeds - 2) / 3))


@dataclass(frozen=True)
class Design:
    """How many seeds each arm has, the baseline first, whether they are paired, and the level of all intervals together."""

    seeds: tuple[int, ...]
    paired: bool = False
    level: float = LEVEL

    @property
    def critical(self) -> float:
        """What the pooled standard error is multiplied by."""
        return _critical(self)

    @property
    def gap(self) -> float:
        """The true gap of the first comparison that its interval lies beyond in 80 % of grids.

        In standard deviations of a trial as they are estimated: what such an estimate can be off by is part of it.
        """
        return _gap(self)


@cache
def _null(design: Design) -> Widths:
    """Grids in which no arm differs from another, in mean or in noise (standard deviation 1)."""
    arms, seeds = len(design.seeds), max(design.seeds)
    draws = min(DRAWS, max(LEAST_DRAWS, NUMBERS // (arms * seeds)))
    tables = np.random.default_rng(0).standard_normal((draws, arms, seeds))
    tables[:, np.arange(seeds) >= np.array(design.seeds)[:, None]] = np.nan
    return widths(tables, design.paired, design.level)


@cache
def _critical(design: Design) -> float:
    null = _null(design)
    size = np.abs(null.difference)
    ratio = size / null.error
    dunnett = np.quantile(ratio.max(1), 1 - design.level)
    found = np.quantile(np.where(size > null.least, ratio, 0.0).max(1), 1 - design.level)
    return float(max(found, FLOOR * dunnett))


@cache
def _gap(design: Design) -> float:
    null = _null(design)
    needed = null.half(design.critical)[:, 0] - null.difference[:, 0]
    estimates = np.roll(null.noise, len(null.noise) // 2)  # of other grids of the same design
    return float(np.quantile(needed / estimates, POWER))


def noise_range(sd: float, df: int, level: float = 0.1) -> tuple[float, float]:
    """Where the true standard deviation lies, by 90 % (chi-squared)."""
    return tuple(sd * math.sqrt(df / stats.chi2.ppf(end, df)) for end in (1 - level / 2, level / 2))  # type: ignore[return-value]


def seeds_needed(sd: float, gap: float, arms: int, paired: bool = False, most: int = 50) -> int | None:
    """Seeds an arm with which this gap would be seen; None when even ``most`` are too few.

    Above eight seeds the pooled noise decides alone, and the gap shrinks as the root of their number.
    """
    for seeds in range(2, SIMULATED + 1):
        if sd * Design((seeds,) * arms, paired).gap <= gap:
            return seeds
    seeds = math.ceil(SIMULATED * (sd * Design((SIMULATED,) * arms, paired).gap / gap) ** 2) if gap > 0 else most + 1
    return seeds if seeds <= most else None
