"""Generated images that repeat a training image, found by nearest neighbours in judge space.

How close is too close is learned from real images that the model was not trained on: an image is flagged when its
distance to the nearest training image is no larger than the 0.1 % quantile of theirs, by cosine or by Euclidean
distance. So a model that copies nothing has 0.1 to 0.2 % of its images flagged; ``Duplicates.expected`` says how many
that is. The real images must be drawn as the generated ones are (the same kind of captions), or their distances are
others for that reason alone: of the world ``shapes``, whose validation captions share no attribute tuple with training,
new pictures of training captions were flagged in 96 % of cases with thresholds from validation pictures, in 0.3 % with
those from new pictures of training captions. Where a data set repeats itself, the threshold falls towards 0.

A judge sees what it was trained to see: two images that differ elsewhere are equal to it, so a flag is a pair to look
at (``eval.report.duplicates_page``), not a proof.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.metrics.fid import check_features

ROWS = 1024  # rows of a distance matrix held at a time
QUANTILE = 0.001
METRICS = ("cosine", "euclidean")


@dataclass(frozen=True)
class Nearest:
    """The nearest training image of each image, and how close is too close."""

    metric: str  # cosine: 1 - cos, in [0, 2]; euclidean: |a - b|
    distance: Tensor  # float64 [N]
    index: Tensor  # int64 [N], of the training image
    threshold: float  # the quantile of the held-out images' distances

    @property
    def flagged(self) -> Tensor:
        """bool [N]: no farther than the threshold."""
        return self.distance <= self.threshold


@dataclass(frozen=True)
class Duplicates:
    """Nearest training images of generated images by both metrics."""

    cosine: Nearest
    euclidean: Nearest
    quantile: float
    n: int
    training_n: int
    heldout_n: int
    heldout_flagged: int  # of the held-out images by the same rule

    @property
    def flagged(self) -> Tensor:
        """bool [N]: too close by either metric."""
        return self.cosine.flagged | self.euclidean.flagged

    @property
    def expected(self) -> float:
        """Images that would be flagged if the generated ones were as new as the held-out ones."""
        return self.n * self.heldout_flagged / self.heldout_n

    @property
    def rule(self) -> str:
        """The rule in words, with its figures."""
        return (
            f"flagged when it lies as close to one of {self.training_n:,} training images as the closest "
            f"{100 * self.quantile:g} % of {self.heldout_n:,} real held-out images do: cosine distance up to "
            f"{self.cosine.threshold:.4g} or Euclidean distance (L2) up to {self.euclidean.threshold:.4g}"
        )

    def closest(self, count: int) -> list[int]:
        """Indices of ``count`` generated images: flagged ones first, each part by cosine distance, closest first."""
        order = self.cosine.distance.argsort(stable=True)
        return order[(~self.flagged[order]).int().argsort(stable=True)][:count].tolist()

    def neighbour(self, i: int) -> int:
        """The training image nearest to generated image i: by cosine, unless Euclidean distance alone flags it."""
        by = self.euclidean if self.euclidean.flagged[i] and not self.cosine.flagged[i] else self.cosine
        return int(by.index[i])


def find_duplicates(
    features: Tensor | np.ndarray,
    training: Tensor | np.ndarray,
    heldout: Tensor | np.ndarray,
    quantile: float = QUANTILE,
) -> Duplicates:
    """Flag generated images that lie closer to a training image than real unseen images do.

    Args:
        features: [N, D] of generated images, N >= 1.
        training: [M, D] of the images that the model was trained on.
        heldout: [H, D] of real images that it was not trained on, drawn as the generated ones are.
        quantile: share of held-out images that the threshold lets pass as too close, by each metric.

    Raises:
        ValueError: other widths, values that are not finite, an all-zero feature, quantile outside (0, 0.5], or fewer
            than 1 / quantile held-out images, which could not tell that quantile.
    """
    x, y, z = (
        check_features(given, name, 1)
        for given, name in ((features, "features"), (training, "training"), (heldout, "heldout"))
    )
    if len({part.shape[1] for part in (x, y, z)}) > 1:
        raise ValueError(
            f"features, training and heldout are {x.shape[1]}, {y.shape[1]} and {z.shape[1]} wide: two "
            "judges cannot be compared"
        )
    if not 0 < quantile <= 0.5:
        raise ValueError(f"quantile: must be in (0, 0.5], got {quantile}")
    if len(z) * quantile < 1:
        raise ValueError(
            f"heldout: {len(z)} images cannot tell a quantile of {quantile:g}; at least "
            f"{math.ceil(1 / quantile)} are needed"
        )
    rank = math.ceil(quantile * len(z))
    found, heldout_flagged = {}, torch.zeros(len(z), dtype=torch.bool)
    for metric in METRICS:
        distances = nearest(z, y, metric)[0]
        threshold = float(distances.kthvalue(rank).values)
        heldout_flagged |= distances <= threshold
        found[metric] = Nearest(metric, *nearest(x, y, metric), threshold)
    return Duplicates(
        **found,
        quantile=quantile,
        n=len(x),
        training_n=len(y),
        heldout_n=len(z),
        heldout_flagged=int(heldout_flagged.sum()),
    )


def nearest(features: Tensor, training: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Distance [N] to the nearest row of ``training`` [M, D] and its index [N], block by block in float64.

    Raises:
        ValueError: a metric that is not cosine or euclidean; an all-zero feature under cosine.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")
    features, training = features.double(), training.double()
    if metric == "cosine":
        features, training = _unit(features, "features"), _unit(training, "training")
    else:  # distances do not change, and keep their digits
        centre = training.mean(0)
        features, training = features - centre, training - centre
    half = training.square().sum(1) / 2
    index = torch.cat([(rows @ training.T - half).argmax(1) for rows in features.split(ROWS)])
    gap = (features - training[index]).square().sum(1)  # from the pair itself: a copy is at distance 0 exactly
    return gap / 2 if metric == "cosine" else gap.sqrt(), index


def _unit(features: Tensor, name: str) -> Tensor:
    norm = features.norm(dim=1, keepdim=True)
    if float(norm.min()) == 0:
        raise ValueError(f"{name}: {int((norm == 0).sum())} features are all zero and have no direction")
    return features / norm
