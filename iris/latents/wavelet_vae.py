"""The wavelet VAE: Haar bands in, a small convolutional VAE on them, Haar bands out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iris.errors import SettingError
from iris.latents.base import Latent
from iris.latents.haar import dwt, idwt


class Haar(Latent):
    """The Haar transform itself as the latent: lossless, 3 * 4^levels channels, nothing to train."""

    def __init__(self, levels: int = 2) -> None:
        super().__init__(3 * 4**levels)
        self.levels, self.factor = levels, 2**levels

    def analyse(self, images: Tensor) -> Tensor:
        return dwt(images, self.levels)

    def synthesise(self, latents: Tensor) -> Tensor:
        return idwt(latents, self.levels)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a skip, group-normalised; starts as the identity. [B, width, h, w] -> same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), ZeroConv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(F.silu(self.norms[0](x)))
        return x + self.second(F.silu(self.norms[1](y)))


class ZeroConv2d(nn.Conv2d):
    """A convolution that starts at zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class WaveletVAE(Latent):
    """Haar (``levels``), then a VAE that halves the grid ``stages`` times: factor 2^(levels + stages).

    The encoder predicts mean and log-variance per latent value; ``encode`` uses the mean.

    Raises:
        SettingError: a width that 8 groups do not divide.
    """

    trained = True

    def __init__(self, levels: int = 1, stages: int = 1, channels: int = 8, width: int = 64, blocks: int = 1) -> None:
        super().__init__(channels)
        if width % 8:
            raise SettingError(f"latent.width={width} must be a multiple of 8 (normalisation groups)")
        self.levels, self.factor = levels, 2 ** (levels + stages)
        bands = 3 * 4**levels
        down: list[nn.Module] = [nn.Conv2d(bands, width, 3, padding=1)]
        up: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        for _ in range(stages):
            down += [ResidualBlock(width) for _ in range(blocks)] + [nn.Conv2d(width, width, 4, stride=2, padding=1)]
            up += [ResidualBlock(width) for _ in range(blocks)] + [nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2)]
        down += [ResidualBlock(width) for _ in range(blocks)] + [nn.Conv2d(width, 2 * channels, 1)]
        up += [ResidualBlock(width) for _ in range(blocks)] + [nn.Conv2d(width, bands, 3, padding=1)]
        self.encoder, self.decoder = nn.Sequential(*down), nn.Sequential(*up)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [B, C, h, w] of the raw latents of images [B, 3, H, W]."""
        mean, log_variance = self.encoder(dwt(images, self.levels)).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def analyse(self, images: Tensor) -> Tensor:
        return self.posterior(images)[0]

    def synthesise(self, latents: Tensor) -> Tensor:
        return idwt(self.decoder(latents), self.levels)


def vae_loss(
    vae: WaveletVAE, images: Tensor, noise: Tensor, kl_weight: float, detail_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Reconstruction + frequency-aware + KL loss of a batch; all terms are means over elements.

    Reconstruction is mean |x - x^| + mean (x - x^)^2; the frequency-aware term adds ``detail_weight`` times the mean
    absolute error of the Haar detail bands (L1 on bands with weights above one, as LiteVAE, arXiv 2405.14477, finds
    useful); KL is against a unit Gaussian, per latent value.

    Returns:
        the loss and {"mse", "kl"} for logging.
    """
    mean, log_variance = vae.posterior(images)
    reconstruction = vae.synthesise(mean + (log_variance / 2).exp() * noise)
    difference = reconstruction - images
    details = dwt(difference, 1)[:, images.shape[1] :]
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    mse = difference.square().mean()
    loss = difference.abs().mean() + mse + detail_weight * details.abs().mean() + kl_weight * kl
    return loss, {"mse": mse.detach(), "kl": kl.detach()}


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1] (peak 2) with mean squared error ``mse``."""
    return float(10 * torch.log10(torch.tensor(4.0 / max(mse, 1e-12))))
