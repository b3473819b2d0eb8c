"""A saved model of IRIS: a folder that ``IrisPipeline.save_pretrained`` or a trial wrote, or a hub name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import iris
from eval.speed.workers import Loader
from eval.subjects.base import MODEL_FILES, SampleSettings, Subject
from iris.diffusion.sampling import SamplingSettings
from iris.errors import SettingError
from iris.io.hashing import files_sha256
from iris.io.hub import fetch
from iris.model import CONFIG, LATENT_WEIGHTS, TEXT_ENCODER, WEIGHTS
from iris.nn.mixers import source_digest
from iris.pipeline import IrisPipeline
from iris.stages.latent_cache import latent_digest

# Of ``SamplingSettings`` -> of the pipeline's call, whose defaults hold where nothing is set.
CALLED = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "sampler": "sampler",
    "shift": "shift",
    "iterations": "num_iterations",
    "guidance_start": "guidance_start",
    "guidance_end": "guidance_end",
    "guidance_rescale": "guidance_rescale",
}


class IrisModel(Subject):
    """See ``Subject``.

    Raises:
        SettingError: the folder holds no pipeline, or a sampling setting cannot be used.
    """

    kind = "iris"
    loads_parts = True

    def __init__(self, model: str, sample: SampleSettings, dtype: str, device: str) -> None:
        place = Path(model).expanduser()
        self.root = place if place.is_dir() else fetch(model)
        for name in (CONFIG, WEIGHTS, LATENT_WEIGHTS):
            if not (self.root / name).is_file():
                raise SettingError(f"model={model}: {name} is missing; expected a folder written by save_pretrained")
        call = inspect.signature(IrisPipeline.__call__).parameters
        defaults = {name: call[argument].default for name, argument in CALLED.items()}
        self.settings = SamplingSettings(**defaults | sample.given(self.kind, tuple(CALLED)))
        self.model, self.name, self.batch = model, self.root.resolve().name, sample.batch
        self.sampling, self.dtype, self.device = asdict(self.settings), dtype, device
        self.size = (self._side(), self._side())

    def _side(self) -> int:
        try:
            return int(self._config["size"])
        except (ValueError, KeyError, TypeError) as error:
            raise SettingError(f"model={self.model}: {CONFIG} is not one that a pipeline wrote ({error!r})") from error

    @cached_property
    def _config(self) -> dict[str, Any]:
        return json.loads((self.root / CONFIG).read_text(encoding="utf-8"))

    def files(self) -> list[Path]:
        return [file for file in self.root.rglob("*") if file.is_file() and file.suffix in MODEL_FILES]

    def elsewhere(self) -> list[str]:
        """Of a pretrained text encoder and latent by their weights, of somebody's own mixer by its source."""
        try:
            mixer, latent = self._config["generator"]["mixer"], self._config["latent"]["options"].get("source")
            text = None if (self.root / TEXT_ENCODER).is_dir() else self._config["text"].get("source")
        except (KeyError, TypeError, AttributeError):
            return []  # the pipeline will say what is wrong
        found = [self.pipeline.model.text.fingerprint()] if text else []
        found += [latent_digest(self.pipeline.latent)] if latent else []
        return found + ([source_digest(mixer)] if ":" in mixer else [])

    def code(self) -> str:
        return _package_digest()

    def example(self) -> str:
        text = self._config["text"]
        return text["classes"][0] if text.get("name") == "labels" else super().example()

    @cached_property
    def pipeline(self) -> IrisPipeline:
        """The model, loaded."""
        pipeline = IrisPipeline.from_pretrained(self.root, torch_dtype=getattr(torch, self.dtype)).to(self.device)
        pipeline.model.generator.register_forward_hook(lambda module, given, output: self._finite("generator", output))
        decoded = pipeline.latent.synthesise  # as decode() calls it, before values are clipped
        pipeline.latent.synthesise = lambda latents: self._finite("decoder", decoded(latents))
        return pipeline

    def _finite(self, part: str, output: Tensor) -> Tensor:
        """``output``, if it is finite: pixels of other values would be black, and measured."""
        if not bool(torch.isfinite(output).all()):
            raise ValueError(f"model={self.model}: the {part} gave values that are not finite in {self.dtype}")
        return output

    def check(self, captions: Sequence[str]) -> None:
        self.pipeline.model.text.tokenise(list(captions))

    def generate(self, captions: Sequence[str | None], seed: int, first: int) -> Tensor:
        return self.pipeline.generate(list(captions), self.settings, seed, first, self.batch).cpu()

    def facts(self) -> dict[str, Any]:
        model, latent = self.pipeline.model, self.pipeline.latent
        parts = {"text encoder": model.text, "generator": model.generator, "latent": latent}
        count = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        return {"parameters": count, "nfe": self.settings.evaluations}

    def loader(self, caption: str, parts: bool = False) -> Loader:
        sampling = {name: value for name, value in self.sampling.items() if value is not None}
        return Loader(
            "eval.models.loading:load_for_measuring",
            {
                "folder": str(self.root.resolve()),
                "caption": caption,
                "dtype": self.dtype,
                "device": self.device,
                **sampling,
            },
        )


@cache
def _package_digest() -> str:
    """sha256 of the package's sources, as this process may have imported them."""
    root = Path(iris.__file__).parent
    return files_sha256(root.rglob("*.py"), root)
