"""Text in, images out: text encoder, generator and latent together, saved to and loaded from one folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iris.errors import SettingError
from iris.flow import evaluations, integrate, time_grid
from iris.generator import Generator, GeneratorConfig
from iris.latents import Latent, build_latent
from iris.randomness import image_noise
from iris.text import Vocabulary, WordEncoder
from iris.training.checkpoint import load_tensors, save_tensors
from iris.training.files import write_json
from iris.training.tasks import TextToLatent

WEIGHTS, LATENT_WEIGHTS, CONFIG = "model.safetensors", "latent.safetensors", "config.json"


@dataclass(frozen=True)
class SamplingSettings:
    """How images are made. ``guidance`` 1 means none; ``iterations`` None means as trained."""

    steps: int
    sampler: str = "euler"
    guidance: float = 1.0
    shift: float = 1.0
    iterations: int | None = None

    @property
    def evaluations(self) -> int:
        """Generator evaluations (NFE) for one image; guidance counts twice."""
        return evaluations(self.sampler, self.steps, self.guidance != 1.0)


class Pipeline:
    """A trained model ready to make images of ``size`` x ``size`` pixels."""

    def __init__(self, model: TextToLatent, latent: Latent, latent_name: str, latent_options: dict[str, Any], size: int) -> None:
        self.model, self.latent, self.size = model.eval(), latent.eval(), size
        self._latent_config = {"name": latent_name, "options": latent_options}

    @torch.inference_mode()
    def generate(
        self, captions: Sequence[str], settings: SamplingSettings, seed: int = 0, first: int = 0, batch: int = 256
    ) -> Tensor:
        """Images uint8 [len(captions), size, size, 3] of ``captions``.

        Image i starts from noise addressed by (seed, first + i), whatever the batch size.
        """
        parts = [
            self._batch(captions[start : start + batch], settings, seed, first + start)
            for start in range(0, len(captions), batch)
        ]
        return torch.cat(parts)

    def _batch(self, captions: Sequence[str], settings: SamplingSettings, seed: int, first: int) -> Tensor:
        side = self.size // self.latent.factor
        noise = image_noise(seed, first, len(captions), (self.latent.channels, side, side))
        encode = self.model.text.vocabulary.encode
        guided = settings.guidance != 1.0
        numbers = encode([*captions, *[""] * len(captions)]) if guided else encode(captions)
        text = self.model.text(numbers)

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            if not guided:
                return self.model.generator(z, t.expand(len(z)), text, settings.iterations)
            both = self.model.generator(torch.cat([z, z]), t.expand(2 * len(z)), text, settings.iterations)
            conditional, unconditional = both.chunk(2)
            return torch.lerp(unconditional, conditional, settings.guidance)

        z = integrate(velocity, noise, time_grid(settings.steps, settings.shift), settings.sampler)
        images = self.latent.decode(z)
        return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)

    def save(self, folder: Path) -> None:
        """Write config.json and safetensors weights to ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        text = self.model.text
        save_tensors(folder / WEIGHTS, self.model.state_dict(), {})
        save_tensors(folder / LATENT_WEIGHTS, self.latent.state_dict(), {})
        write_json(folder / CONFIG, {
            "generator": self.model.generator.config.to_dict(),
            "text": {"words": text.vocabulary.words, "length": text.vocabulary.length, "width": text.width,
                     "layers": len(text.layers), "heads": text.heads},
            "latent": self._latent_config,
            "size": self.size,
        })

    @classmethod
    def load(cls, folder: Path) -> Pipeline:
        """Read what ``save`` wrote.

        Raises:
            SettingError: the folder lacks a file, or a file is not readable.
        """
        for name in (CONFIG, WEIGHTS, LATENT_WEIGHTS):
            if not (folder / name).exists():
                raise SettingError(f"model={folder}: {name} is missing; expected a folder written by a trial")
        try:
            config = json.loads((folder / CONFIG).read_text())
            text = config["text"]
            encoder = WordEncoder(Vocabulary(text["words"], text["length"]), text["width"], text["layers"], text["heads"])
            model = TextToLatent(encoder, Generator(GeneratorConfig(**config["generator"])))
            latent = build_latent(config["latent"]["name"], **config["latent"]["options"])
            size = int(config["size"])
        except (ValueError, KeyError, TypeError) as error:
            raise SettingError(f"model={folder}: {CONFIG} is not one that a pipeline wrote ({error!r})") from error
        try:
            model.load_state_dict(load_tensors(folder / WEIGHTS)[0])
            latent.load_state_dict(load_tensors(folder / LATENT_WEIGHTS)[0])
        except (ValueError, RuntimeError) as error:
            raise SettingError(f"model={folder}: {error}") from error
        return cls(model, latent, config["latent"]["name"], config["latent"]["options"], size)


def load_for_measuring(given: dict[str, Any]) -> Callable[[], Tensor]:
    """A function that makes one image with a saved model: what speed, memory and operations are measured on.

    Args:
        given: {"folder": of the saved pipeline, "caption": optional, and the fields of SamplingSettings}.

    Returns:
        the function; its attribute ``weights_bytes`` is the size of all weights it holds.
    """
    pipeline = Pipeline.load(Path(given["folder"]))
    caption = given.get("caption", "a large red circle in the centre on a white background")
    settings = SamplingSettings(**{k: v for k, v in given.items() if k not in ("folder", "caption")})

    def generate() -> Tensor:
        return pipeline.generate([caption], settings)

    held = [*pipeline.model.state_dict().values(), *pipeline.latent.state_dict().values()]
    generate.weights_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
    return generate
