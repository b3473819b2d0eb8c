"""Latent spaces: images [B, 3, H, W] in [-1, 1] <-> standardised latents [B, C, h, w]. ``LATENTS`` names them all."""

from __future__ import annotations

import inspect

from iris.errors import SettingError
from iris.latents.base import Latent
from iris.latents.wavelet_vae import Haar, WaveletVAE

LATENTS: dict[str, type[Latent]] = {"haar": Haar, "wavelet_vae": WaveletVAE}


def build_latent(name: str, **options: object) -> Latent:
    """Make the latent called ``name``.

    Raises:
        SettingError: unknown latent or option.
    """
    if name not in LATENTS:
        raise SettingError(f"latent.name={name!r} is unknown; allowed: {', '.join(LATENTS)}")
    allowed = list(inspect.signature(LATENTS[name].__init__).parameters)[1:]
    unknown = [option for option in options if option not in allowed]
    if unknown:
        raise SettingError(f"latent {name}: unknown option {', '.join(unknown)}; allowed: {', '.join(allowed)}")
    return LATENTS[name](**options)
