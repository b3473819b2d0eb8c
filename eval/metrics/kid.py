"""Kernel inception distance: the unbiased polynomial-kernel MMD², exact over all samples, with its sampling error."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from eval.metrics.bootstrap import jackknife_interval
from eval.metrics.fid import check_features, jackknife_error

ROWS = 1024  # kernel rows held at a time: [1024, N] in float64 stays below 250 MB at N = 30 000


def kid(features: Tensor | np.ndarray, reference: Tensor | np.ndarray, blocks: int = 20) -> tuple[float, float]:
    """KID x 1000 of Binkowski et al. 2018, with the kernel (x.y / D + 1)^3, and its standard error x 1000.

    The usual mean over random subsets is an estimate of the same quantity that adds the subsets' own noise and depends
    on a random state; here every pair of samples is used once, so nothing is drawn and the value is exact. The error
    is a delete-a-block jackknife over the generated samples against the same reference, as for the Fréchet distance.

    Args:
        features: [N, D] of generated images.
        reference: [M, D] of real images.
        blocks: number of blocks, 2 <= blocks <= N / 2; samples go to blocks in turn (i mod blocks).

    Returns:
        (value, standard_error), both x 1000. The estimate is unbiased and so can be below zero.

    Raises:
        ValueError: other widths, fewer than two samples, values that are not finite, blocks outside its range.
    """
    value, replicates = kid_replicates(features, reference, blocks)
    return value, jackknife_error(replicates)


def kid_replicates(
    features: Tensor | np.ndarray, reference: Tensor | np.ndarray, blocks: int = 20
) -> tuple[float, list[float]]:
    """KID x 1000, and what it is without each block: what ``kid`` makes the error from, as ``frechet_replicates``."""
    x, y = check_features(features), check_features(reference, "reference")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features are {x.shape[1]} and {y.shape[1]} wide: two judges cannot be compared")
    if not 2 <= blocks <= len(x) // 2:
        raise ValueError(f"blocks: must be between 2 and half the {len(x)} samples, got {blocks}")
    block = torch.arange(len(x)) % blocks
    sizes = torch.bincount(block, minlength=blocks).double()
    within, across = _block_sums(x, y, block, blocks)
    real = _own_sum(y) / (len(y) * (len(y) - 1))

    def mmd(pairs: float, cross: float, count: float) -> float:
        return 1000 * (pairs / (count * (count - 1)) + real - 2 * cross / (count * len(y)))

    total_pairs, total_cross = float(within.sum()), float(across.sum())
    value = mmd(total_pairs, total_cross, len(x))
    replicates = []
    for i in range(blocks):
        pairs = total_pairs - float(within[i].sum() + within[:, i].sum() - within[i, i])
        replicates.append(mmd(pairs, total_cross - float(across[i]), len(x) - float(sizes[i])))
    return value, replicates


def kid_interval(
    features: Tensor | np.ndarray, reference: Tensor | np.ndarray, blocks: int = 20, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of KID x 1000 when both sides are drawn anew, to ask whether it can be told from 0.

    ``kid``'s error keeps the reference fixed, which is right for comparing models against one reference; here the
    reference's own sampling error, by the same jackknife over its blocks, is added. Where both sides have one
    distribution the jackknife over-states the error (the first-order term of the estimate vanishes there), so the
    interval covers 0 more often than ``confidence`` says, and not less.

    Args:
        features, reference, blocks: as for ``kid``; blocks <= M / 2 too.
        confidence: in (0, 1).

    Raises:
        ValueError: as ``kid``.
    """
    value, error = kid(features, reference, blocks)
    return jackknife_interval(value, math.hypot(error, kid(reference, features, blocks)[1]), blocks, confidence)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1]).add_(1).pow_(3)


def _own_sum(x: Tensor) -> float:
    """Sum of the kernel over all pairs of different samples."""
    total = sum(float(_kernel(rows, x).sum()) for rows in x.split(ROWS))
    return total - float(_diagonal(x).sum())


def _diagonal(x: Tensor) -> Tensor:
    return (x.square().sum(1) / x.shape[1] + 1).pow(3)


def _block_sums(x: Tensor, y: Tensor, block: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Kernel sums between blocks of x [blocks, blocks] without the diagonal, and between blocks of x and y [blocks]."""
    within = torch.zeros(blocks, blocks, dtype=torch.float64)
    across = torch.zeros(blocks, dtype=torch.float64)
    for rows, owner in zip(x.split(ROWS), block.split(ROWS), strict=True):
        columns = torch.zeros(len(rows), blocks, dtype=torch.float64).index_add_(1, block, _kernel(rows, x))
        within.index_add_(0, owner, columns)
        across.index_add_(0, owner, _kernel(rows, y).sum(1))
    within.diagonal().sub_(torch.zeros(blocks, dtype=torch.float64).index_add_(0, block, _diagonal(x)))
    return within, across
