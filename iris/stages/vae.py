"""Stage vae: images to latents and back."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iris.errors import SettingError
from iris.io.files import write_json
from iris.io.hashing import digest
from iris.io.pixels import to_images, to_pixels
from iris.io.tensors import load_tensors, save_tensors
from iris.latents import LATENTS, Latent, build_latent
from iris.latents.losses import band_psnr, psnr
from iris.model import CONFIG, LATENT_WEIGHTS, device_of
from iris.randomness import initialise
from iris.stages.base import Seen, Stage
from iris.stages.data import Pixels, check_stored, described, fingerprint, held_out, size_of, store_pixels
from iris.stages.latent_cache import latent_digest
from iris.stages.parts import latent_of, latent_shape
from iris.stages.settings import VAE_TRAIN
from iris.training.vae_task import VAETask

MEASURED = 512  # held-out pictures whose reconstructions are judged
MOST, VALUES = 10_000, 1 << 28  # pictures that latents are standardised on: so many, or a gigabyte of them
SHOWN = 8
BATCH = 64  # pictures encoded at once


class NamedLatent(NamedTuple):
    """A latent, and what ``build_latent`` made it with."""

    latent: Latent
    name: str
    options: dict[str, Any]


def save_latent(folder: Path, named: NamedLatent, size: int) -> None:
    """Write what ``load_latent`` reads; a frozen latent's own weights stay where they came from."""
    folder.mkdir(parents=True, exist_ok=True)
    latent = named.latent
    state = {"mean": latent.mean, "std": latent.std} if latent.frozen else latent.state_dict()
    save_tensors(folder / LATENT_WEIGHTS, state, {})
    write_json(folder / CONFIG, {"latent": {"name": named.name, "options": named.options}, "size": size})


def load_latent(folder: Path) -> NamedLatent:
    """The latent of a folder that ``save_latent`` or a pipeline wrote.

    Raises:
        SettingError: a file is missing or not readable.
    """
    for name in (CONFIG, LATENT_WEIGHTS):
        if not (folder / name).exists():
            raise SettingError(
                f"vae={folder}: {name} is missing; expected a folder that stage=vae or save_pretrained wrote"
            )
    try:
        about = json.loads((folder / CONFIG).read_text())["latent"]
        latent = build_latent(about["name"], **about["options"])
        brought = latent.state_dict() if latent.frozen else {}
        latent.load_state_dict(brought | load_tensors(folder / LATENT_WEIGHTS)[0])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise SettingError(f"vae={folder}: {error}") from error
    return NamedLatent(latent.eval(), about["name"], about["options"])


class VAEStage(Stage):
    """Train the latent of latent.*, if it has weights to train, and measure each channel's mean and deviation."""

    def check(self) -> None:
        check_stored(self.settings.data, self.name)
        settings, self.data = self.settings, described(self.settings.data, "train")
        self.size, self.held = size_of(self.data), held_out(settings.data)
        latent = latent_of(settings)
        latent.grid(self.size, self.size)
        for options in (settings.reconstruction, settings.perceptual, settings.adversarial):
            options.require_size(self.size, self.size)
        if settings.train.gradient_checkpointing:
            raise SettingError("train.gradient_checkpointing=true: this stage has no looped core; allowed: false")

    def facts(self) -> dict[str, Any]:
        settings = self.settings
        latent = {"name": settings.latent.name, **latent_shape(settings)}
        if latent["name"] == "pretrained":
            latent = {"pretrained": latent_digest(latent_of(settings))}
        facts = {"data": fingerprint(self.data), "latent": latent}
        if not LATENTS[settings.latent.name].trained:
            return facts
        losses = {name: asdict(getattr(settings, name)) for name in ("reconstruction", "perceptual", "adversarial")}
        weights = {name: getattr(settings.latent, name) for name in ("kl_weight", "detail_weight")}
        return facts | losses | weights | {"train": {name: getattr(settings.train, name) for name in VAE_TRAIN}}

    def train(self, given: dict[str, Path]) -> dict[str, Any]:
        settings, latent = self.settings, initialise(latent_of(self.settings), self.settings.seed)
        pixels = self._stored(self.data)
        held = pixels if self.held is None else self._stored(self.held)
        self.pictures = held[: min(MEASURED, len(held))]
        if latent.trained:
            task = VAETask(
                latent,
                pixels,
                settings.train.batch,
                settings.seed,
                settings.latent.kl_weight,
                settings.latent.detail_weight,
                settings.reconstruction,
                settings.perceptual,
                settings.adversarial,
            )
            self.latent = task.vae
            self.fit(task, self._look)
        else:
            self.latent = latent
            self.desk.progress.say(f"vae: latent {settings.latent.name} has nothing to train")
        latent = latent.eval()
        result = {}
        if self.desk.processes.first:
            place, count = self.desk.processes.device, min(MOST, VALUES // (3 * self.size**2) + 1, len(pixels))
            latent.to(place).standardise(to_images(pixels[:count].to(place)), BATCH)
            save_latent(self.weights, NamedLatent(latent, settings.latent.name, latent_shape(settings)), self.size)
            result = self._look(settings.train.steps)[1]
            self.desk.progress.say(
                f"vae: PSNR {result['psnr']:.1f} dB on {len(self.pictures)} "
                f"{'held-out' if self.held else 'training'} pictures"
            )
        return {"metrics": result}

    def usage(self, weights: Path, result: dict[str, Any]) -> list[str]:
        return [f"python -m iris.training stage=text vae={weights} data={self.settings.data.name}"]

    def _stored(self, chosen: Any) -> Pixels:
        folder = self.desk.stages / f"pixels-{digest([fingerprint(chosen), chosen.train])}"
        work = f"storing {chosen.split} pictures"
        self.desk.processes.prepared(
            folder / "about.json",
            lambda: store_pixels(chosen, folder, lambda done, total: self.desk.progress.done(work, done, total)),
        )
        return Pixels(folder)

    @torch.no_grad()
    def _look(self, step: int) -> Seen:
        """Mean squared error; PSNR of pixels and bands. The picture has originals above their reconstructions."""
        place = device_of(self.latent) if list(self.latent.parameters()) else torch.device("cpu")
        images = to_images(self.pictures)
        again = torch.cat([self._reconstructed(part.to(place)) for part in images.split(BATCH)])
        error = (again - images).square().mean().item()
        columns = min(SHOWN, len(images))
        both = torch.cat([images[:columns], again[:columns]])
        self.picture(f"reconstructions-{step:06d}", to_pixels(both).numpy(), columns)
        bands = {f"band_psnr/{band}": value for band, value in band_psnr(images, again).items()}
        return error, {"psnr": psnr(error), **bands}

    def _reconstructed(self, images: Tensor) -> Tensor:
        return self.latent.synthesise(self.latent.analyse(images)).clamp(-1, 1).cpu().float()
