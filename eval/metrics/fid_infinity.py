"""FID extrapolated to infinitely many generated images (Chong & Forsyth 2020, arXiv:1911.07023).

FID falls with the number of images N as FID_inf + slope / N to first order. So it is computed on subsets of growing
size and the line through them is read off at 1 / N = 0. Values at different N can then be compared, which FID's cannot.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.metrics.fid import DistanceTo, FeatureStatistics, check_comparable, check_features, frechet_jackknife
from iris.randomness import addressed

POINTS = 15  # as in the paper
SMALLEST = 0.25  # share of the images in the smallest subsets
ENOUGH = 8  # images a feature, below which the straight line does not hold and the value comes out too low


class ExtrapolationWarning(UserWarning):
    """There are fewer than 8 images a feature: the extrapolated FID under-estimates."""


@dataclass(frozen=True)
class FidInfinity:
    """An extrapolated FID and how it was found.

    Attributes:
        value: at 1 / N = 0. Only the generated images are extrapolated: the reference keeps its own size. It can be
            below zero where the true distance is small.
        fit_error: standard error of ``value`` from the residuals of the linear fit: the noise of choosing subsets.
        sampling_error: standard error of the FID at full N by the jackknife: the noise of drawing the images.
        slope: of the line in 1 / N.
        residual: root mean square of the points about the line, in units of FID.
        counts: images in each point's subsets.
        values: FID of each point, the mean over its disjoint subsets.
        n: generated images.
        width: features D.
        seed: of the subsets.
    """

    value: float
    fit_error: float
    sampling_error: float
    slope: float
    residual: float
    counts: tuple[int, ...]
    values: tuple[float, ...]
    n: int
    width: int
    seed: int

    @property
    def standard_error(self) -> float:
        """Of drawing other images: the points share their images, so the fit alone does not see that noise."""
        return math.hypot(self.fit_error, self.sampling_error)

    @property
    def reliable(self) -> bool:
        """Whether there are at least 8 images a feature."""
        return self.n >= ENOUGH * self.width


def fid_infinity(
    features: Tensor | np.ndarray,
    reference: FeatureStatistics | Tensor | np.ndarray,
    points: int = POINTS,
    seed: int = 0,
    sampling_error: float | None = None,
) -> FidInfinity:
    """FID of infinitely many images like ``features``, against the same reference.

    ``points`` sizes are spread evenly from a quarter of the images to all of them. The paper draws one subset a size;
    here as many disjoint ones as fit are averaged, which costs half as many distances again and lowers the noise of
    the small sizes, where the line turns.

    Args:
        features: [N, D] of generated images.
        reference: statistics or features of real images.
        points: sizes, at least 3.
        seed: addresses the permutation that each size's subsets are cut from.
        sampling_error: the jackknife's error of the FID at full N where the caller has it; else it is computed.

    Raises:
        ValueError: as ``frechet_distance``; fewer than 3 points, or too few images for three sizes.

    Warns:
        ExtrapolationWarning: N < 8 D.
    """
    features, to_reference = check_features(features), DistanceTo(reference)
    n, width = features.shape
    check_comparable(FeatureStatistics(width), to_reference.statistics)
    if points < 3:
        raise ValueError(f"points: at least 3 are needed for a line and its error, got {points}")
    counts = np.unique(np.linspace(max(2, SMALLEST * n), n, points).round().astype(int))
    if len(counts) < 3:
        raise ValueError(f"features: {n} samples are too few for subsets of three sizes")
    if n < ENOUGH * width:
        warnings.warn(
            f"{n} samples of {width} features: below {ENOUGH * width} the extrapolated FID comes out too low",
            ExtrapolationWarning,
            stacklevel=2,
        )
    values = [_mean_distance(features, to_reference, int(count), seed) for count in counts]
    value, slope, error, residual = _line(1 / counts, np.asarray(values))
    if sampling_error is None:
        sampling_error = frechet_jackknife(features, reference, min(20, n // 2))[1]
    return FidInfinity(
        value, error, sampling_error, slope, residual, tuple(counts.tolist()), tuple(values), n, width, seed
    )


def _mean_distance(features: Tensor, to_reference: DistanceTo, count: int, seed: int) -> float:
    """Mean FID over the disjoint subsets of ``count`` samples that one permutation gives."""
    order = torch.randperm(len(features), generator=addressed(seed, "fid_infinity", count))
    subsets = order[: len(order) // count * count].view(-1, count)
    return float(np.mean([to_reference(features[subset]) for subset in subsets]))


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float, float]:
    """Least squares y = value + slope x: (value, slope, standard error of value, root mean square residual)."""
    design = np.stack([np.ones_like(x), x], axis=1)
    (value, slope), *_ = np.linalg.lstsq(design, y, rcond=None)
    squares = float(np.square(y - value - slope * x).sum())
    inverse = np.linalg.inv(design.T @ design)
    return float(value), float(slope), math.sqrt(squares / (len(x) - 2) * inverse[0, 0]), math.sqrt(squares / len(x))
