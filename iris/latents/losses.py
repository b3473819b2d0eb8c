"""What a VAE is trained on, and how far its reconstructions are from the images: PSNR of pixels and of Haar bands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from iris.errors import SettingError
from iris.latents.haar import dwt
from iris.latents.vae import VAE
from iris.settings import check, setting

BANDS = ("cA", "cH", "cV", "cD")  # PyWavelets' names in the order in which dwt stacks them
NORMS = ("l1", "l2")


@dataclass(frozen=True)
class ReconstructionOptions:
    """Settings reconstruction.*: what an error of a reconstruction costs.

    l1, l2: weights of the mean absolute and of the mean squared error of the pixels.
    bands: weights of cA, cH, cV, cD in ``band_loss``, which is added; all 0 turn it off.
    levels: of the Haar pyramid that these bands belong to.
    norm: ``l1`` or ``l2`` of a band's error. With ``l2`` and equal weights the bands only repeat the pixels' l2.
    """

    l1: float = setting(1.0, "weight of the mean absolute error", low=0)
    l2: float = setting(1.0, "weight of the mean squared error", low=0)
    bands: tuple[float, float, float, float] = setting((0.0, 0.0, 0.0, 0.0), "weights of cA, cH, cV, cD")
    levels: int = setting(1, "of the Haar pyramid that these bands belong to", low=1)
    norm: str = setting("l1", "of a band's error", choices=NORMS)

    def __post_init__(self) -> None:
        check(self, "reconstruction")
        if isinstance(self.bands, (str, int, float)) or len(self.bands) != len(BANDS):
            raise SettingError(f"reconstruction.bands={self.bands!r} must be four weights: of {', '.join(BANDS)}")
        for band, weight in zip(BANDS, self.bands, strict=True):
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
                raise SettingError(f"reconstruction.bands ({band})={weight!r} must be a number of at least 0")

    def require_size(self, height: int, width: int) -> None:
        """Raise a SettingError if images of this size do not have so many levels."""
        if any(self.bands) and (height % 2**self.levels or width % 2**self.levels):
            raise SettingError(
                f"reconstruction.levels={self.levels} needs image sizes that are multiples of "
                f"{2**self.levels}, not {height}x{width}"
            )


PLAIN = ReconstructionOptions()


class Scored(NamedTuple):
    """Loss of a batch, {"mse", "kl"} for logging, and the reconstructions [B, 3, H, W] for further terms."""

    loss: Tensor
    extras: dict[str, Tensor]
    reconstruction: Tensor


def score(
    vae: VAE,
    images: Tensor,
    noise: Tensor,
    kl_weight: float,
    detail_weight: float,
    options: ReconstructionOptions = PLAIN,
) -> Scored:
    """Reconstruct from a sample of the posterior: reconstruction + frequency-aware + KL loss, means over elements.

    Reconstruction is l1 * mean |x - x^| + l2 * mean (x - x^)^2; the frequency-aware term is ``detail_weight`` times the
    mean absolute error of the Haar detail bands (a loss on wavelet bands is what LiteVAE, arXiv 2405.14477,
    finds useful), and ``band_loss`` with a weight for each band; KL is against a unit Gaussian, per latent value.
    ``detail_weight`` = w is ``band_loss`` with weights (0, 4w/3, 4w/3, 4w/3), one level and l1: it takes its mean over
    the three bands, ``band_loss`` over all pixels.

    Args:
        vae: any latent with ``posterior`` and ``synthesise``.
        noise: unit Gaussian [B, C, h, w] for the sample of the posterior.
        kl_weight: relative to these means. LDM sums over elements: its 1e-6 at 48 times fewer numbers is
            1e-6 / 48 here.
        detail_weight: 0 turns that term off.
    """
    mean, log_variance = vae.posterior(images)
    reconstruction = vae.synthesise(mean + (log_variance / 2).exp() * noise)
    difference = reconstruction - images
    details = dwt(difference, 1)[:, images.shape[1] :]
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    mse = difference.square().mean()
    pixels = options.l1 * difference.abs().mean() + options.l2 * mse
    loss = pixels + detail_weight * details.abs().mean() + kl_weight * kl
    if any(options.bands):
        loss = loss + band_loss(difference, options.bands, options.levels, options.norm)
    return Scored(loss, {"mse": mse.detach(), "kl": kl.detach()}, reconstruction)


def vae_loss(
    vae: VAE,
    images: Tensor,
    noise: Tensor,
    kl_weight: float,
    detail_weight: float,
    options: ReconstructionOptions = PLAIN,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and extras of ``score``."""
    loss, extras, _ = score(vae, images, noise, kl_weight, detail_weight, options)
    return loss, extras


def band_loss(difference: Tensor, weights: tuple[float, ...], levels: int = 1, norm: str = "l1") -> Tensor:
    """Weighted error of the bands of a Haar pyramid of ``difference`` [B, C, H, W]: sum_b w_b sum |b|^p / (B C H W).

    The pyramid is Mallat's, as PyWavelets' wavedec2: each level splits the average of the level before. cH, cV and cD
    have one weight for all levels; that of cA belongs to the average that is left. The transform is orthonormal and a
    band counts by its share of the coefficients, so that weights of 1 and ``l2`` give the pixels' mean squared error.

    Raises:
        SettingError: H or W is not a multiple of 2^levels.
    """
    average, total, share = difference, difference.new_zeros(()), 1.0
    for _ in range(levels):
        average, *details = dwt(average).chunk(len(BANDS), 1)
        share /= len(BANDS)
        for weight, band in zip(weights[1:], details, strict=True):
            if weight:
                total = total + weight * share * _size(band, norm)
    return total + weights[0] * share * _size(average, norm) if weights[0] else total


def _size(band: Tensor, norm: str) -> Tensor:
    return band.abs().mean() if norm == "l1" else band.square().mean()


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1] (peak 2) with mean squared error ``mse``."""
    return float(10 * torch.log10(torch.tensor(4.0 / max(mse, 1e-12))))


@torch.no_grad()
def band_psnr(images: Tensor, reconstruction: Tensor) -> dict[str, float]:
    """PSNR in dB of each band of a one-level Haar transform: cA (average), cH, cV, cD (details) of [B, 3, H, W].

    Every band is held against the pixels' peak 2, so that the mean of the four squared errors is the pixels' squared
    error and a gap between bands says where it lies.

    Raises:
        SettingError: an odd image size.
    """
    errors = dwt(reconstruction.float() - images.float()).square().unflatten(1, (len(BANDS), -1)).mean((0, 2, 3, 4))
    return {band: psnr(error) for band, error in zip(BANDS, errors.tolist(), strict=True)}
