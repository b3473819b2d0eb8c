"""Intervals: bootstrap for means and paired differences over prompts, Wilson's for shares, jackknife for FID and KID.

FID is never bootstrapped. Drawing samples again with repetition lowers the rank of their covariance, which FID reads
as a distance: at N = 1000 of 256 features a 95 % bootstrap interval around the FID 6.0 is [7.6, 8.1], beside the value.
``eval.metrics.fid.frechet_jackknife`` gives its error and ``jackknife_interval`` the interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.special import stdtrit
from torch import Tensor

from iris.errors import SettingError

RESAMPLES = 9999
ACCELERATED = 2000  # values up to which the interval is bias-corrected; beyond, it equals the percentiles'
ELEMENTS = 2_000_000  # float64 drawn at a time
REFUSED = ("fid", "fid_infinity", "kid", "precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class Interval:
    """A value, its interval and how that was made."""

    value: float
    low: float
    high: float
    standard_error: float
    n: int  # independent values, prompts where they are grouped
    confidence: float
    method: str  # BCa | percentile | constant (all values equal: no error can be seen)
    resamples: int
    seed: int


def bootstrap_interval(
    values: Tensor | np.ndarray | Sequence[float],
    prompts: Sequence[str] | None = None,
    statistic: str = "mean",
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of values with its bootstrap interval, such as CLIP scores or rewards of images.

    Bias-corrected and accelerated (Efron 1987) by ``scipy.stats.bootstrap``; from 2000 values on by percentiles, where
    the two agree. For shares use ``wilson_interval``, which also holds near 0 and 1.

    Args:
        values: [N], one an image.
        prompts: [N], the prompt of each; images of one prompt are averaged first, as they are not independent.
        statistic: "mean".
        confidence: in (0, 1).
        resamples: at least 100.
        seed: of the resampling.

    Raises:
        SettingError: another statistic; FID and its like are refused, see the module's text.
        ValueError: not [N] with N >= 2 independent values, a value that is not finite, another argument out of range.
    """
    _check_statistic(statistic)
    return _interval(_grouped(_checked(values, "values"), prompts), confidence, resamples, seed)


def paired_difference(
    first: Tensor | np.ndarray | Sequence[float],
    second: Tensor | np.ndarray | Sequence[float],
    prompts: Sequence[str] | None = None,
    statistic: str = "mean",
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of ``second - first`` with its bootstrap interval, image i of both sides made from one prompt and seed.

    Prompts differ more than models do, and that part cancels in the differences.

    Args:
        first: [N], one an image.
        second: [N] of the same prompts in the same order.
        prompts, statistic, confidence, resamples, seed: as for ``bootstrap_interval``.

    Raises:
        SettingError, ValueError: as ``bootstrap_interval``; sides of other lengths.
    """
    _check_statistic(statistic)
    a, b = _checked(first, "first"), _checked(second, "second")
    if len(a) != len(b):
        raise ValueError(f"a paired difference needs the same images on both sides, got {len(a)} and {len(b)} values")
    return _interval(_grouped(b - a, prompts), confidence, resamples, seed)


def jackknife_interval(
    value: float,
    standard_error: float,
    blocks: int = 20,
    confidence: float = 0.95,
    low: float = -math.inf,
    high: float = math.inf,
) -> tuple[float, float]:
    """Interval of a value whose error comes from a delete-a-block jackknife: Student's t with blocks - 1 degrees.

    For FID it says where other samples of the same N would put the value; the bias of N is not in it.

    Args:
        value: of the metric.
        standard_error: as ``frechet_jackknife`` and ``kid`` return it.
        blocks: that it was made from.
        confidence: in (0, 1).
        low: the metric's smallest possible value, such as 0 for FID.
        high: the largest.

    Raises:
        ValueError: a negative or non-finite error, fewer than two blocks, confidence outside (0, 1).
    """
    if not (math.isfinite(value) and math.isfinite(standard_error) and standard_error >= 0):
        raise ValueError(f"value and standard_error must be finite, the error >= 0, got {value} and {standard_error}")
    if blocks < 2:
        raise ValueError(f"blocks: must be at least 2, got {blocks}")
    _check_confidence(confidence)
    half = float(stdtrit(blocks - 1, 0.5 + confidence / 2)) * standard_error
    return max(low, value - half), min(high, value + half)


def wilson_interval(accuracy: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval for a share measured on ``count`` independent images (Wilson 1927); stays inside [0, 1] at the ends.

    Raises:
        ValueError: accuracy outside [0, 1], count below 1, confidence outside (0, 1).
    """
    if not 0 <= accuracy <= 1 or count < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"accuracy must be in [0, 1], count >= 1, confidence in (0, 1), got {accuracy}, {count}, {confidence}"
        )
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    spread = 1 + z * z / count
    centre = (accuracy + z * z / (2 * count)) / spread
    half = z * math.sqrt(accuracy * (1 - accuracy) / count + (z / (2 * count)) ** 2) / spread
    return max(0.0, centre - half), min(1.0, centre + half)


def _check_statistic(statistic: str) -> None:
    if statistic in REFUSED:
        raise SettingError(
            f"statistic={statistic!r} cannot be bootstrapped: repeated samples lower the rank of the "
            "features and are each other's neighbours, so the interval lies beside the value; use the "
            "jackknife (eval.metrics.fid.frechet_jackknife, eval.metrics.kid.kid, eval.metrics.manifold.manifold_metrics) and "
            "jackknife_interval; allowed here: mean"
        )
    if statistic != "mean":
        raise SettingError(f"statistic={statistic!r} is unknown; allowed: mean")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: must be in (0, 1), got {confidence}")


def _checked(values: Tensor | np.ndarray | Sequence[float], name: str) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    values = np.asarray(values, np.float64)
    if values.ndim == 2:
        raise ValueError(
            f"{name} must be [N], one value an image, got {values.shape}; features are not bootstrapped: "
            "use eval.metrics.fid.frechet_jackknife"
        )
    if values.ndim != 1:
        raise ValueError(f"{name} must be [N], got {values.shape}")
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {len(values)} are not finite")
    return values


def _grouped(values: np.ndarray, prompts: Sequence[str] | None) -> np.ndarray:
    """Mean of each prompt's values, in the order of first appearance."""
    if prompts is None:
        return values
    if len(prompts) != len(values):
        raise ValueError(f"prompts: one for each of the {len(values)} values is needed, got {len(prompts)}")
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    owner = np.asarray([number[prompt] for prompt in prompts], np.int64)
    return np.bincount(owner, weights=values) / np.bincount(owner)


def _interval(values: np.ndarray, confidence: float, resamples: int, seed: int) -> Interval:
    if len(values) < 2:
        raise ValueError(f"a bootstrap needs at least 2 independent values, got {len(values)}")
    if resamples < 100:
        raise ValueError(f"resamples: must be at least 100, got {resamples}")
    _check_confidence(confidence)
    n, value = len(values), float(values.mean())
    if np.ptp(values) <= 1e-15 * np.abs(values).max():
        return Interval(value, value, value, 0.0, n, confidence, "constant", 0, seed)
    from scipy import stats  # 0.7 s, which a trial's process, that only needs the jackknife, is spared

    method = "BCa" if n <= ACCELERATED else "percentile"
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        confidence_level=confidence,
        method=method,
        batch=max(1, ELEMENTS // n),
        vectorized=True,
        random_state=np.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    return Interval(value, float(low), float(high), float(found.standard_error), n, confidence, method, resamples, seed)
