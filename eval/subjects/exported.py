"""An exported model: a folder that ``eval.export.model.export_model`` wrote, made images with in its runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.export import DTYPES, PIPELINE
from eval.export.host.pipeline import ExportedPipeline, size_of
from eval.export.host.sampling import Sampling
from eval.export.host.tokenise import TOKENIZER
from eval.speed.workers import Loader
from eval.subjects.base import Subject
from iris.diffusion.sampling import Sample, addressed_noise
from iris.errors import SettingError
from iris.stages.engine import made_by


class ExportedModel(Subject):
    """See ``Subject``. Image i starts from the noise that it would start from in PyTorch, so that arms which differ in
    runtime or precision are paired.

    Raises:
        SettingError: no whole exported model, its runtime is not installed, a sampling setting cannot be used, or a dtype
            or device other than the files are for.
    """

    kind = "exported"
    loads_parts = True

    def __init__(self, model: str, sample: Sample, dtype: str, device: str) -> None:
        self.model, self.root = model, Path(model).expanduser()
        self.pipeline = ExportedPipeline(self.root, torch.get_num_threads())
        about = self.pipeline.about
        given = sample.given(self.kind, tuple(field.name for field in fields(Sampling)))
        self.settings = self.pipeline.sampling(**given)
        self.sampling, self.size = asdict(self.settings), tuple(about["size"])
        self.name = self.root.resolve().name
        self.take(sample.batch)
        self.dtype, self.device = DTYPES[about["dtype"]], "cpu"
        libraries = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        self.notes = (f"exported to {about['runtime']} in {about['dtype']}, {about['batch']} at a time ({libraries})",)
        if dtype not in ("float32", self.dtype):  # the former is what is not chosen
            raise SettingError(f"dtype={dtype}: model={model} was exported in {about['dtype']}, which its files fix")
        if device != "cpu":
            raise SettingError(f"device={device}: exported models run on the processor; allowed: cpu")

    def files(self) -> list[Path]:
        named = [name for entry in self.pipeline.about["parts"].values() for name in entry["files"]]
        return [self.root / name for name in (PIPELINE, TOKENIZER, *named) if (self.root / name).is_file()]

    @cached_property
    def fingerprint(self) -> str:
        """The key of the stage that exported it, or sha256 of its files."""
        return made_by(self.root) or super().fingerprint

    def check(self, captions: Sequence[str]) -> None:
        self.pipeline.tokenise(list(captions))

    def example(self) -> str:
        text = self.pipeline.about["text"]
        return text["classes"][0] if text.get("name") == "labels" else super().example()

    def generate(self, captions: Sequence[str | None], seed: int, first: int) -> Tensor:
        def noise(rows: range, step: int | None) -> np.ndarray:
            return addressed_noise(seed, rows.start)((len(rows), *self.pipeline.shape), step).numpy()

        return torch.from_numpy(self.pipeline(list(captions), self.settings, noise=noise, first=first))

    def facts(self) -> dict[str, Any]:
        parts = self.pipeline.about["parts"]
        return {
            "parameters": {name: entry["parameters"] for name, entry in parts.items()},
            "bytes": {name: size_of(entry) for name, entry in parts.items()},
            "nfe": self.settings.evaluations,
        }

    def loader(self, caption: str, parts: bool = False) -> Loader:
        given = {"folder": str(self.root.resolve()), "caption": caption, **self.sampling}
        return Loader("eval.export.measuring:load_for_measuring", given)
