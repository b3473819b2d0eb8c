"""What a VAE is trained on, and how far its reconstructions are from the images: PSNR of pixels and of Haar bands."""

from __future__ import annotations

import torch
from torch import Tensor

from iris.latents.haar import dwt
from iris.latents.vae import VAE

BANDS = ("cA", "cH", "cV", "cD")  # PyWavelets' names in the order in which dwt stacks them


def vae_loss(
    vae: VAE, images: Tensor, noise: Tensor, kl_weight: float, detail_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Reconstruction + frequency-aware + KL loss of a batch; all terms are means over elements.

    Reconstruction is mean |x - x^| + mean (x - x^)^2; the frequency-aware term adds ``detail_weight`` times the mean
    absolute error of the Haar detail bands (a loss on wavelet bands is what LiteVAE, arXiv 2405.14477, finds useful); KL is against a unit Gaussian, per latent value. The frequency-aware term is L1 because the squared error
    of all bands, equally weighted, is that of the pixels: the transform is orthonormal.

    Args:
        vae: any latent with ``posterior`` and ``synthesise``.
        noise: unit Gaussian [B, C, h, w] for the sample of the posterior.
        detail_weight: 0 turns the frequency-aware term off.

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
