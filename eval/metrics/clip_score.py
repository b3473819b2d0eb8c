"""How well images fit their captions: the CLIP score."""

from __future__ import annotations

import torch
from torch import Tensor


def clip_scores(cosines: Tensor) -> Tensor:
    """100 x max(cos, 0) of each image with its own caption; their mean is the CLIP score (Hessel et al. 2021, weight 100).

    The clamp is applied to each sample, as in the paper; torchmetrics clamps the mean.

    Args:
        cosines: [N] cosine similarities of image and text embeddings.

    Returns:
        float64 [N].

    Raises:
        ValueError: not [N] with N >= 1, a value that is not finite, or one outside [-1, 1].
    """
    cosines = torch.as_tensor(cosines).detach().to("cpu", torch.float64)
    if cosines.dim() != 1 or not len(cosines):
        raise ValueError(f"cosines must be [N] with N >= 1, got {tuple(cosines.shape)}")
    if not bool(torch.isfinite(cosines).all()):
        raise ValueError("cosines: some are not finite")
    if float(cosines.abs().max()) > 1 + 1e-3:  # half-precision embeddings overshoot 1 by less than this
        raise ValueError(
            f"cosines must lie in [-1, 1], the largest is {float(cosines.abs().max()):.4g}: are the embeddings normalised?"
        )
    return 100 * cosines.clamp_min(0)
