"""The sizes of IRIS: generators of 19, 47 and 135 million parameters with the latent and text width of its document.

They differ in width, heads and core layers alone; the rest is one family. The document gives totals and no layer sizes,
so widths and depths are chosen to meet them: two prelude and two coda blocks, feed-forward 3.75 times the width.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from iris.diffusion.flow import integrate, time_grid
from iris.diffusion.sampling import GuidedVelocity, SamplingSettings, addressed_noise, drawn_noise, working_dtype
from iris.errors import SettingError, require_choice
from iris.latents import build_latent
from iris.model import TextToLatent
from iris.nn.condition import TextCondition
from iris.nn.depth import Depth
from iris.nn.generator import Generator, GeneratorConfig
from iris.nn.mixers import MixerOptions
from iris.pipeline import IrisPipeline
from iris.randomness import initialise
from iris.text import TextEncoder

SIZE = 256
TEXT_WIDTH, TEXT_LENGTH = 768, 77  # CLIP ViT-L/14
LATENT = "wavelet_vae"
# 256x256x3 -> 16x16x16, 48 times fewer numbers. The phone decoder is as wide as the encoder here, 128 at most.
LATENT_OPTIONS = {"levels": 1, "stages": 3, "channels": 16, "width": 128, "blocks": 2, "decoder": "phone"}
FAMILY: dict[str, Any] = {
    "channels": LATENT_OPTIONS["channels"],
    "text_width": TEXT_WIDTH,
    "prelude": 2,
    "coda": 2,
    "iterations": 4,
    "ffn_ratio": 3.75,
    "mixer": "grfm",
}
SHAPES = {
    "tiny": {"dim": 320, "heads": 5, "core": 4},
    "small": {"dim": 512, "heads": 8, "core": 4},
    "base": {"dim": 768, "heads": 12, "core": 6},
}

OTHERS = ("latent", "latent_options", "size")  # what of a preset may be changed beside the generator


class IrisModel(nn.Module):
    """Generator and latent: text tokens in, images out. Weights are drawn, not trained.

    Raises:
        SettingError: what ``GeneratorConfig`` or ``build_latent`` refuses; a latent of other channels than ``config``.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        latent: str = LATENT,
        latent_options: dict[str, Any] = LATENT_OPTIONS,
        size: int = SIZE,
    ) -> None:
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
        weight, batch = self.generator.input.weight, len(text_tokens)
        text, null = self._condition("text_tokens", text_tokens, pooled, batch), None
        if null_tokens is not None:
            null = self._condition("null_tokens", null_tokens, null_pooled, batch)
        grid = self.latent.grid(self.size if height is None else height, self.size if width is None else width)
        shape = (batch, self.latent.channels, *grid)
        source = addressed_noise(seed) if generator is None else drawn_noise(generator)
        noise = source(shape, None).to(weight.device, working_dtype(weight.dtype))
        velocity = GuidedVelocity(self.generator, text, null, settings.guide, settings.iterations)
        z = integrate(velocity, noise, time_grid(num_steps), sampler, lambda step: source(shape, step).to(noise))
        return self.latent.decode(z.to(self.latent.mean.dtype))

    def pipeline(self, text_encoder: TextEncoder) -> IrisPipeline:
        """The same weights behind a text encoder.

        Raises:
            SettingError: its width is not the generator's.
        """
        expected = self.generator.config.text_width
        if text_encoder.width != expected:
            raise SettingError(f"the text encoder is {text_encoder.width} wide, model.text_width={expected}")
        model = TextToLatent(text_encoder, self.generator)
        return IrisPipeline(model, self.latent, self.latent_name, self.latent_options, self.size)

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


def create_iris_tiny(seed: int = 0, **changes: Any) -> IrisModel:
    """IRIS Tiny: 19,123,492 generator parameters (document: 19 M), dim 320, 5 heads, 4 core layers.

    Args:
        seed: of the initial weights.
        changes: other values of ``GeneratorConfig``'s fields (``mixer=``, ``iterations=``, ``depth=``, …), or of
            ``latent``, ``latent_options`` and ``size``.

    Raises:
        SettingError: an unknown name, or a value that cannot be used.
    """
    return _create("tiny", seed, changes)


def create_iris_small(seed: int = 0, **changes: Any) -> IrisModel:
    """IRIS Small: 46,521,904 generator parameters (document: 47 M), dim 512, 8 heads, 4 core layers.

    Arguments and errors as ``create_iris_tiny``.
    """
    return _create("small", seed, changes)


def create_iris_base(seed: int = 0, **changes: Any) -> IrisModel:
    """IRIS Base: 133,140,440 generator parameters (document: 135 M), dim 768, 12 heads, 6 core layers.

    Arguments and errors as ``create_iris_tiny``.
    """
    return _create("base", seed, changes)


PRESETS = {"tiny": create_iris_tiny, "small": create_iris_small, "base": create_iris_base}


def preset_config(size: str, changes: dict[str, Any]) -> tuple[GeneratorConfig, dict[str, Any]]:
    """What ``create_iris_tiny`` and the others make a model of, without making it.

    Args:
        size: a key of ``PRESETS``.
        changes: as theirs.

    Returns:
        the generator's configuration, and the arguments of ``IrisModel`` that ``changes`` names beside it.

    Raises:
        SettingError: an unknown size or name, or a value that cannot be used.
    """
    require_choice("preset", size, tuple(SHAPES))
    allowed = [field.name for field in fields(GeneratorConfig)]
    for name in changes:
        require_choice("the name of a change", name, (*allowed, *OTHERS))
    for name, kind in (("depth", Depth), ("mixers", MixerOptions)):
        if name in changes and not isinstance(changes[name], kind):
            raise SettingError(f"{name}={changes[name]!r} must be a {kind.__module__}.{kind.__name__}")
    config = FAMILY | SHAPES[size] | {name: value for name, value in changes.items() if name in allowed}
    return GeneratorConfig(**config), {name: changes[name] for name in OTHERS if name in changes}


def _create(size: str, seed: int, changes: dict[str, Any]) -> IrisModel:
    config, others = preset_config(size, changes)
    return initialise(IrisModel(config, **others), seed)
