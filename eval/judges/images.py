"""What is checked before anything is measured on images and captions, and what every judge does to images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from iris.io import pixels

TOLERANCE = 1e-3  # floats may overshoot [-1, 1] by a decoder's rounding


def check_images(
    images: Tensor | np.ndarray | Sequence[Any],
    captions: Sequence[str] | None = None,
    minimum: int = 2,
    name: str = "images",
) -> Tensor:
    """Images that can be measured, as one tensor: uint8 [N, H, W, 3], or float [N, 3, H, W] in [-1, 1].

    Args:
        images: uint8 [N, H, W, 3] in 0..255, or floats [N, 3, H, W] in [-1, 1]; or a list of single images of either
            kind, or of PIL images in mode RGB.
        captions: [N], where the measure needs them.
        minimum: how many images the measure needs.
        name: what an error calls them.

    Raises:
        ValueError: fewer than ``minimum`` images; sizes that differ; another shape, type or colour mode; pixels that
            are not finite or outside their range; as many captions as images are not there, or one is no string.
    """
    if isinstance(images, Sequence):
        images = _stacked(images, name)
    images = torch.as_tensor(images).detach()
    integers = images.dim() == 4 and images.dtype == torch.uint8 and images.shape[-1] == 3
    floats = images.dim() == 4 and images.is_floating_point() and images.shape[1] == 3
    if not integers and not floats and len(images.shape) and len(images):
        raise ValueError(
            f"{name} must be uint8 [N, H, W, 3], or floats [N, 3, H, W] in [-1, 1], "
            f"got {images.dtype} {tuple(images.shape)}"
        )
    count = len(images) if images.dim() else 0
    if count < minimum:
        raise ValueError(f"{name}: at least {minimum} are needed, got {count}")
    if 0 in images.shape[1:]:
        raise ValueError(f"{name} hold no pixels: {tuple(images.shape)}")
    if floats:
        _check_floats(images, name)
    if captions is not None:
        _check_captions(captions, count, name)
    return images


def to_float(images: Tensor) -> Tensor:
    """Float images [B, 3, H, W] in [-1, 1] of what ``check_images`` returns."""
    if images.dtype == torch.uint8:
        return pixels.to_images(images)
    return images.float()


def to_pixels(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] of what ``check_images`` returns, rounded to the nearest."""
    if images.dtype == torch.uint8:
        return images
    return pixels.to_pixels(images.float().clamp(-1, 1))


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


def _stacked(images: Sequence[Any], name: str) -> Tensor:
    if not len(images):
        return torch.empty(0)
    tensors = [_single(image, f"{name}[{i}]") for i, image in enumerate(images)]
    kinds = Counter((str(t.dtype), tuple(t.shape)) for t in tensors)
    if len(kinds) > 1:
        found = ", ".join(f"{count} of {shape} {dtype}" for (dtype, shape), count in kinds.most_common(4))
        raise ValueError(f"{name} differ in size or type: {found}; bring them to one size first")
    return torch.stack(tensors)


def _single(image: Any, name: str) -> Tensor:
    if isinstance(image, Image.Image):
        if image.mode != "RGB":
            raise ValueError(f"{name} has the colour mode {image.mode}; convert it to RGB first")
        image = np.asarray(image).copy()
    image = torch.as_tensor(image).detach()
    if image.dim() != 3:
        raise ValueError(f"{name} must be uint8 [H, W, 3] or floats [3, H, W], got {tuple(image.shape)}")
    return image


def _check_floats(images: Tensor, name: str) -> None:
    bad = (~torch.isfinite(images)).flatten(1).any(1).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{name}: {len(bad)} of {len(images)} hold pixels that are not finite, the first is number {int(bad[0])}"
        )
    low, high = float(images.min()), float(images.max())
    if low < -1 - TOLERANCE or high > 1 + TOLERANCE:
        raise ValueError(f"{name}: float pixels must lie in [-1, 1], found {low:.4g} to {high:.4g}")


def _check_captions(captions: Sequence[str], count: int, name: str) -> None:
    if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"captions must be a list of {count} strings")
    if len(captions) != count:
        raise ValueError(f"captions: one for each of the {count} {name} is needed, got {len(captions)}")
