"""What measuring processes load: a whole model, its parts one by one, or a mixer alone, as functions of no arguments.

Measuring code knows nothing of IRIS. It calls these functions and reads their attributes: ``weights_bytes``,
``device``, ``parts`` (name -> function), and of a part ``count``, ``within`` and ``activations_bytes`` (see
``eval.models.parts.Part``).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.export import PARTS
from eval.models.parts import Part, decoder_part, generator_parts, part_of, size_of, text_part
from eval.models.sources import Drawn, Saved, Source
from iris.diffusion.sampling import SamplingSettings, addressed_noise, sample
from iris.errors import SettingError, require_choice
from iris.io.pixels import to_pixels
from iris.io.tensors import DTYPES
from iris.nn.mixers import build_mixer
from iris.randomness import addressed, initialise
from iris.text import TextEncoder, encode_prompts

CAPTION = "a large red circle in the centre on a white background"
RESIDENT = ("all", "one part")
SAMPLING = tuple(field.name for field in fields(SamplingSettings))
UNGUIDED = SamplingSettings(4)  # of a model that says nothing


@dataclass(frozen=True)
class Given:
    """What a loader is given beside the fields of ``SamplingSettings``.

    Attributes:
        folder: of a saved pipeline; or
        preset: a size of IRIS with drawn weights, which take as long and as much memory as trained ones, behind a text
            encoder of the shape of CLIP ViT-L/14; ``changes`` as in ``iris.presets``.
        caption: of the images. In a batch for a frozen text encoder all but the first have a number behind it, as a
            pipeline encodes equal captions once.
        batch: images at once.
        dtype: float32, float16 or bfloat16.
        device: cpu or cuda.
        part: load this one alone.
        resident: "all" keeps everything loaded; "one part" loads text encoder, generator and decoder when it is their
            turn in making an image, and lets go of each before the next.
    """

    folder: str | None = None
    preset: str | None = None
    changes: dict[str, Any] | None = None
    caption: str = CAPTION
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    part: str | None = None
    resident: str = "all"

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, tuple(DTYPES))
        require_choice("resident", self.resident, RESIDENT)
        if self.part is not None:
            require_choice("part", self.part, PARTS)
        if self.batch < 1:
            raise SettingError(f"batch={self.batch} must be at least 1")
        if (self.folder is None) == (self.preset is None):
            raise SettingError("give either folder=, of a saved pipeline, or preset=")

    @classmethod
    def of(cls, given: dict[str, Any]) -> Given:
        """From a loader's argument.

        Raises:
            SettingError: a name that is neither a field nor one of ``SamplingSettings``; a value that cannot be used.
        """
        own = tuple(field.name for field in fields(cls))
        for name in given:
            require_choice("the loader's argument", name, (*own, *SAMPLING))
        return cls(**{name: value for name, value in given.items() if name in own})

    def captions(self, encoder: TextEncoder) -> list[str]:
        """One for each image."""
        return [f"{self.caption} {i}" if i and encoder.frozen else self.caption for i in range(self.batch)]

    def encoding(
        self, encoder: TextEncoder, settings: SamplingSettings
    ) -> tuple[list[str], list[str] | None, torch.dtype, torch.device]:
        """What ``iris.text.encode_prompts`` takes beside the encoder."""
        against = [""] * self.batch if settings.guided else None
        return self.captions(encoder), against, DTYPES[self.dtype], torch.device(self.device)

    def source(self) -> Source:
        """Where the parts come from."""
        dtype, device = DTYPES[self.dtype], torch.device(self.device)
        if self.folder is not None:
            return Saved(Path(self.folder), dtype, device)
        return Drawn(self.preset, self.changes or {}, dtype, device)


def load_for_measuring(given: dict[str, Any]) -> Callable[[], Tensor]:
    """A function that makes ``batch`` images with a model: what speed, memory and operations are measured on.

    Args:
        given: fields of ``Given`` and of ``SamplingSettings``; what is left out is as the model says, else 4 Euler steps
            without guidance.

    Returns:
        the function, with the attributes that the module names. ``parts``: "text" (tokenised and encoded), "generator"
        (one evaluation), within it "iteration" (one pass through the core), within that "mixer", and "decoder". With
        ``part`` the function is that part alone, the generator with the parts within it; with resident="one part" it
        has no parts, and holds no weights between two calls.

    Raises:
        SettingError: an unknown name, a value that cannot be used, or a folder that holds no pipeline.
    """
    wanted = Given.of(given)
    source, chosen = wanted.source(), {name: value for name, value in given.items() if name in SAMPLING}
    settings = SamplingSettings.resolved(source.sampling or UNGUIDED, **chosen)
    if wanted.part is not None:
        return _alone(wanted, source, settings)
    load = _resident if wanted.resident == "all" else _in_turn
    return load(wanted, source, settings)


def _imports(given: dict[str, Any]) -> None:
    """Import what loading will need, so that it is counted with the runtime and not with the weights."""
    if given.get("part") in (None, "text") and Given.of(given).source().text_name == "clip":
        from transformers import CLIPTextModel, CLIPTokenizerFast  # noqa: F401  # ty: ignore[missing-module-member]


load_for_measuring.imports = _imports


def _resident(wanted: Given, source: Source, settings: SamplingSettings) -> Callable[[], Tensor]:
    """The whole model, all of it in memory."""
    pipeline = source.pipeline()
    model, latent = pipeline.model, pipeline.latent
    captions = wanted.captions(model.text)

    def generate() -> Tensor:
        return pipeline.generate(captions, settings, batch=wanted.batch)

    generate.weights_bytes = size_of(model, latent)
    generate.device = str(pipeline.device)
    grid = latent.grid(pipeline.size, pipeline.size)
    generate.parts = {
        "text": text_part(model.text, *wanted.encoding(model.text, settings)),
        **generator_parts(model.generator, grid, model.text.length, wanted.batch, settings),
        "decoder": decoder_part(latent, grid, wanted.batch),
    }
    return generate


def _alone(wanted: Given, source: Source, settings: SamplingSettings) -> Part:
    """One part, and nothing else loaded."""
    if wanted.part == "text":
        encoder = source.text()
        return text_part(encoder, *wanted.encoding(encoder, settings))
    if wanted.part == "decoder":
        latent = source.decoder()
        return decoder_part(latent, latent.grid(source.size, source.size), wanted.batch)
    parts = generator_parts(source.generator(), source.grid, source.text_length, wanted.batch, settings)
    alone = parts.pop("generator")
    alone.parts = parts
    return alone


def _in_turn(wanted: Given, source: Source, settings: SamplingSettings) -> Callable[[], Tensor]:
    """The whole model, of which one part is in memory at any time."""

    # Weights are made outside inference mode, as a pipeline's are: made inside they require no gradient, and torch.matmul
    # then takes another kernel on inputs that are not contiguous, which rounds otherwise.
    def generate() -> Tensor:
        encoder = source.text()
        with torch.inference_mode():
            text, null = encode_prompts(encoder, *wanted.encoding(encoder, settings))
        del encoder
        gc.collect()  # transformers' models hold themselves in cycles
        generator = source.generator()
        with torch.inference_mode():
            z = sample(generator, text, null, source.grid, settings, addressed_noise(0))
        del generator
        latent = source.decoder()
        with torch.inference_mode():
            return to_pixels(latent.decode(z.to(latent.mean)).float())

    generate.weights_bytes = 0
    generate.device = wanted.device
    return generate


def load_mixer(given: dict[str, Any]) -> Callable[[], Tensor]:
    """One mixer on square grids of tokens: what growth with the number of tokens is measured on.

    Args:
        given: {"mixer": name, "dim": D, "heads": n, "sides": [s, …], and optionally "width", "batch", "device"}.

    Returns:
        a function that runs it on the first grid; its ``parts`` run it on each, named by the number of tokens, "64".

    Raises:
        SettingError: an unknown mixer, or a width that heads do not divide.
    """
    device, batch, dim = given.get("device", "cpu"), given.get("batch", 1), given["dim"]
    mixer = initialise(build_mixer(given["mixer"], dim, given.get("width"), given["heads"]), 0).to(device).eval()

    def on(side: int) -> Callable[[], Tensor]:
        x = torch.randn(batch, side, side, dim, generator=addressed("measured inputs", side))
        return partial(mixer, x.to(device))

    parts = {str(side * side): part_of(mixer, partial(on, side)) for side in given["sides"]}
    first = copy(next(iter(parts.values())))
    first.parts = parts
    return first
