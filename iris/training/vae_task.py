"""A VAE as a task of the loop: reconstruction by pixel and by band, KL, what it looks like, what passes for real."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from iris.errors import SettingError
from iris.io.pixels import to_images
from iris.latents.discriminator import (
    AdversarialOptions,
    AdversarialVAE,
    PatchDiscriminator,
    frozen_logits,
    gradient_ratio,
    hinge_discriminator,
    hinge_generator,
    last_weight,
    processes,
)
from iris.latents.losses import PLAIN, ReconstructionOptions, band_psnr, score
from iris.latents.perceptual import LPIPS, PerceptualOptions, load_lpips
from iris.latents.vae import VAE
from iris.model import device_of
from iris.randomness import addressed, initialise
from iris.training.loop import WHOLE, Share
from iris.training.safety import BatchFacts
from iris.training.tasks import batch_indices


@dataclass
class VAETask:
    """Train a VAE on pixels uint8 [N, H, W, 3].

    With the adversarial term ``module`` becomes an ``AdversarialVAE``, whose discriminator is drawn from ``seed``;
    ``vae`` is the latent to keep, in any case. The loss is the VAE's: the discriminator's adds its gradient, and its
    value only to the extras. The gradient is clipped by the norm of both.

    Args:
        module: the latent, initialised.
        kl_weight, detail_weight: of ``iris.latents.losses.score``.
        reconstruction, perceptual, adversarial: what else the loss is made of; the last two are off by default.
        validation: pixels uint8 [M, H, W, 3], all of which ``validate`` and the sub-band PSNR reconstruct.
        band_psnr_every: steps between two rows with ``band_psnr/cA`` and so on, of the weights before that step's
            update; 0 never. A row is written each compute.log_every steps, so that it should be a multiple of that.

    Raises:
        SettingError: a term cannot be had at this image size or without a file; band_psnr_every without ``validation``.
    """

    module: nn.Module
    pixels: Tensor
    batch: int
    seed: int
    kl_weight: float
    detail_weight: float
    reconstruction: ReconstructionOptions = PLAIN
    perceptual: PerceptualOptions = PerceptualOptions()
    adversarial: AdversarialOptions = AdversarialOptions()
    validation: Tensor | None = None
    band_psnr_every: int = 0
    vae: VAE = field(init=False)
    lpips: LPIPS | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        for options in (self.reconstruction, self.perceptual, self.adversarial):
            options.require_size(*self.pixels.shape[1:3])
        if self.band_psnr_every < 0 or (self.band_psnr_every and self.validation is None):
            needed = "must be at least 0" if self.band_psnr_every < 0 else "needs validation images; allowed without: 0"
            raise SettingError(f"band_psnr_every={self.band_psnr_every} {needed}")
        self.vae = self.module
        if self.perceptual.weight:
            self.lpips = load_lpips(self.perceptual)  # not in ``module``: no checkpoint has to hold it
        if self.adversarial.weight:
            chosen = self.adversarial
            discriminator = initialise(PatchDiscriminator(chosen.width, chosen.layers, chosen.rate), self.seed)
            self.module = AdversarialVAE(self.vae, discriminator)

    def rows(self, step: int) -> Tensor:
        """Which images step ``step`` takes."""
        return batch_indices(len(self.pixels), self.batch, self.seed, step)

    def loss(self, step: int, share: Share = WHOLE) -> tuple[Tensor, dict[str, Tensor]]:
        self._require_whole(share)
        place = device_of(self.module)
        images = to_images(self.pixels[share.take(self.rows(step))].to(place))
        shape = (self.batch, self.vae.channels, *self.vae.grid(*images.shape[-2:]))
        noise = share.take(torch.randn(shape, generator=addressed(self.seed, "posterior", step))).to(place)
        loss, extras, reconstruction = score(
            self.vae, images, noise, self.kl_weight, self.detail_weight, self.reconstruction
        )
        if self.lpips is not None:
            distance = self.lpips.to(place)(reconstruction, images)
            loss, extras["lpips"] = loss + self.perceptual.weight * distance, distance.detach()
        if self.adversarial.weight and step >= self.adversarial.start:
            loss, players = self._play(loss, images, reconstruction)
            extras |= players
        if self.band_psnr_every and (step + 1) % self.band_psnr_every == 0:
            measured = band_psnr(*self._validate())
            extras |= {f"band_psnr/{band}": torch.tensor(value, device=place) for band, value in measured.items()}
        return loss, extras

    def describe(self, step: int) -> BatchFacts:
        """What a message about step ``step`` names."""
        weights = {"vae.kl_weight": self.kl_weight, "vae.detail_weight": self.detail_weight}
        for name in ("perceptual", "adversarial"):
            if weight := getattr(self, name).weight:
                weights[f"{name}.weight"] = weight
        return BatchFacts(self.rows(step).tolist(), tuple(self.pixels.shape[1:]), weights)

    def validate(self) -> float:
        """Mean squared error of the validation images' reconstructions from the posterior's mean.

        Raises:
            SettingError: there are none.
        """
        if self.validation is None:
            raise SettingError("compute.validate_every: this stage was given no validation images; allowed: 0")
        images, reconstruction = self._validate()
        return (reconstruction - images).square().mean().item()

    def _play(self, loss: Tensor, images: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """``loss`` with the adversarial term and the gradient of the discriminator's own loss, and what to log."""
        discriminator = self.module.discriminator
        fooled = hinge_generator(frozen_logits(discriminator, reconstruction))
        weight = loss.new_tensor(self.adversarial.weight)
        if self.adversarial.balance == "adaptive":
            weight = weight * gradient_ratio(loss, fooled, last_weight(self.vae))
        taught = hinge_discriminator(discriminator(images), discriminator(reconstruction.detach()))
        extras = {"generator": fooled.detach(), "discriminator": taught.detach(), "adversarial_weight": weight}
        return loss + weight * fooled + (taught - taught.detach()), extras

    def _require_whole(self, share: Share) -> None:
        """Raise a SettingError if an adaptive weight cannot be had: it is no mean over the shares of a batch.

        Processes can add up their gradients; shares that come one after the other cannot.
        """
        if self.adversarial.weight and self.adversarial.balance == "adaptive" and share.of != processes():
            raise SettingError(
                f"compute.accumulate={share.of // processes()} must be 1 with adversarial.balance=adaptive,"
                " whose weight is that of a whole batch; or set adversarial.balance=constant"
            )

    @torch.no_grad()
    def _validate(self) -> tuple[Tensor, Tensor]:
        """The validation images and their reconstructions, as ``decode`` gives them."""
        images = to_images(self.validation.to(device_of(self.module)))
        parts = [self.vae.synthesise(self.vae.analyse(part)).clamp(-1, 1) for part in images.split(self.batch)]
        return images, torch.cat(parts)
