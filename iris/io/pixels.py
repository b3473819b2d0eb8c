"""Pictures as pixels and as the numbers that networks read."""

from __future__ import annotations

import torch
from torch import Tensor


def to_images(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float images [B, 3, H, W] in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """Float images [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]."""
    return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
