"""The adversarial term of a VAE's loss: a discriminator of patches, its hinge loss, and the weight of the term.

A loop that knows one module and one backward pass trains both players: ``frozen_logits`` gives the VAE its gradient
through a discriminator whose weights are constants, and the discriminator learns from reconstructions that are
detached. AdamW's state is per weight, so that each weight's update is what an optimiser of the discriminator's own
would make of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from iris.errors import SettingError
from iris.latents.base import Latent
from iris.latents.convolutions import ScaledConv2d
from iris.settings import check, setting

BALANCES = ("constant", "adaptive")
GROUPS = 8
WIDEST = 8  # times the width of the first layer
LARGEST_RATIO = 1e4


@dataclass(frozen=True)
class AdversarialOptions:
    """Settings adversarial.*: the adversarial term of a VAE's loss.

    weight: of the term; 0 turns it off.
    balance: ``constant``, as good as the other and steadier in mixed precision in LiteVAE (arXiv 2405.14477);
        ``adaptive``, LDM's (arXiv 2112.10752): ``weight`` times ``gradient_ratio``, at every step.
    start: first step, from 0, at which the term counts and the discriminator learns.
    rate: the discriminator's learning rate over the VAE's.
    width, layers: of ``PatchDiscriminator``.
    """

    weight: float = setting(0.0, "of the term; 0: none", low=0)
    balance: str = setting("constant", "adaptive: by the ratio of gradients", choices=BALANCES)
    start: int = setting(0, "first step at which it counts", low=0)
    rate: float = setting(1.0, "the discriminator's learning rate over the VAE's", low=0, above=True)
    width: int = setting(64, "of the discriminator", low=GROUPS)
    layers: int = setting(3, "of the discriminator", low=1)

    def __post_init__(self) -> None:
        check(self, "adversarial")
        if self.width % GROUPS:
            raise SettingError(f"adversarial.width={self.width!r} must be a multiple of {GROUPS} (its groups)")

    def require_size(self, height: int, width: int) -> None:
        """Raise a SettingError if no patch fits into images of this size."""
        side = min(height, width)
        if self.weight and side // 2**self.layers < 3:
            most = next((n for n in range(self.layers - 1, 0, -1) if side // 2**n >= 3), None)
            allowed = "none" if most is None else f"at most {most}"
            raise SettingError(
                f"adversarial.layers={self.layers} needs images of at least {3 * 2**self.layers} pixels "
                f"a side, not {height}x{width}; allowed: {allowed}"
            )


class RatedConv2d(ScaledConv2d):
    """A convolution that Adam moves ``rate`` times as far as its learning rate says.

    What is stored is the weight over ``rate``: Adam's step does not depend on the gradient's scale.
    """

    def __init__(self, *sizes: int, rate: float, **options: int) -> None:
        self.rate = rate  # first, because nn.Conv2d draws its weights
        super().__init__(*sizes, gain=1 / rate, **options)

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.rate * self.weight, self.rate * self.bias, self.stride, self.padding)


class PatchDiscriminator(nn.Module):
    """PatchGAN (arXiv 1611.07004): images [B, 3, H, W] -> a logit a patch [B, 1, H / 2^layers - 2, W / 2^layers - 2].

    ``layers`` 4x4 convolutions of stride 2, then two of stride 1, leaky ReLU between; three layers see 70x70 pixels.
    Normalised by groups, not by batch as LDM's: a logit must not depend on which images share its part of the batch.
    """

    def __init__(self, width: int = 64, layers: int = 3, rate: float = 1.0) -> None:
        super().__init__()
        widths = [width * min(2**layer, WIDEST) for layer in range(layers + 1)]
        parts: list[nn.Module] = [RatedConv2d(3, width, 4, rate=rate, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(layers):
            stride = 2 if layer < layers - 1 else 1
            parts += [
                RatedConv2d(widths[layer], widths[layer + 1], 4, rate=rate, stride=stride, padding=1),
                nn.GroupNorm(GROUPS, widths[layer + 1], affine=False),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*parts, RatedConv2d(widths[-1], 1, 4, rate=rate, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class AdversarialVAE(nn.Module):
    """A VAE in training and its discriminator; what is kept in the end is ``vae``."""

    def __init__(self, vae: Latent, discriminator: PatchDiscriminator) -> None:
        super().__init__()
        self.vae, self.discriminator = vae, discriminator


def frozen_logits(discriminator: nn.Module, images: Tensor) -> Tensor:
    """The discriminator's logits of ``images``, with gradients to these but none to its weights."""
    weights = {name: value.detach() for name, value in discriminator.named_parameters()}
    return functional_call(discriminator, weights, (images,))


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Half of mean max(0, 1 - real) + mean max(0, 1 + fake), of logits."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """-mean of the logits: no hinge, so that a reconstruction that is found out still has a gradient."""
    return -fake.mean()


def gradient_ratio(loss: Tensor, adversarial: Tensor, weight: Tensor) -> Tensor:
    """|grad loss| / (|grad adversarial| + 1e-4) with respect to ``weight``, at most 1e4, without gradient.

    With several processes, of the means of their losses: each has a part of the batch.
    """
    norms = [
        _mean_over_processes(torch.autograd.grad(term, weight, retain_graph=True)[0]).norm()
        for term in (loss, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=LARGEST_RATIO).detach()


def last_weight(vae: Latent) -> Tensor:
    """The weight of the layer that a latent's images come out of: the last that it registered."""
    return [weight for weight in vae.parameters() if weight.dim() > 1][-1]


def processes() -> int:
    """How many processes train together."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def _mean_over_processes(value: Tensor) -> Tensor:
    if processes() == 1:
        return value
    value = value.contiguous()
    torch.distributed.all_reduce(value)
    return value / processes()
