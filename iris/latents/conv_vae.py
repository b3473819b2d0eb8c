"""The convolutional VAE: the wavelet VAE's budget without the wavelet."""

from __future__ import annotations

from torch import Tensor, nn

from iris.errors import SettingError
from iris.latents.convolutions import ScaledConv2d
from iris.latents.vae import VAE

FRONTS = ("conv", "unshuffle")


class ConvVAE(VAE):
    """A VAE whose bands are not the Haar transform's: learned, or plain pixels. Options as ``VAE``, and ``front``:

    "conv": per level a 3x3 convolution of stride 2 that turns c channels into 4c, and on the way back a 1x1 convolution
    and a pixel shuffle; linear, so that the Haar transform and its inverse are among what they can learn. They add
    little to the wavelet VAE's parameters: 0.1 % at the defaults, 0.04 % at 16x (levels 1, stages 3, 16 channels).
    "unshuffle": pixel-unshuffle, of which the Haar transform is a fixed orthonormal mix: exactly the wavelet VAE with
    that mix taken out, hence the same parameters.

    Raises:
        SettingError: as ``VAE``; an unknown front.
    """

    def __init__(
        self,
        levels: int = 1,
        stages: int = 1,
        channels: int = 8,
        width: int = 64,
        blocks: int = 1,
        decoder: str = "standard",
        front: str = "conv",
    ) -> None:
        if front not in FRONTS:
            raise SettingError(f"latent.front={front!r} is unknown; allowed: {', '.join(FRONTS)}")
        super().__init__(levels, stages, channels, width, blocks, decoder)
        if front == "unshuffle":
            self.front, self.back = nn.PixelUnshuffle(2**levels), nn.PixelShuffle(2**levels)
            return
        sizes = [3 * 4**level for level in range(levels + 1)]
        self.front = nn.Sequential(*(ScaledConv2d(size, 4 * size, 3, stride=2, padding=1) for size in sizes[:-1]))
        up = [(ScaledConv2d(size, size, 1), nn.PixelShuffle(2)) for size in reversed(sizes[1:])]
        self.back = nn.Sequential(*(layer for pair in up for layer in pair))

    def to_bands(self, images: Tensor) -> Tensor:
        return self.front(images)

    def from_bands(self, bands: Tensor) -> Tensor:
        return self.back(bands)
