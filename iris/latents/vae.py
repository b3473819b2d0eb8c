"""The convolutional VAE that the trained latents share; what turns pixels into its input bands is theirs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from iris.errors import SettingError
from iris.latents.base import Latent
from iris.latents.convolutions import ZeroConv2d
from iris.latents.phone import phone_decoder

DECODERS = ("standard", "phone")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a skip, group-normalised; starts as the identity. [B, width, h, w] -> same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), ZeroConv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(F.silu(self.norms[0](x)))
        return x + self.second(F.silu(self.norms[1](y)))


class VAE(Latent):
    """Pixels -> 3 * 4^levels bands on a grid 2^levels times coarser -> a VAE that halves the grid ``stages`` times.

    A subclass defines the front end, ``to_bands`` and its inverse ``from_bands``; the factor is 2^(levels + stages).
    The encoder predicts mean and log-variance per latent value; ``encode`` uses the mean. With levels=1, stages=3 and
    channels=16 a 256x256x3 image becomes 16x16x16: 48 times fewer numbers.

    Args:
        levels: halvings by the front end.
        stages: halvings by the VAE.
        channels: of the latent.
        width: channels inside encoder and decoder.
        blocks: residual blocks per resolution.
        decoder: "standard", or "phone": ``phone_decoder``, with its own number of blocks and a width of at most 128.

    Raises:
        SettingError: a number too small, a width that 8 groups do not divide, an unknown decoder.
    """

    trained = True

    def __init__(
        self,
        levels: int = 1,
        stages: int = 1,
        channels: int = 8,
        width: int = 64,
        blocks: int = 1,
        decoder: str = "standard",
    ) -> None:
        least_values = {"levels": (levels, 1), "stages": (stages, 0), "channels": (channels, 1), "blocks": (blocks, 0)}
        for name, (value, least) in least_values.items():
            if value < least:
                raise SettingError(f"latent.{name}={value} must be at least {least}")
        if width < 8 or width % 8:
            raise SettingError(f"latent.width={width} must be a multiple of 8 (normalisation groups)")
        if decoder not in DECODERS:
            raise SettingError(f"latent.decoder={decoder!r} is unknown; allowed: {', '.join(DECODERS)}")
        super().__init__(channels)
        self.levels, self.factor = levels, 2 ** (levels + stages)
        bands = 3 * 4**levels
        self.encoder = _encoder(bands, stages, channels, width, blocks)
        if decoder == "phone":
            self.decoder = phone_decoder(channels, bands, stages, width)
        else:
            self.decoder = _decoder(channels, bands, stages, width, blocks)

    def to_bands(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> bands [B, 3 * 4^levels, H / 2^levels, W / 2^levels]."""
        raise TypeError(f"{type(self).__name__} does not define to_bands()")

    def from_bands(self, bands: Tensor) -> Tensor:
        """Bands -> images [B, 3, H, W]."""
        raise TypeError(f"{type(self).__name__} does not define from_bands()")

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [B, C, h, w] of the raw latents of images [B, 3, H, W].

        Raises:
            SettingError: ``factor`` does not divide the image size.
        """
        self.grid(*images.shape[-2:])
        mean, log_variance = self.encoder(self.to_bands(images)).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def analyse(self, images: Tensor) -> Tensor:
        return self.posterior(images)[0]

    def synthesise(self, latents: Tensor) -> Tensor:
        return self.from_bands(self.decoder(latents))


def _encoder(bands: int, stages: int, channels: int, width: int, blocks: int) -> nn.Sequential:
    """Bands [B, bands, h, w] -> mean and log-variance [B, 2 channels, h / 2^stages, w / 2^stages]."""
    layers: list[nn.Module] = [nn.Conv2d(bands, width, 3, padding=1)]
    for _ in range(stages):
        layers += [ResidualBlock(width) for _ in range(blocks)] + [nn.Conv2d(width, width, 4, stride=2, padding=1)]
    layers += [ResidualBlock(width) for _ in range(blocks)] + [nn.Conv2d(width, 2 * channels, 1)]
    return nn.Sequential(*layers)


def _decoder(channels: int, bands: int, stages: int, width: int, blocks: int) -> nn.Sequential:
    """Latents [B, channels, h, w] -> bands [B, bands, 2^stages h, 2^stages w]."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
    for _ in range(stages):
        layers += [ResidualBlock(width) for _ in range(blocks)]
        layers += [nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2)]
    layers += [ResidualBlock(width) for _ in range(blocks)] + [nn.Conv2d(width, bands, 3, padding=1)]
    return nn.Sequential(*layers)
