"""A saved model of IRIS: a folder that ``IrisPipeline.save_pretrained`` or a trial wrote, or a hub name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.speed.workers import Loader
from eval.subjects.base import MODEL_FILES, Subject
from iris.diffusion.sampling import Sample, SamplingSettings
from iris.errors import SettingError
from iris.io.hub import fetch_pipeline
from iris.model import CONFIG, DISTILLED, LATENT_WEIGHTS, TEXT_ENCODER, WEIGHTS, read_sampling
from iris.nn.mixers import source_digest
from iris.pipeline import IrisPipeline
from iris.stages.engine import made_by
from iris.stages.latent_cache import latent_digest

SAMPLING = tuple(field.name for field in fields(SamplingSettings))


class IrisModel(Subject):
    """See ``Subject``.

    Raises:
        SettingError: the folder holds no pipeline, or a sampling setting cannot be used.
    """

    kind = "iris"
    loads_parts = True

    def __init__(self, model: str, sample: Sample, dtype: str, device: str) -> None:
        place = Path(model).expanduser()
        self.root = place if place.is_dir() else fetch_pipeline(model)
        for name in (CONFIG, WEIGHTS, LATENT_WEIGHTS):
            if not (self.root / name).is_file():
                raise SettingError(f"model={model}: {name} is missing; expected a folder written by save_pretrained")
        self.model, self.name = model, self.root.resolve().name
        self.size = (self._side(), self._side())
        given = sample.given(self.kind, SAMPLING)
        self.settings = SamplingSettings.resolved(read_sampling(self._config), **given)
        self.settings.check_student(self._config.get(DISTILLED))
        self.sampling, self.dtype, self.device = asdict(self.settings), dtype, device
        self.take(sample.batch)

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

    @cached_property
    def fingerprint(self) -> str:
        """The key of the stage that made the model, or sha256 of its files and of what lies elsewhere.

        That may have changed since, of which the stage's key knows nothing.
        """
        return (None if self.elsewhere() else made_by(self.root)) or super().fingerprint

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
