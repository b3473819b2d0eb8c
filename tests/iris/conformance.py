"""What the conformance suite runs over: every entry of MIXERS, LATENTS and TEXT_ENCODERS, and how small ones are made.

A new entry of a registry is tested without a further line here. One whose constructor needs more than defaults (files,
a vocabulary) gets a line in ``LATENT_NEEDS`` or ``TEXTS``; one that cannot do what a test asks gets a line in
``EXCEPTIONS`` with the reason, and the suite fails as soon as that line is no longer needed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from small_clip import save_clip
from torch import Tensor, nn

from iris.errors import SettingError
from iris.latents import LATENTS, build_latent
from iris.latents.base import Latent
from iris.nn.mixers import MIXERS, MixerOptions, build_mixer, option_groups
from iris.randomness import initialise
from iris.text import (
    TEXT_ENCODERS,
    ClassLabels,
    CLIPText,
    EmbeddedText,
    TextEncoder,
    Vocabulary,
    WordEncoder,
    embed_captions,
)

# (test, case): why it fails. Each is an expected failure; one that passes fails the suite.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("test_compiles", "embedded"): "rows are read from a file, outside of any graph",
    ("test_exports", "embedded"): "rows are read from a file; what runs on a phone is the encoder that made them",
}


# Mixers

DIM, HEADS = 16, 2

# Values of the options that are numbers; those that are choices or switches are found by themselves.
MIXER_NUMBERS: dict[str, tuple[Any, ...]] = {"fourier.modes": (2,), "fourier.shrink": (0.1,)}

# Options that compute the same function in another way: the output must not change.
SAME_FUNCTION = {"spatial.form"}

SUBSETS = (
    "grfm[fourier,recurrence]",
    "grfm[fourier,spatial]",
    "grfm[recurrence,spatial]",
    "grfm[fourier]",
    "grfm[recurrence]",
    "grfm[spatial]",
)
ROWS_ALONE = (("recurrence.scan", "raster2"), ("recurrence.reset", "row"))


@dataclass(frozen=True)
class MixerCase:
    """A mixer's name and the options, ("spatial.form", "dense"), …, that differ from their defaults."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "+".join([self.name, *(f"{option}={value}" for option, value in self.options)])

    def make(self, seed: int = 0, **changes: Any) -> nn.Module:
        """The mixer with weights drawn from ``seed``; ``changes`` go to ``build_mixer``."""
        return drawn(self.build(**changes), seed)

    def build(self, **changes: Any) -> nn.Module:
        """The mixer as ``build_mixer`` gives it."""
        groups: dict[str, dict[str, Any]] = {}
        for option, value in self.options:
            group, field = option.split(".")
            groups.setdefault(group, {})[field] = value
        arguments = {"dim": DIM, "heads": HEADS, "options": MixerOptions.from_dict(groups)} | changes
        return build_mixer(self.name, **arguments)


def mixer_cases(outside: list[str]) -> list[MixerCase]:
    """All registered mixers, subsets of GRFM's pathways, and one case per option value; or those of ``outside`` mixers.

    An option is varied on the registered mixers that read the fewest option groups, so that ``spatial.form`` is tested
    on the spatial pathway and not again inside GRFM.
    """
    if outside:
        return [case for name in outside for case in [MixerCase(name), *_varied(name, option_groups(name))]]
    groups = {name: option_groups(name) for name in MIXERS}
    cases = [MixerCase(name) for name in (*MIXERS, *SUBSETS)]
    for name, read in groups.items():
        own = [group for group in read if len(read) == min(len(other) for other in groups.values() if group in other)]
        cases += _varied(name, own)
    return [*cases, MixerCase("recurrence", ROWS_ALONE)]


def _varied(name: str, groups: list[str] | tuple[str, ...]) -> list[MixerCase]:
    return [
        MixerCase(name, ((option, value),))
        for group in groups
        for option, default in mixer_options(group).items()
        for value in mixer_option_values(option)
        if value != default
    ]


def mixer_options(group: str) -> dict[str, Any]:
    """The options of one group and their defaults, {"spatial.form": "product", …}."""
    default = getattr(MixerOptions(), group)
    return {f"{group}.{field.name}": getattr(default, field.name) for field in fields(default)}


def mixer_option_values(option: str) -> tuple[Any, ...]:
    """All values of a switch or a choice; of a number, those of ``MIXER_NUMBERS``."""
    group, name = option.split(".")
    default = mixer_options(group)[option]
    if isinstance(default, bool):
        return (True, False)
    if isinstance(default, str):
        return choices(lambda value: MixerOptions.from_dict({group: {name: value}}))
    if option not in MIXER_NUMBERS:
        pytest.fail(f"{option} is neither a choice nor a switch: list values to test in MIXER_NUMBERS of {__file__}")
    return MIXER_NUMBERS[option]


def choices(make: Callable[[str], object]) -> tuple[str, ...]:
    """The values that an option allows, as the error about a wrong one lists them."""
    with pytest.raises(SettingError) as error:
        make("no such value")
    return tuple(re.search(r"allowed: (.*)$", str(error.value)).group(1).split(", "))


def may_see(case: MixerCase, reach: int | None, h: int, w: int) -> Tensor:
    """Which tokens (columns) each output (rows) may depend on, bool [h*w, h*w]: those up to ``reach`` away."""
    row, column = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
    down, across = (row[:, None] - row).abs(), (column[:, None] - column).abs()
    if case.name == "recurrence" and ("recurrence.reset", "row") in case.options:
        # A scan that starts anew in each line sees that line alone: rows, and columns where those are scanned too.
        return (down == 0) if case.options == ROWS_ALONE else (down == 0) | (across == 0)
    return torch.ones(h * w, h * w, dtype=torch.bool) if reach is None else torch.maximum(down, across) <= reach


# Latents

# Options that keep a latent small, and numbers to vary; values of options that are choices are found by themselves.
LATENT_SMALL: dict[str, dict[str, Any]] = {
    "wavelet_vae": {"width": 8, "channels": 4},
    "conv_vae": {"width": 8, "channels": 4},
}
LATENT_NUMBERS: dict[str, tuple[dict[str, Any], ...]] = {
    "pixel": ({"patch": 1}, {"patch": 2}),
    "haar": ({"levels": 1},),
    "wavelet_vae": ({"levels": 2, "stages": 0}, {"stages": 2}),
    "conv_vae": ({"levels": 2},),
}


def autoencoder_kl(folder: Path) -> str:
    return _save_autoencoder(
        folder,
        "AutoencoderKL",
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )


def autoencoder_tiny(folder: Path) -> str:
    return _save_autoencoder(
        folder,
        "AutoencoderTiny",
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )


def autoencoder_dc(folder: Path) -> str:
    blocks = ("ResBlock", "EfficientViTBlock")
    return _save_autoencoder(
        folder,
        "AutoencoderDC",
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )


def _save_autoencoder(folder: Path, kind: str, **config: Any) -> str:
    import diffusers

    if not folder.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            getattr(diffusers, kind)(**config).save_pretrained(folder)
    return str(folder)


# Options that must be given; a value that is a function writes the files it stands for and returns where they are.
LATENT_NEEDS: dict[str, tuple[dict[str, Any], ...]] = {
    "pretrained": ({"source": autoencoder_kl}, {"source": autoencoder_tiny}, {"source": autoencoder_dc})
}


@dataclass(frozen=True)
class LatentCase:
    """A latent's name and the options that it is made with."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        shown = [
            f"{option}={getattr(value, '__name__', value)}"
            for option, value in self.options
            if LATENT_SMALL.get(self.name, {}).get(option) != value
        ]
        return "+".join([self.name, *shown])

    def make(self, folder: Path, seed: int = 0) -> Latent:
        """The latent with weights drawn from ``seed``; files that it needs are written below ``folder``."""
        return drawn(self.build(folder), seed)

    def build(self, folder: Path) -> Latent:
        """The latent as ``build_latent`` gives it."""
        options = {name: value(folder / value.__name__) if callable(value) else value for name, value in self.options}
        try:
            return build_latent(self.name, **options)
        except (TypeError, SettingError) as error:
            pytest.fail(
                f"latent {self.name} cannot be made with {options} ({error}): "
                f"say in LATENT_NEEDS of {__file__} which options it needs"
            )


def latent_cases() -> list[LatentCase]:
    """All registered latents, each with every value of its options that are choices and with ``LATENT_NUMBERS``."""
    cases = []
    for name, kind in LATENTS.items():
        small = LATENT_SMALL.get(name, {})
        changes = [*LATENT_NEEDS.get(name, ({},)), *LATENT_NUMBERS.get(name, ())]
        for option, parameter in inspect.signature(kind).parameters.items():
            if isinstance(parameter.default, str):
                allowed = choices(lambda value, option=option: build_latent(name, **{option: value}))
                changes += [{option: value} for value in allowed if value != parameter.default]
        cases += [LatentCase(name, tuple((small | change).items())) for change in changes]
    return cases


# Text encoders

CAPTIONS = ["a red circle", "a blue square on green", "two small stars", "a circle"]
WIDTH = 16


def small_clip(folder: Path) -> str:
    return str(folder if folder.exists() else save_clip(folder))


# Encoders whose constructor needs arguments: a function that makes one, files below the folder it is given.
TEXTS: dict[str, Callable[[Path], TextEncoder]] = {
    "words": lambda folder: WordEncoder(Vocabulary.from_captions(CAPTIONS, 8), WIDTH, layers=2),
    "labels": lambda folder: ClassLabels(CAPTIONS, WIDTH),
    "clip": lambda folder: CLIPText(small_clip(folder / "clip")),
}
# Beside the registered ones: what stands in for an encoder, and settings that change how one computes.
MORE_TEXTS: dict[str, Callable[[Path], TextEncoder]] = {
    "clip+dtype=bfloat16": lambda folder: CLIPText(small_clip(folder / "clip"), dtype="bfloat16"),
    "embedded": lambda folder: EmbeddedText(embed_captions(TEXTS["clip"](folder), CAPTIONS, folder, "float32")),
}


@dataclass(frozen=True)
class TextCase:
    """A text encoder's name in ``TEXT_ENCODERS`` or in ``MORE_TEXTS``."""

    name: str

    def __str__(self) -> str:
        return self.name

    def make(self, folder: Path, seed: int = 0) -> TextEncoder:
        """The encoder with weights drawn from ``seed``; files that it needs are written below ``folder``."""
        return drawn(self.build(folder), seed)

    def build(self, folder: Path) -> TextEncoder:
        """The encoder as its class gives it."""
        maker = (TEXTS | MORE_TEXTS).get(self.name)
        try:
            return maker(folder) if maker else TEXT_ENCODERS[self.name]()
        except TypeError as error:
            pytest.fail(
                f"text encoder {self.name} cannot be made ({error}): "
                f"add a function that makes a small one to TEXTS of {__file__}"
            )


def text_cases() -> list[TextCase]:
    return [TextCase(name) for name in (*TEXT_ENCODERS, *MORE_TEXTS)]


# Shared


def drawn(module: nn.Module, seed: int) -> nn.Module:
    """``module`` with weights drawn from ``seed``, those among them that start at zero, as last layers of residual
    branches do: what is multiplied by zero would pass every test."""
    initialise(module, seed)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.dim() > 1 and not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draws))
    return module


def relative_error(y: Tensor, expected: Tensor) -> float:
    """|y - expected| / |expected|, root mean squares."""
    y, expected = y.detach().double(), expected.detach().double()
    return float((y - expected).norm() / expected.norm())


def loss(*outputs: Tensor) -> Tensor:
    """A scalar whose gradient reaches all values of ``outputs``, each with another weight."""
    draws = torch.Generator().manual_seed(7)
    return sum((y.float() * torch.randn(y.shape, generator=draws)).sum() + y.float().square().mean() for y in outputs)


def check_gradients(module: nn.Module, **inputs: Tensor) -> None:
    """Each parameter and each of ``inputs`` has a gradient that is finite and not zero."""
    for name, value in [*module.named_parameters(), *inputs.items()]:
        assert value.grad is not None, f"{name} has no gradient"
        assert value.grad.isfinite().all(), f"the gradient of {name} is not finite"
        assert value.grad.abs().max() > 0, f"the gradient of {name} is zero"


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def is_variant(case: object) -> bool:
    """Whether ``case`` is a part with "+" options or "[" pathways, whose default is a case of its own."""
    return any(mark in str(case) for mark in "+[")


def compiled(function: Callable[..., Any], case: object) -> Callable[..., Any]:
    """``function`` under torch.compile in one graph.

    aot_eager traces the backward too, but generates no code; variants are traced forward alone, in a third of the time.
    """
    torch._dynamo.reset()  # else recompilations of earlier tests count against this one's limit
    return torch.compile(function, backend="eager" if is_variant(case) else "aot_eager", fullgraph=True)


def exported(module: nn.Module, x: Tensor) -> Callable[..., Any]:
    """``module`` as torch.export sees it for any batch size."""
    return torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()


def expected_failures(test: str, cases: list[Any]) -> list[Any]:
    """``cases`` as pytest parameters named by str(case), those in EXCEPTIONS marked as failing."""
    reasons = {case: EXCEPTIONS.get((test, str(case))) for case in cases}
    return [
        pytest.param(case, id=str(case), marks=[pytest.mark.xfail(reason=reason, strict=True)] if reason else [])
        for case, reason in reasons.items()
    ]
