"""A text-to-image pipeline of diffusers: a folder with model_index.json, or a hub name with ``kind=diffusers``."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.judges.images import check_images, to_pixels
from eval.speed.workers import Loader
from eval.subjects.base import MODEL_FILES, Subject
from iris.diffusion.sampling import Sample
from iris.errors import SettingError
from iris.io.hub import no_answer
from iris.randomness import addressed

INDEX = "model_index.json"
# Setting -> argument of the pipeline's call.
CALLED = {"steps": "num_inference_steps", "guidance": "guidance_scale", "height": "height", "width": "width"}
DENOISERS = ("unet", "transformer")


class DiffusersModel(Subject):
    """See ``Subject``. A safety checker is left out: the images that it blackens would be measured.

    Raises:
        SettingError: no such pipeline, one that takes no prompt, weights that are not safetensors, a setting that it
            does not take, or no size.
    """

    kind = "diffusers"

    def __init__(self, model: str, sample: Sample, dtype: str, device: str) -> None:
        given = sample.given(self.kind, tuple(CALLED))
        self.model, self.root = model, find(model)
        self.name, self.dtype, self.device = Path(model).name, dtype, device
        self.pipeline = load(self.root, dtype, device)
        self.call = call_arguments(self.pipeline, given)
        height, width = self.call["height"], self.call["width"]
        self.size, self.sampling = (height, width), self._resolved()
        self.take(sample.batch)
        self._rows = self._images = 0
        denoiser = denoiser_of(self.pipeline)
        if denoiser is not None:
            denoiser.register_forward_pre_hook(self._count, with_kwargs=True)

    def _resolved(self) -> dict[str, Any]:
        scheduler = getattr(self.pipeline, "scheduler", None)
        named = {name: self.call[argument] for name, argument in CALLED.items() if argument in self.call}
        made_by = {"pipeline": type(self.pipeline).__name__, "scheduler": type(scheduler).__name__}
        return {**made_by, "diffusers": version("diffusers"), **named}

    def _count(self, module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        first = given[0] if given else next(iter(named.values()))
        self._rows += len(first)

    def files(self) -> list[Path]:
        return [file for file in self.root.rglob("*") if file.is_file() and file.suffix in MODEL_FILES]

    def generate(self, captions: Sequence[str | None], seed: int, first: int) -> Tensor:
        parts = []
        for start in range(0, len(captions), self.batch):
            prompts = list(captions[start : start + self.batch])
            noise = [addressed(seed, "sample", first + start + i) for i in range(len(prompts))]
            made = self.pipeline(prompt=prompts, generator=noise, output_type="np", **self.call).images
            floats = torch.from_numpy(np.asarray(made)).permute(0, 3, 1, 2).float() * 2 - 1
            parts.append(to_pixels(check_images(floats, minimum=1, name=f"images of model={self.model}")))
            self._images += len(prompts)
        return torch.cat(parts)

    def facts(self) -> dict[str, Any]:
        count = {name: sum(p.numel() for p in part.parameters()) for name, part in networks(self.pipeline).items()}
        counted = {"nfe": self._rows / self._images} if self._images and self._rows else {}
        return {"parameters": count, **counted}

    def loader(self, caption: str, parts: bool = False) -> Loader:
        return Loader(
            "eval.subjects.diffusers_measuring:load_for_measuring",
            {
                "folder": str(self.root.resolve()),
                "caption": caption,
                "dtype": self.dtype,
                "device": self.device,
                "call": self.call,
                "parts": parts,
            },
        )


def find(model: str) -> Path:
    """The pipeline's folder: itself, or what the hub or its cache gives.

    Raises:
        SettingError: there is none.
    """
    place = Path(model).expanduser()
    if place.is_dir():
        if not (place / INDEX).is_file():
            raise SettingError(f"model={model}: {INDEX} is missing; expected a folder that a diffusers pipeline wrote")
        return place
    from diffusers import DiffusionPipeline
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE or no_answer(model) is not None
    try:
        return Path(DiffusionPipeline.download(model, use_safetensors=True, local_files_only=offline))
    except Exception as error:
        raise SettingError(
            f"model={model}: neither a folder nor a pipeline that the hub or its cache gives "
            f"({str(error).splitlines()[0]})"
        ) from error


def load(folder: Path, dtype: str, device: str) -> Any:
    """The pipeline of a folder, ready to be called.

    Raises:
        SettingError: it cannot be loaded, or takes no prompt.
    """
    import diffusers
    import transformers

    for library in (diffusers, transformers):  # the terminal belongs to the command's own progress
        library.utils.logging.disable_progress_bar()
    try:
        checked = "safety_checker" in json.loads((folder / INDEX).read_text(encoding="utf-8"))
        options = {"safety_checker": None, "requires_safety_checker": False} if checked else {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch_dtype", FutureWarning)  # which older releases need
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                folder, torch_dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True, **options
            )
    except Exception as error:  # diffusers, transformers and their file readers raise nearly anything
        raise SettingError(f"model={folder}: not a pipeline that diffusers can load: {error}") from error
    if "prompt" not in inspect.signature(type(pipeline).__call__).parameters:
        raise SettingError(
            f"model={folder}: {type(pipeline).__name__} takes no prompt; text-to-image pipelines are measured"
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def call_arguments(pipeline: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the pipeline's call, its own defaults resolved.

    Raises:
        SettingError: it takes no such argument, or names no size of its own.
    """
    taken = inspect.signature(type(pipeline).__call__).parameters
    for name in given:
        if CALLED[name] not in taken:
            raise SettingError(f"sample.{name}: {type(pipeline).__name__} takes no {CALLED[name]}")
    arguments = {
        argument: given.get(name, taken[argument].default) for name, argument in CALLED.items() if argument in taken
    }
    side = native_size(pipeline)
    for name in ("height", "width"):
        if arguments.get(name) is None:
            if side is None:
                raise SettingError(f"sample.{name} is needed: {type(pipeline).__name__} names no size of its own")
            arguments[name] = side
    return arguments


def native_size(pipeline: Any) -> int | None:
    """Side in pixels of the images it makes by default, if it says so."""
    config = getattr(denoiser_of(pipeline), "config", None)
    side = getattr(pipeline, "default_sample_size", None) or getattr(config, "sample_size", None)
    return side * getattr(pipeline, "vae_scale_factor", 1) if isinstance(side, int) else None


def denoiser_of(pipeline: Any) -> nn.Module | None:
    """The network that is evaluated in each step."""
    return next((getattr(pipeline, name) for name in DENOISERS if getattr(pipeline, name, None) is not None), None)


def networks(pipeline: Any) -> dict[str, nn.Module]:
    """The pipeline's networks by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
