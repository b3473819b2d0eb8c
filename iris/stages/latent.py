"""Stage vae: images to latents and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iris.errors import SettingError
from iris.io.files import write_json
from iris.io.pixels import to_images, to_pixels
from iris.io.tensors import load_tensors, save_tensors
from iris.latents import LATENTS, Latent, build_latent
from iris.latents.losses import band_psnr, psnr
from iris.model import CONFIG, LATENT_WEIGHTS, device_of
from iris.randomness import initialise
from iris.settings import facts
from iris.stages.data import Pictures, held_out, size_of, stored, unselected
from iris.stages.engine import Context
from iris.stages.latent_cache import latent_digest
from iris.stages.parts import check_size, latent_of, latent_shape
from iris.stages.settings import Recipe
from iris.stages.trained import Seen, Trained
from iris.training.vae_task import VAETask

MEASURED = 512  # held-out pictures whose reconstructions are judged
MOST, VALUES = 10_000, 1 << 28  # pictures that latents are standardised on: so many, or a gigabyte of them
SHOWN = 8


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
                f"latent.weights={folder}: {name} is missing; expected a folder that stage=vae or save_pretrained wrote"
            )
    try:
        about = json.loads((folder / CONFIG).read_text())["latent"]
        latent = build_latent(about["name"], **about["options"])
        brought = latent.state_dict() if latent.frozen else {}
        latent.load_state_dict(brought | load_tensors(folder / LATENT_WEIGHTS)[0])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise SettingError(f"latent.weights={folder}: {error}") from error
    return NamedLatent(latent.eval(), about["name"], about["options"])


class LatentStage(Trained):
    """Train the latent of latent.*, if it has weights to train, and measure each channel's mean and deviation."""

    kind = "latent"
    stage = "vae"

    def __init__(self, context: Context, recipe: Recipe) -> None:
        data = unselected(stored(recipe.data))
        self.pictures = Pictures(context, data.source("train"))
        held = held_out(data)
        self.held = None if held is None else Pictures(context, held)
        super().__init__(context, recipe, {"data": self.pictures})

    @property
    def label(self) -> str:
        return f"latent {self.recipe.latent.name}"

    @property
    def uses(self) -> dict[str, Pictures]:
        return {} if self.held is None else {"held": self.held}

    @property
    def seed(self) -> int:
        """Of weights and batches."""
        return self.recipe.seed if self.recipe.vae.seed is None else self.recipe.vae.seed

    def check(self) -> None:
        recipe, size = self.recipe, size_of(self.pictures.source)
        check_size(recipe, size)
        for options in (recipe.reconstruction, recipe.perceptual, recipe.adversarial):
            options.require_size(size, size)
        if recipe.stage == self.stage and recipe.compute.gradient_checkpointing:
            raise SettingError("compute.gradient_checkpointing=true: this stage has no looped core; allowed: false")

    def facts(self) -> dict[str, Any]:
        recipe, name = self.recipe, self.recipe.latent.name
        if name == "pretrained":
            return {"pretrained": latent_digest(latent_of(recipe))}
        known = {"latent": {"name": name, **latent_shape(recipe)}}
        if not LATENTS[name].trained:
            return known
        losses = {group: facts(getattr(recipe, group)) for group in ("reconstruction", "perceptual", "adversarial")}
        training = {key: value for key, value in facts(recipe.vae).items() if key != "seed"}
        return known | losses | {"training": training, "seed": self.seed, "precision": recipe.compute.precision}

    def work(self) -> dict[str, Any]:
        recipe, latent = self.recipe, initialise(latent_of(self.recipe), self.seed)
        pixels = self.pictures.pixels()
        held = pixels if self.held is None else self.held.pixels()
        self.judged = held[: min(MEASURED, len(held))]
        if latent.trained:
            task = VAETask(
                latent,
                pixels,
                recipe.vae.batch,
                self.seed,
                recipe.vae.kl_weight,
                recipe.vae.detail_weight,
                recipe.reconstruction,
                recipe.perceptual,
                recipe.adversarial,
            )
            self.latent = task.vae
            self.fit(task, self._look)
        else:
            self.latent = latent
        latent, size = latent.eval(), size_of(self.pictures.source)
        if not self.context.processes.first:
            return {}
        place, count = self.context.processes.device, min(MOST, VALUES // (3 * size**2) + 1, len(pixels))
        latent.to(place).standardise(to_images(pixels[:count].to(place)), at_once(size))
        save_latent(self.place, NamedLatent(latent, recipe.latent.name, latent_shape(recipe)), size)
        found = self._look(recipe.vae.steps)[1]
        self.context.progress.say(
            f"{self.label}: PSNR {found['psnr']:.1f} dB on {len(self.judged)} "
            f"{'training' if self.held is None else 'held-out'} pictures"
        )
        return {"metrics": found, "parameters": sum(p.numel() for p in latent.parameters())}

    def told(self, row: dict[str, float]) -> dict[str, float]:
        return row | {"psnr": psnr(row["mse"])}

    def usage(self, weights: Path) -> list[str]:
        return [f"python -m iris.training stage=text latent.weights={weights} data={self.recipe.data.name}"]

    @torch.no_grad()
    def _look(self, step: int) -> Seen:
        """Mean squared error; PSNR of pixels and bands. The picture has originals above their reconstructions."""
        place = device_of(self.latent) if list(self.latent.parameters()) else torch.device("cpu")
        images = to_images(self.judged)
        parts = images.split(at_once(images.shape[-1]))
        again = torch.cat([self._reconstructed(part.to(place)) for part in parts])
        error = (again - images).square().mean().item()
        columns = min(SHOWN, len(images))
        both = torch.cat([images[:columns], again[:columns]])
        self.picture(f"reconstructions-{step:06d}", to_pixels(both).numpy(), columns)
        bands = {f"band_psnr/{band}": value for band, value in band_psnr(images, again).items()}
        return error, {"psnr": psnr(error), **bands}

    def _reconstructed(self, images: Tensor) -> Tensor:
        return self.latent.synthesise(self.latent.analyse(images)).clamp(-1, 1).cpu().float()


def at_once(size: int) -> int:
    """Pictures of ``size`` pixels a side that an autoencoder takes at once: 512 small ones, 64 of 256 pixels."""
    return max(1, min(512, (1 << 22) // size**2))
