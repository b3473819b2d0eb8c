"""Fréchet distance (FID when the features are Inception's) with its sampling error, in float64 throughout.

The libraries agree with this module to their own precision (tests/eval/metrics/test_fid.py); it exists because they take the
matrix root of a non-symmetric product, which loses six digits and turns negative when there are fewer samples than
features, and because none of them states how far the value would move with other samples.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Metadata that must agree before two sets of statistics may be compared.
COMPARED = ("judge", "judge_sha256", "resize", "image_size")
# Eigenvalues below this fraction of the largest are rounding noise of a rank-deficient covariance.
RANK_TOLERANCE = 1e-12


class RankDeficientWarning(UserWarning):
    """There are no more samples than features: the distance is finite, and dominated by the sample size."""


def check_features(features: Tensor | np.ndarray, name: str = "features", minimum: int = 2) -> Tensor:
    """Features as a float64 CPU tensor [N, D].

    Raises:
        ValueError: not [N, D], fewer than ``minimum`` rows, or a value that is not finite.
    """
    features = torch.as_tensor(features).detach()
    if features.dim() != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} must be [N, D] with D >= 1, got {tuple(features.shape)}")
    if len(features) < minimum:
        raise ValueError(f"{name}: at least {minimum} samples are needed, got {len(features)}")
    features = features.to("cpu", torch.float64)
    bad = int((~torch.isfinite(features)).any(1).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {len(features)} samples hold values that are not finite")
    return features


class FeatureStatistics:
    """Count, mean and scatter of features seen so far, in float64.

    The scatter is kept about the running mean (Chan, Golub & LeVeque 1983): a plain sum of outer products loses digits
    when features lie far from zero.

    Args:
        width: number of features D.
        metadata: what the features came from; the keys in ``COMPARED`` must agree between compared statistics.
    """

    def __init__(self, width: int, metadata: dict[str, Any] | None = None) -> None:
        if width < 1:
            raise ValueError(f"width: must be at least 1, got {width}")
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)
        self.metadata = dict(metadata or {})

    @classmethod
    def of(cls, features: Tensor | np.ndarray, metadata: dict[str, Any] | None = None) -> FeatureStatistics:
        """Statistics of features [N, D]."""
        features = check_features(features, minimum=1)
        return cls(features.shape[1], metadata).update(features)

    @property
    def width(self) -> int:
        """Number of features D."""
        return len(self.mean)

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance [D, D]. Raises ValueError below two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return self.scatter / (self.count - 1)

    @property
    def rank_deficient(self) -> bool:
        """Whether there are too few samples for a covariance of full rank (N <= D)."""
        return self.count <= self.width

    def update(self, features: Tensor | np.ndarray) -> FeatureStatistics:
        """Add features [N, D] (N >= 1) and return self. Raises ValueError on another width or non-finite values."""
        features = check_features(features, minimum=1)
        if features.shape[1] != self.width:
            raise ValueError(f"features are {features.shape[1]} wide, the statistics {self.width}")
        count, mean = len(features), features.mean(0)
        total, gap, centred = self.count + count, mean - self.mean, features - mean
        self.mean = self.mean + gap * (count / total)
        self.scatter = self.scatter + centred.T @ centred + torch.outer(gap, gap) * (self.count * count / total)
        self.count = total
        return self

    def without(self, features: Tensor) -> FeatureStatistics:
        """Statistics of the samples left when ``features`` [N, D], which were among them, are taken out."""
        mean = features.mean(0)
        centred = features - mean
        rest = FeatureStatistics(self.width, self.metadata)
        rest.count = self.count - len(features)
        if rest.count < 1:
            raise ValueError(f"cannot take {len(features)} samples out of {self.count}")
        rest.mean = self.mean + (self.mean - mean) * (len(features) / rest.count)
        gap = mean - rest.mean
        moved = torch.outer(gap, gap) * (rest.count * len(features) / self.count)
        rest.scatter = self.scatter - centred.T @ centred - moved
        return rest

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an npz that holds no pickled object; a reader never sees a half-written file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.npz")
        np.savez(
            temporary,
            count=self.count,
            mean=self.mean.numpy(),
            scatter=self.scatter.numpy(),
            metadata=json.dumps(self.metadata, sort_keys=True),
        )
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureStatistics:
        """Read what ``save`` wrote. Raises ValueError when the file holds something else."""
        try:
            with np.load(path, allow_pickle=False) as data:
                mean, scatter = torch.from_numpy(data["mean"]), torch.from_numpy(data["scatter"])
                count, metadata = int(data["count"]), json.loads(str(data["metadata"]))
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is not a file of feature statistics: {error}") from error
        if scatter.shape != (len(mean), len(mean)) or not bool(torch.isfinite(scatter).all()):
            raise ValueError(f"{path}: mean {tuple(mean.shape)} and scatter {tuple(scatter.shape)} do not fit")
        statistics = cls(len(mean), metadata)
        statistics.count, statistics.mean, statistics.scatter = count, mean.double(), scatter.double()
        return statistics


def check_comparable(a: FeatureStatistics, b: FeatureStatistics) -> None:
    """Raises ValueError when widths differ, or the judges or images that the features came from."""
    if a.width != b.width:
        raise ValueError(f"features are {a.width} and {b.width} wide: two judges cannot be compared")
    for key in COMPARED:
        if key in a.metadata and key in b.metadata and a.metadata[key] != b.metadata[key]:
            raise ValueError(f"features cannot be compared, {key} differs: {a.metadata[key]!r} and {b.metadata[key]!r}")


def frechet_distance(a: FeatureStatistics | Tensor | np.ndarray, b: FeatureStatistics | Tensor | np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), the FID of Heusel et al. 2017 on Inception's features.

    The trace of the root is taken in a symmetric form: the sum of the roots of the eigenvalues of F' S F with F F' the
    other covariance. Features given as [N, D] with N <= D go through singular values of N rows instead, which is exact
    and cheaper. Never compare values at different N: the estimate falls with N.

    Args:
        a: features [N, D] or their statistics.
        b: the same of the other images.

    Returns:
        The squared distance, >= 0 up to rounding.

    Raises:
        ValueError: other widths or judges, fewer than two samples, values that are not finite.

    Warns:
        RankDeficientWarning: N <= D on a side.
    """
    stats_a, stats_b = _statistics(a), _statistics(b)
    check_comparable(stats_a, stats_b)
    for statistics in (stats_a, stats_b):
        if statistics.rank_deficient:
            warnings.warn(
                f"{statistics.count} samples of {statistics.width} features: the covariance is rank "
                "deficient and the Fréchet distance mostly shows the sample size",
                RankDeficientWarning,
                stacklevel=2,
            )
    rows_a, rows_b = _rows(a, stats_a), _rows(b, stats_b)
    if rows_a is not None and rows_b is not None:
        root = _nuclear(rows_a @ rows_b.T)
    elif rows_a is not None or rows_b is not None:
        rows, other = (rows_a, stats_b) if rows_b is None else (rows_b, stats_a)
        root = _nuclear(rows @ _factor(other.covariance))
    else:  # the side of lower rank is factored, so that the product has no eigenvalues that are only noise
        low, high = sorted((stats_a, stats_b), key=lambda s: s.count)
        root = _root_trace(_factor(low.covariance), high.covariance)
    return _distance(stats_a, stats_b, root)


def frechet_jackknife(
    features: Tensor | np.ndarray, reference: FeatureStatistics | Tensor | np.ndarray, blocks: int = 20
) -> tuple[float, float]:
    """The Fréchet distance and its sampling error by the delete-a-block jackknife.

    The error is that of drawing other samples of the same N against the same reference. A bootstrap is wrong here:
    repeated samples lower the rank, and its interval lies beside the value. Samples go to blocks in turn (i mod
    blocks), so that samples sorted by class do not inflate the error. Retraining moves FID more than resampling does.

    Args:
        features: [N, D] of generated images.
        reference: statistics or features of real images.
        blocks: number of blocks, 2 <= blocks <= N / 2.

    Returns:
        (value, standard_error); value is ``frechet_distance(features, reference)``, with no bias removed.

    Raises:
        ValueError: as ``frechet_distance``, or blocks outside its range.
    """
    value, replicates = frechet_replicates(features, reference, blocks)
    return value, jackknife_error(replicates)


def frechet_replicates(
    features: Tensor | np.ndarray, reference: FeatureStatistics | Tensor | np.ndarray, blocks: int = 20
) -> tuple[float, list[float]]:
    """The Fréchet distance, and what it is without each block: what ``frechet_jackknife`` makes the error from.

    The replicates of two models over the same samples pair up: their differences give the error of the difference.
    """
    features, to_reference = check_features(features), DistanceTo(reference)
    total = FeatureStatistics.of(features, {})
    check_comparable(total, to_reference.statistics)
    if not 2 <= blocks <= len(features) // 2:
        raise ValueError(f"blocks: must be between 2 and half the {len(features)} samples, got {blocks}")
    value = frechet_distance(features, reference)
    replicates = []
    for block in range(blocks):
        held_out = torch.zeros(len(features), dtype=torch.bool)
        held_out[block::blocks] = True
        replicates.append(to_reference(features[~held_out], total.without(features[held_out])))
    return value, replicates


class DistanceTo:
    """Fréchet distances of many sets of samples to one reference, whose covariance is factored once.

    Args:
        reference: statistics or features [M, D] of real images.

    Raises:
        ValueError: as ``frechet_distance``.
    """

    def __init__(self, reference: FeatureStatistics | Tensor | np.ndarray) -> None:
        self.statistics = _statistics(reference)
        self._factor = _factor(self.statistics.covariance)

    def __call__(self, features: Tensor, statistics: FeatureStatistics | None = None) -> float:
        """The distance of float64 features [N, D] as ``check_features`` gives them.

        ``statistics`` are the features', where they are known. No warning is given for N <= D: the caller knows its
        subsets.
        """
        statistics = FeatureStatistics.of(features) if statistics is None else statistics
        if statistics.rank_deficient:
            root = _nuclear(_centred_rows(features, statistics) @ self._factor)
        else:
            root = _root_trace(self._factor, statistics.covariance)
        return _distance(statistics, self.statistics, root)


def jackknife_error(replicates: list[float]) -> float:
    """Standard error from the values with one block left out each (Efron & Tibshirani 1993, chapter 11)."""
    values = np.asarray(replicates, dtype=np.float64)
    return float(np.sqrt((len(values) - 1) * values.var()))


def _statistics(x: FeatureStatistics | Tensor | np.ndarray) -> FeatureStatistics:
    if isinstance(x, FeatureStatistics):
        if x.count < 2:
            raise ValueError(f"at least 2 samples are needed, the statistics hold {x.count}")
        return x
    return FeatureStatistics.of(check_features(x))


def _rows(x: FeatureStatistics | Tensor | np.ndarray, statistics: FeatureStatistics) -> Tensor | None:
    """R [N, D] with R'R the covariance, when x are features with N <= D."""
    if isinstance(x, FeatureStatistics) or not statistics.rank_deficient:
        return None
    return _centred_rows(check_features(x), statistics)


def _centred_rows(features: Tensor, statistics: FeatureStatistics) -> Tensor:
    return (features - statistics.mean) / math.sqrt(statistics.count - 1)


def _factor(covariance: Tensor) -> Tensor:
    """F [D, r] with F F' = covariance and r its numerical rank."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > RANK_TOLERANCE * values[-1].clamp_min(0)
    return vectors[:, kept] * values[kept].sqrt()


def _root_trace(factor: Tensor, covariance: Tensor) -> Tensor:
    """tr((F F' S)^(1/2)) by the eigenvalues of F' S F."""
    product = factor.T @ covariance @ factor
    return torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()


def _nuclear(matrix: Tensor) -> Tensor:
    """The sum of singular values; of R_a R_b' it is tr((S_a S_b)^(1/2)) for S = R'R."""
    return torch.linalg.svdvals(matrix).sum()


def _distance(a: FeatureStatistics, b: FeatureStatistics, root: Tensor) -> float:
    spread = a.covariance.trace() + b.covariance.trace() - 2 * root
    return float((a.mean - b.mean).square().sum() + spread)
