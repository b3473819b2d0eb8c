"""Pictures that sampling starts from: read, noised, and kept where they are not repainted.

Image-to-image starts from the noised picture (SDEdit, arXiv 2108.01073); inpainting sets the known part, noised to the
time of each step, beside what is made (RePaint's condition, arXiv 2201.09865).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from iris.errors import SettingError


class Picture:
    """A picture given to be changed: where sampling starts, what it must keep, and what is pasted in the end.

    Args:
        images: [N, 3, H, W] in [-1, 1].
        clean: their latents [N, C, h, w], standardised.
        strength: the time to start from: 0 returns the reconstruction, 1 ignores what is repainted.
        mask: bool [N, 1, H, W], true where to repaint; None: everywhere.

    Raises:
        SettingError: strength outside [0, 1].
    """

    def __init__(self, images: Tensor, clean: Tensor, strength: float, mask: Tensor | None = None) -> None:
        if not 0 <= strength <= 1:
            raise SettingError(f"strength={strength} must lie in [0, 1]")
        self.images, self.clean, self.strength, self.mask = images, clean, strength, mask
        # A latent value is repainted when any pixel of its block is.
        self.repaint = None if mask is None else F.max_pool2d(mask.float(), images.shape[-1] // clean.shape[-1]).bool()

    def start(self, noise: Tensor) -> Tensor:
        """The latents [N, C, h, w] at time ``strength``; ``noise`` likewise."""
        return torch.lerp(self.clean, noise, self.strength)

    def keep(self, noise: Tensor) -> Callable[[int, Tensor, Tensor], Tensor] | None:
        """What ``integrate`` calls after each step: the known part as it would be at that time. None without a mask."""
        if self.repaint is None:
            return None
        return lambda index, t, z: torch.where(self.repaint, z, torch.lerp(self.clean, noise, float(t)))

    def finish(self, images: Tensor) -> Tensor:
        """Decoded ``images`` [N, 3, H, W] with the kept pixels of the original."""
        return images if self.mask is None else torch.where(self.mask, images, self.images.to(images.dtype))


def read_images(image: Any, height: int, width: int) -> Tensor:
    """Pictures as float [N, 3, height, width] in [-1, 1], resized if need be.

    Args:
        image: a PIL image; an array [H, W, 3], uint8 or float in [0, 1]; a tensor [3, H, W] likewise; a list or a batch
            of these: the forms that a pipeline returns.

    Raises:
        SettingError: another form, or values outside the range.
    """
    x = _read(image, "image", "RGB")
    if x.dim() != 4 or x.shape[1] != 3:
        raise SettingError(f"image must have three channels, got shape {tuple(x.shape)} as [N, C, H, W]")
    return _resized(x, height, width) * 2 - 1


def read_mask(mask: Any, height: int, width: int) -> Tensor:
    """Masks as bool [N, 1, height, width], true where white (above one half).

    Args:
        mask: as ``image`` of ``read_images``, with one channel or none: [H, W].

    Raises:
        SettingError: another form, or values outside the range.
    """
    x = _read(mask, "mask_image", "L")
    if x.dim() != 4 or x.shape[1] != 1:
        raise SettingError(f"mask_image must have one channel, got shape {tuple(x.shape)} as [N, C, H, W]")
    return _resized(x, height, width) > 0.5


def _read(given: Any, name: str, mode: str) -> Tensor:
    """Float [N, C, H, W] in [0, 1]."""
    if isinstance(given, Sequence) and not isinstance(given, str) and given:
        parts = [_read(one, name, mode) for one in given]
        if len({part.shape[1:] for part in parts}) > 1:
            raise SettingError(f"{name}: pictures of one batch must have the same size")
        return torch.cat(parts)
    if isinstance(given, Image.Image):
        given = np.array(given.convert(mode))
    if isinstance(given, np.ndarray):
        channels_last = given[None] if given.ndim == (2 if mode == "L" else 3) else given
        if mode == "L" and channels_last.ndim == 3:
            channels_last = channels_last[..., None]
        given = torch.from_numpy(np.array(channels_last)).movedim(-1, 1)
    if not isinstance(given, Tensor):
        kind = type(given).__name__
        raise SettingError(f"{name} must be a PIL image, an array, a tensor or a list of these, got {kind}")
    if mode == "L" and given.dtype == torch.uint8 and given.max() == 1:
        raise SettingError(f"{name}: uint8 values go to 255, these to 1; give zeros and ones as bool or float")
    x = given / 255 if given.dtype == torch.uint8 else given.float()
    x = x.reshape((1,) * (4 - x.dim()) + x.shape)
    if not (x.isfinite().all() and x.min() >= 0 and x.max() <= 1):
        raise SettingError(f"{name}: values must lie in [0, 1], or in 0 … 255 as uint8")
    return x


def _resized(x: Tensor, height: int, width: int) -> Tensor:
    if x.shape[-2:] == (height, width):
        return x
    return F.interpolate(x, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
