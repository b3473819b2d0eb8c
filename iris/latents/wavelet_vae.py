"""The wavelet VAE: Haar bands in, a small convolutional VAE on them, Haar bands out."""

from __future__ import annotations

from torch import Tensor

from iris.latents.haar import dwt, idwt
from iris.latents.vae import VAE


class WaveletVAE(VAE):
    """Haar (``levels``), then a VAE that halves the grid ``stages`` times: factor 2^(levels + stages). See ``VAE``."""

    def to_bands(self, images: Tensor) -> Tensor:
        return dwt(images, self.levels)

    def from_bands(self, bands: Tensor) -> Tensor:
        return idwt(bands, self.levels)
