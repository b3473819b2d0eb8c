"""Autoencoders that others trained, through diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from iris.errors import SettingError
from iris.io.hub import fetch
from iris.latents.base import Latent

CONFIG = "config.json"
WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model-*.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
WANTED = "a folder written by diffusers' save_pretrained, or a hub name that is online or in the hub's cache on disk"

# diffusers' class: the entry of its config that lists the resolutions, and what of encode's answer is the latent.
AUTOENCODERS: dict[str, tuple[str, Callable[[object], Tensor]]] = {
    "AutoencoderKL": ("block_out_channels", lambda encoded: encoded.latent_dist.mode()),
    "AutoencoderDC": ("encoder_block_out_channels", lambda encoded: encoded.latent),
    "AutoencoderTiny": ("encoder_block_out_channels", lambda encoded: encoded.latents),
}


class Pretrained(Latent):
    """A diffusers autoencoder with its weights, frozen: AutoencoderKL (its posterior's mean), AutoencoderDC or -Tiny.

    The class, channels and factor come from the autoencoder's config.json. Raw latents are diffusers', without its
    scaling factor: ``standardise`` measures mean and standard deviation per channel instead. Images are in [-1, 1] for
    all three (diffusers' AutoencoderTiny converts to and from TAESD's [0, 1] itself); weights are held in float32.

    Args:
        source: a folder that diffusers' save_pretrained wrote, or a name on the hub, which must have safetensors there.
            With HF_HUB_OFFLINE=1 or without a network, a name is looked up in the hub's cache, without waiting.
        subfolder: where in ``source`` the autoencoder lies; None tries ``source``, then its "vae" (a whole pipeline).

    Raises:
        SettingError: no such folder or name, no autoencoder in it, one of another class or not for RGB, or unreadable
            or incomplete weights.
    """

    frozen = True

    def __init__(self, source: str | None = None, subfolder: str | None = None) -> None:
        if not source:
            raise SettingError(f"latent.source is missing; it must be {WANTED}")
        autoencoder = _load(source, _folder(source, subfolder))
        resolutions, _ = AUTOENCODERS[type(autoencoder).__name__]
        super().__init__(autoencoder.config["latent_channels"])
        self.factor = 2 ** (len(autoencoder.config[resolutions]) - 1)
        self.autoencoder = autoencoder.float().requires_grad_(False)

    def analyse(self, images: Tensor) -> Tensor:
        _, latents_of = AUTOENCODERS[type(self.autoencoder).__name__]
        return latents_of(self.autoencoder.encode(images))

    def synthesise(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents).sample


def _folder(source: str, subfolder: str | None) -> Path:
    """The folder on disk with the autoencoder's config.json and weights; fetched from the hub if it is not local."""
    places = ("", "vae") if subfolder is None else (subfolder,)
    root = Path(source).expanduser()
    if not root.is_dir():
        wanted = [f"{place}/{name}".lstrip("/") for place in places for name in (CONFIG, *WEIGHTS)]
        explain = lambda why: f"latent.source={source!r} cannot be found; it must be {WANTED} ({why})"  # noqa: E731
        root = fetch(source, wanted, explain)
    for place in places:
        if (root / place / CONFIG).is_file():
            return root / place
    tried = " nor ".join(f"{place}/{CONFIG}".lstrip("/") for place in places)
    raise SettingError(f"latent.source={source!r} has no {tried} (latent.subfolder says where); it must be {WANTED}")


def _load(source: str, folder: Path) -> nn.Module:
    import diffusers

    try:
        config = json.loads((folder / CONFIG).read_text())
        kind = config.get("_class_name")
    except (ValueError, AttributeError) as error:
        raise SettingError(f"latent.source={source!r}: {folder / CONFIG} is not a configuration ({error})") from error
    if kind not in AUTOENCODERS:
        raise SettingError(f"latent.source={source!r} holds a {kind}; allowed: {', '.join(AUTOENCODERS)}")
    if config.get("in_channels", 3) != 3:
        raise SettingError(f"latent.source={source!r} takes {config['in_channels']} channels; it must take RGB images")
    try:
        autoencoder, loaded = getattr(diffusers, kind).from_pretrained(
            folder, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SettingError(f"latent.source={source!r}: weights in {folder} cannot be read ({reason})") from error
    if loaded["missing_keys"]:  # diffusers would leave them random
        raise SettingError(f"latent.source={source!r}: weights in {folder} lack {sorted(loaded['missing_keys'])[0]}")
    return autoencoder
