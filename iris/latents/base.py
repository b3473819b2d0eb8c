"""What every latent space offers: images to standardised latents and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iris.errors import SettingError


class Latent(nn.Module):
    """Base of all latents: ``encode`` and ``decode`` work in units in which each channel has mean 0 and variance 1.

    A subclass sets ``channels`` and ``factor`` (image size over latent size) and defines ``analyse`` and ``synthesise``
    in its own units.

    Attributes:
        trained: it has weights that must be trained first.
        frozen: it has weights that are never drawn nor trained: they came with it.
    """

    channels: int
    factor: int
    trained = False
    frozen = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))

    def analyse(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> raw latents [B, C, h, w]."""
        raise TypeError(f"{type(self).__name__} does not define analyse()")

    def synthesise(self, latents: Tensor) -> Tensor:
        """Raw latents -> images [B, 3, H, W], not clipped."""
        raise TypeError(f"{type(self).__name__} does not define synthesise()")

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the latents of images with ``height`` x ``width`` pixels.

        Raises:
            SettingError: ``factor`` does not divide both.
        """
        if height % self.factor or width % self.factor:
            latent = f"the latent's factor {self.factor} ({type(self).__name__})"
            raise SettingError(f"image size {height}x{width} must be a multiple of {latent}")
        return height // self.factor, width // self.factor

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> standardised latents [B, C, H / factor, W / factor].

        Raises:
            SettingError: ``factor`` does not divide the image size.
        """
        self.grid(*images.shape[-2:])
        return (self.analyse(images) - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        """Standardised latents -> images [B, 3, H, W] in [-1, 1]."""
        return self.synthesise(latents * self.std + self.mean).clamp(-1, 1)

    @torch.no_grad()
    def standardise(self, images: Tensor, batch: int = 512) -> None:
        """Measure each channel's mean and standard deviation on ``images`` (float64 sums) and keep them."""
        self.grid(*images.shape[-2:])
        count, total, squares = 0, 0.0, 0.0
        for part in images.split(batch):
            raw = self.analyse(part).double()
            count += raw.numel() // self.channels
            total = total + raw.sum((0, 2, 3))
            squares = squares + raw.square().sum((0, 2, 3))
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=1e-12).sqrt()
        self.mean.copy_(mean.view_as(self.mean))
        # A band that never varies on this data (std 0) must not turn rounding errors into unit variance.
        self.std.copy_(std.clamp(min=1e-3).view_as(self.std))
