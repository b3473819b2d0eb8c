"""How well images fit their captions: the CLIP score."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def clip_score(cosines: Tensor) -> tuple[float, float]:
    """100 x max(cos, 0) of each image with its own caption, averaged (Hessel et al. 2021 with the weight 100).

    The clamp is applied to each sample, as in the paper; torchmetrics clamps the mean.

    Args:
        cosines: [N] cosine similarities of image and text embeddings.

    Returns:
        (mean, standard error of the mean).

    Raises:
        ValueError: not [N] with N >= 2, a value that is not finite, or one outside [-1, 1].
    """
    cosines = torch.as_tensor(cosines).detach().to("cpu", torch.float64)
    if cosines.dim() != 1 or len(cosines) < 2:
        raise ValueError(f"cosines must be [N] with N >= 2, got {tuple(cosines.shape)}")
    if not bool(torch.isfinite(cosines).all()):
        raise ValueError("cosines: some are not finite")
    if float(cosines.abs().max()) > 1 + 1e-3:  # half-precision embeddings overshoot 1 by less than this
        raise ValueError(
            f"cosines must lie in [-1, 1], the largest is {float(cosines.abs().max()):.4g}: "
            "are the embeddings normalised?"
        )
    scores = 100 * cosines.clamp_min(0)
    return float(scores.mean()), float(scores.std()) / math.sqrt(len(scores))
