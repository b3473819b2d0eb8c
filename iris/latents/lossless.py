"""Latents with nothing to train: rearranged pixels and Haar bands. Both are lossless."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from iris.errors import SettingError
from iris.latents.base import Latent
from iris.latents.haar import dwt, idwt


class Pixel(Latent):
    """Pixels as the latent: each ``patch`` x ``patch`` square is one position of 3 * patch^2 channels (patchify, DiT).

    Raises:
        SettingError: patch < 1.
    """

    def __init__(self, patch: int = 4) -> None:
        if patch < 1:
            raise SettingError(f"latent.patch={patch} must be at least 1")
        super().__init__(3 * patch**2)
        self.factor = patch

    def analyse(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(images, self.factor)

    def synthesise(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, self.factor)


class Haar(Latent):
    """The Haar transform itself as the latent: 3 * 4^levels channels, factor 2^levels, all bands on one grid.

    Raises:
        SettingError: levels < 1.
    """

    def __init__(self, levels: int = 2) -> None:
        if levels < 1:
            raise SettingError(f"latent.levels={levels} must be at least 1")
        super().__init__(3 * 4**levels)
        self.levels, self.factor = levels, 2**levels

    def analyse(self, images: Tensor) -> Tensor:
        return dwt(images, self.levels)

    def synthesise(self, latents: Tensor) -> Tensor:
        return idwt(latents, self.levels)
