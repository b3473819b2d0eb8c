"""What every judge does to images before its network sees them: check, resize, split into batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.metrics.images import check_images


def check_batch(images: Tensor) -> None:
    """Raise unless images are what every judge takes.

    Raises:
        ValueError: not a float tensor [B, 3, H, W] of at least one image, with finite values in [-1, 1].
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        given = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"a judge takes float images [B, 3, H, W] in [-1, 1], not {given}")
    check_images(images, minimum=1)


def resized(images: Tensor, size: int) -> Tensor:
    """Float images [B, 3, H, W] in [-1, 1] -> float32 [B, 3, size, size], bicubic and antialiased, still in [-1, 1].

    On pixel values this is clean-fid's "clean" resize (Parmar et al. 2022, arXiv:2104.11222): antialiased, in floating
    point, not rounded, overshoot cut off. Other shapes than squares are squeezed, as there.
    """
    images = images.float()
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return images.clamp(-1.0, 1.0)


def in_batches(network: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    """Features float32 [B, D] of images [B, 3, H, W], ``size`` images at a time through ``network``."""
    return torch.cat([network(part).float() for part in images.split(size)])
