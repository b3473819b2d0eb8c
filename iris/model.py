"""The models, of text and of text tokens, and the folder that the former is kept in with its latent.

A folder holds config.json, the weights as safetensors, and on demand a copy of the text encoder.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iris.diffusion.sampling import SamplingSettings, addressed_noise, drawn_noise, sample
from iris.errors import SettingError
from iris.io.files import write_json
from iris.io.tensors import load_tensors, save_tensors
from iris.latents import Latent, build_latent
from iris.nn.condition import TextCondition
from iris.nn.generator import Generator, GeneratorConfig
from iris.text import CLIPText, TextEncoder, build_text_encoder

WEIGHTS, LATENT_WEIGHTS, CONFIG = "model.safetensors", "latent.safetensors", "config.json"
TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"  # folders, as diffusers names them
SAMPLING, DISTILLED = "sampling", "distilled_guidance"  # of config.json, where a model has them

CARD = """---
{{ card_data }}
---

# {{ name | default("IRIS", true) }}

A text-to-image model of the IRIS architecture (Iterative Recurrent Image Synthesis): a generator whose core is passed
several times with the same weights, in a latent space.

| part | kind | parameters |
|---|---|---|
{%- for part, kind, count in parts %}
| {{ part }} | {{ kind }} | {{ "{:,}".format(count) }} |
{%- endfor %}

Trained at {{ size }}x{{ size }} pixels with {{ iterations }} passes through the core.

    from iris import IrisPipeline

    pipe = IrisPipeline.from_pretrained("{{ name | default("FOLDER_OR_HUB_NAME", true) }}")
    pipe("a red circle").images[0].save("out.png")
"""


class TextToLatent(nn.Module):
    """The text encoder and the generator that is trained with it.

    Raises:
        SettingError: they differ in the width of text tokens.
    """

    def __init__(self, text: TextEncoder, model: Generator) -> None:
        super().__init__()
        if text.width != model.config.text_width:
            raise SettingError(
                f"model.text_width={model.config.text_width} must be the text encoder's width, {text.width}"
            )
        self.text, self.generator = text, model

    def forward(self, z: Tensor, t: Tensor, numbers: Tensor, iterations: int | None = None) -> Tensor:
        """Velocity [B, C, h, w] of latents z at times t [B] for captions as token numbers [B, L]."""
        return self.generator(z, t, self.text(numbers), iterations)


class IrisModel(nn.Module):
    """Generator and latent: text tokens in, images out. ``iris.presets`` makes it, with drawn weights.

    Args:
        config: the generator's.
        latent, latent_options: name and options of ``build_latent``.
        size: side in pixels of the images, unless ``generate`` is told otherwise.

    Raises:
        SettingError: what ``GeneratorConfig`` or ``build_latent`` refuses; a latent of other channels than ``config``.
    """

    def __init__(self, config: GeneratorConfig, latent: str, latent_options: dict[str, Any], size: int) -> None:
        super().__init__()
        self.size, self.latent_name, self.latent_options = size, latent, dict(latent_options)
        self.generator, self.latent = Generator(config), build_latent(latent, **latent_options)
        if self.latent.channels != config.channels:
            expected = self.latent.channels
            raise SettingError(f"model.channels={config.channels} must be {expected}, as the latent {latent} has")
        self.latent.grid(size, size)

    @torch.no_grad()
    def generate(
        self,
        text_tokens: Tensor,
        num_steps: int = 4,
        num_iterations: int | None = None,
        guidance_scale: float = 1.0,
        *,
        pooled: Tensor | None = None,
        null_tokens: Tensor | None = None,
        null_pooled: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        sampler: str = "euler",
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Images [B, 3, height, width] in [-1, 1], in the latent's precision, for encoded captions.

        Args:
            text_tokens: last hidden states of the text encoder, [B, L, 768].
            num_steps, sampler: of the flow.
            num_iterations: passes through the core (None: as configured).
            guidance_scale: 1 means none; others need ``null_tokens``.
            pooled: the captions as vectors [B, 768]; None: the mean of their tokens.
            null_tokens, null_pooled: likewise of what guidance leads away from, [1 or B, L, 768].
            height, width: in pixels, multiples of the latent's factor (None: as configured).
            seed: image i starts from noise addressed by (seed, i).
            generator: draws the noise instead.

        Raises:
            SettingError: text of another width; another number that cannot be used; guidance without ``null_tokens``.
        """
        settings = SamplingSettings(num_steps, sampler, guidance_scale, iterations=num_iterations)
        batch = len(text_tokens)
        text, null = self._condition("text_tokens", text_tokens, pooled, batch), None
        if null_tokens is not None:
            null = self._condition("null_tokens", null_tokens, null_pooled, batch)
        grid = self.latent.grid(self.size if height is None else height, self.size if width is None else width)
        source = addressed_noise(seed) if generator is None else drawn_noise(generator)
        z = sample(self.generator, text, null, grid, settings, source)
        return self.latent.decode(z.to(self.latent.mean.dtype))

    def _condition(self, name: str, tokens: Tensor, pooled: Tensor | None, batch: int) -> TextCondition:
        width = self.generator.config.text_width
        if tokens.dim() != 3 or tokens.shape[-1] != width or len(tokens) not in (1, batch):
            raise SettingError(f"{name} must be [{batch}, L, {width}], got {list(tokens.shape)}")
        pooled = tokens.mean(1) if pooled is None else pooled
        if tuple(pooled.shape) != (len(tokens), width):
            raise SettingError(f"pooled of {name} must be [{len(tokens)}, {width}], got {list(pooled.shape)}")
        weight = self.generator.input.weight
        tokens, pooled = (part.to(weight).expand(batch, *part.shape[1:]) for part in (tokens, pooled))
        return TextCondition(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=weight.device), pooled)


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weights are, and its batches go."""
    return next(module.parameters()).device


class Parts(NamedTuple):
    """What a pipeline is made of.

    Attributes:
        latent_name, latent_options: those of ``build_latent``.
        size: side in pixels of the images it was trained on.
        sampling: how it makes images unless a call says otherwise (None: see ``SamplingSettings.resolved``).
        distilled_guidance: of a few-step student, the scale that went into its weights; None: no student.
    """

    model: TextToLatent
    latent: Latent
    latent_name: str
    latent_options: dict[str, Any]
    size: int
    sampling: SamplingSettings | None = None
    distilled_guidance: float | None = None

    @property
    def folders(self) -> dict[str, Path]:
        """Folders of this machine that pretrained parts came from, by setting."""
        sources = {
            "latent.source": self.latent_options.get("source"),
            "model.text_source": self.model.text.to_dict().get("source"),
        }
        places = {name: Path(source).expanduser() for name, source in sources.items() if source is not None}
        return {name: place for name, place in places.items() if place.is_dir()}

    def facts(self) -> dict[str, Any]:
        """What the model card says."""
        config = self.model.generator.config
        latent = f"{self.latent_name}, {self.latent.factor}x, {self.latent.channels} channels"
        rows = [
            ("text encoder", self.model.text.to_dict()["name"], _count(self.model.text)),
            ("generator", f"{config.mixer}, dim {config.dim}", _count(self.model.generator)),
            ("latent", latent, _count(self.latent)),
        ]
        return {"parts": rows, "size": self.size, "iterations": config.iterations}


def write_folder(folder: Path, parts: Parts, include_text_encoder: bool = False) -> None:
    """Write config.json and weights.

    Pretrained parts, a CLIP text encoder and a ``pretrained`` latent, are named and not copied; with
    ``include_text_encoder`` the former goes to text_encoder/ and tokenizer/, from where ``read_folder`` takes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS, parts.model.state_dict(), {})
    save_tensors(folder / LATENT_WEIGHTS, _own_state(parts.latent), {})
    if include_text_encoder:
        _copy_text_encoder(parts.model.text, folder)
    config = {
        "generator": parts.model.generator.config.to_dict(),
        "text": parts.model.text.to_dict(),
        "latent": {"name": parts.latent_name, "options": parts.latent_options},
        "size": parts.size,
    }
    if parts.sampling is not None:
        config[SAMPLING] = asdict(parts.sampling)
    if parts.distilled_guidance is not None:
        config[DISTILLED] = parts.distilled_guidance
    write_json(folder / CONFIG, config)


def read_folder(folder: Path) -> Parts:
    """What ``write_folder`` wrote.

    Raises:
        SettingError: no such folder; a file or a pretrained part is missing or not readable.
    """
    if not folder.is_dir():
        raise SettingError(f"model={folder}: no such folder; expected one written by save_pretrained, or a hub name")
    for name in (CONFIG, WEIGHTS, LATENT_WEIGHTS):
        if not (folder / name).exists():
            raise SettingError(f"model={folder}: {name} is missing; expected a folder written by save_pretrained")
    try:
        parts = _build(json.loads((folder / CONFIG).read_text()), folder)
    except SettingError as error:
        raise SettingError(f"model={folder}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingError(f"model={folder}: {CONFIG} is not one that a pipeline wrote ({error!r})") from error
    # A frozen latent brought its weights; its mean and deviation are what was measured here.
    brought = parts.latent.state_dict() if parts.latent.frozen else {}
    try:
        parts.model.load_state_dict(load_tensors(folder / WEIGHTS)[0])
        parts.latent.load_state_dict(brought | load_tensors(folder / LATENT_WEIGHTS)[0])
    except (ValueError, RuntimeError) as error:
        raise SettingError(f"model={folder}: {error}") from error
    return parts


def _build(config: dict[str, Any], folder: Path) -> Parts:
    text, latent = dict(config["text"]), config["latent"]
    if (folder / TEXT_ENCODER).is_dir():
        text["source"] = str(folder)
    generator = Generator(GeneratorConfig.from_dict(config["generator"]))
    model = TextToLatent(build_text_encoder(text), generator)
    name, options = latent["name"], latent["options"]
    space, size = build_latent(name, **options), int(config["size"])
    return Parts(model, space, name, options, size, read_sampling(config), config.get(DISTILLED))


def read_sampling(config: dict[str, Any]) -> SamplingSettings | None:
    """How the model that config.json describes is sampled, if it says so.

    Raises:
        SettingError: not as ``write_folder`` writes it.
    """
    if SAMPLING not in config:
        return None
    try:
        return SamplingSettings(**config[SAMPLING])
    except TypeError as error:
        raise SettingError(f"{CONFIG}: {SAMPLING}={config[SAMPLING]!r} cannot be read ({error})") from error


def _own_state(latent: Latent) -> dict[str, Tensor]:
    """What of a latent has to be saved: all of it, or, if its weights came with it, what was measured here."""
    return {"mean": latent.mean, "std": latent.std} if latent.frozen else latent.state_dict()


def _copy_text_encoder(text: TextEncoder, folder: Path) -> None:
    """Put a CLIP into ``folder``; the weights of the other encoders are among the model's."""
    if text.to_dict()["name"] != "clip":
        return
    if not isinstance(text, CLIPText):
        text = build_text_encoder(text.to_dict())  # embeddings on disk name the encoder that made them
    text.model.save_pretrained(folder / TEXT_ENCODER)
    text.tokenizer.save_pretrained(folder / TOKENIZER)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
