"""Fidelity and diversity apart: improved precision and recall, density and coverage, from nearest neighbours.

Precision, recall: Kynkäänniemi et al. 2019 (arXiv:1904.06991), k = 3. Density, coverage: Naeem et al. 2020
(arXiv:2002.09797), k = 5. A ball lies around each sample and reaches its k-th nearest neighbour of the same set; balls
are closed. All four depend on k, on the number of generated and of real images: compare them at equal ones only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.metrics.fid import check_features, jackknife_error

ROWS = 1024  # rows of a distance matrix held at a time: [1024, M] in float64 is 250 MB at M = 30 000
NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5


@dataclass(frozen=True)
class ManifoldMetrics:
    """Each metric with the standard error of drawing other generated images against the same reference.

    Precision and density are means over independent generated images, so theirs are a binomial's and a mean's error;
    recall and coverage take a delete-a-block jackknife. An error of 0 at a share of 0 or 1 is no certainty: use
    ``eval.metrics.bootstrap.wilson_interval`` there.
    """

    precision: float  # share of generated images inside a real image's ball
    precision_se: float
    recall: float  # share of real images inside a generated image's ball
    recall_se: float
    density: float  # real balls that a generated image lies in, over k; may exceed 1
    density_se: float
    coverage: float  # share of real balls with a generated image inside
    coverage_se: float
    neighbours: int  # k of precision and recall
    density_neighbours: int  # k of density and coverage
    n: int
    reference_n: int
    blocks: int


def manifold_metrics(
    features: Tensor | np.ndarray,
    reference: Tensor | np.ndarray,
    neighbours: int = NEIGHBOURS,
    density_neighbours: int = DENSITY_NEIGHBOURS,
    blocks: int = 20,
) -> ManifoldMetrics:
    """Precision, recall, density and coverage of features [N, D] against a reference [M, D].

    Exact: distances are taken block by block in float64, in memory that grows with N + M.

    Args:
        features: [N, D] of generated images.
        reference: [M, D] of real images.
        neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.
        blocks: of the jackknife, 2 <= blocks <= N / 2; samples go to blocks in turn (i mod blocks).

    Raises:
        ValueError: other widths, values that are not finite, k < 1, fewer samples than k + 1 (for generated ones also
            without a block), blocks outside its range.
    """
    x, y = check_features(features), check_features(reference, "reference")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features are {x.shape[1]} and {y.shape[1]} wide: two judges cannot be compared")
    check_neighbours(len(x), len(y), neighbours, density_neighbours, blocks)
    centre = y.mean(0)  # distances do not change, and keep their digits
    x, y = x - centre, y - centre
    near = _nearest(y, max(neighbours, density_neighbours))
    inner, outer = near[:, neighbours - 1], near[:, density_neighbours - 1]
    radii = _generated_radii(x, neighbours, blocks)
    precise, dense = torch.zeros(len(x), dtype=torch.bool), torch.zeros(len(x), dtype=torch.float64)
    covered = torch.zeros(len(y), blocks, dtype=torch.bool)  # by a sample of each block
    recalled = torch.zeros(len(y), blocks + 1, dtype=torch.bool)  # by all samples, then without each block
    block = torch.arange(len(x)) % blocks
    for rows, distance in _distances(x, y):
        precise[rows] = (distance <= inner).any(1)
        within = distance <= outer
        dense[rows] = within.sum(1).double() / density_neighbours
        for b in range(blocks):
            covered[:, b] |= within[block[rows] == b].any(0)
        for b in range(blocks + 1):
            recalled[:, b] |= (distance <= radii[rows, b, None]).any(0)
    without = covered.sum(1, keepdim=True) - covered.long() > 0
    precision, recall, coverage = float(precise.double().mean()), recalled.double().mean(0), covered.any(1)
    return ManifoldMetrics(
        precision,
        math.sqrt(precision * (1 - precision) / len(x)),
        float(recall[0]),
        jackknife_error(recall[1:].tolist()),
        float(dense.mean()),
        float(dense.std()) / math.sqrt(len(x)),
        float(coverage.double().mean()),
        jackknife_error(without.double().mean(0).tolist()),
        neighbours,
        density_neighbours,
        len(x),
        len(y),
        blocks,
    )


def check_neighbours(n: int, m: int, neighbours: int, density_neighbours: int, blocks: int) -> None:
    """Raise a ValueError where ``manifold_metrics`` of n samples against m could not be computed."""
    for name, k in (("neighbours", neighbours), ("density_neighbours", density_neighbours)):
        if k < 1:
            raise ValueError(f"{name}: must be at least 1, got {k}")
        if m <= k:
            raise ValueError(f"reference: {name}={k} needs at least {k + 1} samples, got {m}")
    if not 2 <= blocks <= n // 2:
        raise ValueError(f"blocks: must be between 2 and half the {n} samples, got {blocks}")
    if n - math.ceil(n / blocks) <= neighbours:
        raise ValueError(
            f"features: {n} samples without one of {blocks} blocks are too few for neighbours={neighbours}"
        )


def _distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances [rows, M] of ``ROWS`` samples of x at a time, and which samples they are."""
    square = y.square().sum(1)
    for start in range(0, len(x), ROWS):
        rows = slice(start, min(start + ROWS, len(x)))
        part = x[rows]
        yield rows, (part.square().sum(1, keepdim=True) + square - 2 * part @ y.T).clamp_min_(0)


def _nearest(x: Tensor, k: int) -> Tensor:
    """Squared distances [N, k] of each sample to its k nearest others, ascending."""
    near = []
    for rows, distance in _distances(x, x):
        distance[:, rows].fill_diagonal_(math.inf)
        near.append(distance.topk(k, largest=False).values)
    return torch.cat(near)


def _generated_radii(x: Tensor, k: int, blocks: int) -> Tensor:
    """Squared radii [N, 1 + blocks]: among all samples, then without each block; -1 for the samples left out."""
    radii = torch.empty(len(x), blocks + 1, dtype=torch.float64)
    for rows, distance in _distances(x, x):
        distance[:, rows].fill_diagonal_(math.inf)
        parts = [distance[:, b::blocks] for b in range(blocks)]
        near = [part.topk(min(k, part.shape[1]), largest=False).values for part in parts]
        radii[rows, 0] = torch.cat(near, 1).kthvalue(k).values
        for b in range(blocks):
            radii[rows, b + 1] = torch.cat(near[:b] + near[b + 1 :], 1).kthvalue(k).values
    for b in range(blocks):
        radii[b::blocks, b + 1] = -1
    return radii
