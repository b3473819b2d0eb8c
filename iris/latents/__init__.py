"""Latent spaces: images [B, 3, H, W] in [-1, 1] <-> standardised latents [B, C, h, w]. ``LATENTS`` names them all."""

from __future__ import annotations

import functools
import inspect

from iris.errors import SettingError
from iris.latents.base import Latent
from iris.latents.conv_vae import ConvVAE
from iris.latents.lossless import Haar, Pixel
from iris.latents.pretrained import Pretrained
from iris.latents.wavelet_vae import WaveletVAE

LATENTS: dict[str, type[Latent]] = {
    "pixel": Pixel,
    "haar": Haar,
    "wavelet_vae": WaveletVAE,
    "conv_vae": ConvVAE,
    "pretrained": Pretrained,
}


def latent_options(name: str) -> tuple[str, ...]:
    """Names of the options that the latent called ``name`` takes.

    Raises:
        SettingError: unknown latent.
    """
    if name not in LATENTS:
        raise SettingError(f"latent.name={name!r} is unknown; allowed: {', '.join(LATENTS)}")
    return _options(LATENTS[name])


@functools.cache
def _options(kind: type[Latent]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind).parameters)


def build_latent(name: str, **options: object) -> Latent:
    """Make the latent called ``name``.

    Raises:
        SettingError: unknown latent or option; a value that the latent refuses.
    """
    allowed = latent_options(name)
    unknown = [option for option in options if option not in allowed]
    if unknown:
        raise SettingError(f"latent {name}: unknown option {', '.join(unknown)}; allowed: {', '.join(allowed)}")
    return LATENTS[name](**options)
