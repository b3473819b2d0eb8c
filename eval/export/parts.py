"""What of a model is exported: text encoder, generator and decoder, each a module of tensors with static shapes.

A sampler stays outside: it is a loop of a few lines, which the host has (``eval.export.host``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from iris.errors import SettingError
from iris.nn.condition import TextCondition
from iris.nn.scan import traced_as
from iris.text import TextEncoder, build_text_encoder

if TYPE_CHECKING:
    from iris.latents import Latent
    from iris.model import IrisModel
    from iris.pipeline import IrisPipeline

TEXT_LENGTH = 77  # tokens of a model without a text encoder: CLIP's
TIMES = ("t", "progress")  # inputs that stay float32: half precision would make 0.999 a 1
PRECISE = ("generator.input.weight", "generator.injection.weight", "generator.output.weight")


@dataclass(frozen=True)
class ExportPart:
    """A module, the tensors that it is called with, and what the runtime calls inputs and outputs.

    The inputs' shapes are those that are exported. Numbers go in and come out as float32 (token numbers as int64, masks
    as bool) whatever the module computes in, so that a host can swap the files of one precision for another's.

    ``precise``: names of the weights that are not quantised. They are few and read what is not normalised: the latent,
    the looped state, and the velocity. With them in 8 bits too, the shipped model's error is three times as large.
    """

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    precise: tuple[str, ...] = ()

    def outputs(self) -> tuple[Tensor, ...]:
        """What PyTorch makes of the inputs: what an exported file is compared with."""
        with torch.no_grad():
            answer = self.module(*self.inputs)
        return answer if isinstance(answer, tuple) else (answer,)

    def signature(self) -> dict[str, dict[str, Any]]:
        """What pipeline.json says of the module as a method: "inputs" and "outputs", name -> shape and dtype."""
        named = {"inputs": (self.input_names, self.inputs), "outputs": (self.output_names, self.outputs())}
        return {
            kind: {
                name: {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}
                for name, x in zip(names, tensors, strict=True)
            }
            for kind, (names, tensors) in named.items()
        }

    def to(self, dtype: torch.dtype) -> ExportPart:
        """The part with a copy of its weights in ``dtype``; inputs and outputs stay float32.

        Normalisation, recurrence, transform and times compute in float32 inside, because the modules do.
        """
        kept = [number for number, name in enumerate(self.input_names) if name in TIMES]
        return replace(self, module=Cast(copy.deepcopy(self.module).to(dtype), dtype, kept).eval())

    def size(self) -> int:
        """Bytes of the weights."""
        held = {id(tensor): tensor for tensor in (*self.module.parameters(), *self.module.buffers())}
        return sum(tensor.numel() * tensor.element_size() for tensor in held.values())


class TextPart(nn.Module):
    """Token numbers int64 [B, N] -> tokens [B, L, W], mask bool [B, L], pooled [B, W]."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(self.encoder(numbers))


class GeneratorPart(nn.Module):
    """One evaluation: z [B, C, h, w], t [B], tokens [B, L, W], mask bool [B, L], pooled [B, W] -> velocity, as z.

    The number of passes through the core is fixed.
    """

    def __init__(self, generator: nn.Module, iterations: int) -> None:
        super().__init__()
        self.generator, self.iterations = generator, iterations

    def forward(self, z: Tensor, t: Tensor, tokens: Tensor, mask: Tensor, pooled: Tensor) -> Tensor:
        return self.generator(z, t, TextCondition(tokens, mask, pooled), self.iterations)


class DecoderPart(nn.Module):
    """Standardised latents [B, C, h, w] -> images [B, 3, H, W] in [-1, 1]."""

    def __init__(self, latent: nn.Module) -> None:
        super().__init__()
        self.latent = latent

    def forward(self, latents: Tensor) -> Tensor:
        return self.latent.decode(latents)


class Cast(nn.Module):
    """A part that computes in ``dtype`` between float32 inputs and outputs; inputs numbered ``kept`` are not cast."""

    def __init__(self, part: nn.Module, dtype: torch.dtype, kept: Sequence[int]) -> None:
        super().__init__()
        self.part, self.dtype, self.kept = part, dtype, frozenset(kept)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        given = (
            x.to(self.dtype) if x.is_floating_point() and number not in self.kept else x
            for number, x in enumerate(inputs)
        )
        answer = self.part(*given)
        if isinstance(answer, tuple):
            return tuple(y.float() if y.is_floating_point() else y for y in answer)
        return answer.float()


def parts_of(
    model: IrisPipeline | IrisModel,
    batch: int = 1,
    size: int | tuple[int, int] | None = None,
    iterations: int | None = None,
    text_length: int = TEXT_LENGTH,
) -> dict[str, ExportPart]:
    """The parts of ``model`` by name: "text" (of a pipeline), "generator" and "decoder".

    Guidance needs the velocity with and without the text: either two evaluations at ``batch``, or one at twice the
    batch, conditional rows first. Both are the same file called differently, so guidance is not exported.

    Args:
        model: a pipeline, or a preset, which has no text encoder.
        batch: images at a time, the first dimension of everything.
        size: pixels, one number or (height, width) (None: as trained).
        iterations: passes through the core (None: as trained).
        text_length: tokens of a preset's text; a pipeline's come from its encoder.

    Raises:
        SettingError: a size that the latent's factor does not divide, iterations that the generator cannot have,
            weights not in float32, or a generator that carries its state (its first evaluation is another function).
        ValueError: batch or text_length below 1.
    """
    if batch < 1 or text_length < 1:
        raise ValueError(f"batch and text_length must be at least 1, got {batch} and {text_length}")
    generator, encoder = _generator_and_text(model)
    config = generator.config
    iterations = _check(generator, iterations)
    height, width = (size, size) if isinstance(size, int) else size or (model.size, model.size)
    if min(height, width) < 1:
        raise SettingError(f"size={height}x{width} must be at least 1x1")
    draws = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, config.channels, *model.latent.grid(height, width), generator=draws)
    parts = {}
    if encoder is not None:
        numbers = encoder.tokenise(_captions(encoder, batch))
        parts["text"] = ExportPart("text", TextPart(encoder), (numbers,), ("numbers",), ("tokens", "mask", "pooled"))
        tokens, mask, pooled = parts["text"].outputs()
        tokens, pooled = tokens.float(), pooled.float()
    else:
        tokens = torch.randn(batch, text_length, config.text_width, generator=draws)
        mask, pooled = torch.ones(batch, text_length, dtype=torch.bool), tokens.mean(1)
    times = torch.linspace(1, 0, batch + 2)[1:-1]
    parts["generator"] = ExportPart(
        "generator",
        GeneratorPart(generator, iterations),
        (latents, times, tokens, mask, pooled),
        ("z", "t", "tokens", "mask", "pooled"),
        ("velocity",),
        PRECISE,
    )
    parts["decoder"] = ExportPart(
        "decoder", DecoderPart(decoding_only(model.latent, latents)), (latents,), ("latents",), ("images",)
    )
    for part in parts.values():
        part.module.eval()
    return parts


def agreement(found: Sequence[Any], expected: Sequence[Any], what: str = "outputs") -> dict[str, float]:
    """How far arrays, or tensors, are from what PyTorch computes in float32; of several the worst.

    Returns:
        {"rms": root mean square of the difference over that of what is expected, "max": largest over largest}.

    Raises:
        ValueError: one of them, which ``what`` names, is not finite.
    """
    worst, tiny = {"rms": 0.0, "max": 0.0}, float(np.finfo(np.float32).tiny)
    for got, wanted in zip(found, expected, strict=True):
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
        if not (np.isfinite(got).all() and np.isfinite(wanted).all()):
            raise ValueError(f"{what} must be finite to be compared with PyTorch's")
        difference = got - wanted
        for name, measure in (("rms", lambda x: np.sqrt(np.square(x).mean())), ("max", lambda x: np.abs(x).max())):
            worst[name] = max(worst[name], float(measure(difference) / max(measure(wanted), tiny)))
    return worst


@contextmanager
def export_friendly(scan: str = "doubling") -> Iterator[None]:
    """Inside, torch.export meets forms that every runtime has operators for, with the same weights and results.

    The recurrence is traced as ``scan``: ``doubling``, a log-depth scan whose graph stays small, or ``chunked``, as
    eager PyTorch computes it. The Fourier transform is a product with real matrices anyway, see ``iris.nn.mixers.dft``.

    Raises:
        SettingError: an unknown form.
    """
    with torch.no_grad(), traced_as(scan):
        yield


def decoding_only(latent: Latent, example: Tensor) -> nn.Module:
    """A copy of ``latent`` without the parts that only encode; it shares the weights that decoding ``example`` reads."""
    called: set[nn.Module] = set()
    hooks = [part.register_forward_pre_hook(lambda part, _: called.add(part)) for part in latent.modules()]
    try:
        with torch.no_grad():
            latent.decode(example)
    finally:
        for hook in hooks:
            hook.remove()
    return _only(latent, called)


def _only(module: nn.Module, called: set[nn.Module]) -> nn.Module:
    kept = copy.copy(module)
    kept._modules = {
        name: _only(child, called)
        for name, child in module._modules.items()
        if child is not None and not called.isdisjoint(child.modules())
    }
    return kept


def _generator_and_text(model: IrisPipeline | IrisModel) -> tuple[nn.Module, TextEncoder | None]:
    whole = getattr(model, "model", None)  # a pipeline's
    generator, encoder = (model.generator, None) if whole is None else (whole.generator, whole.text)
    if generator.input.weight.dtype != torch.float32:
        raise SettingError(f"dtype={generator.input.weight.dtype} of the weights must be torch.float32 to be exported")
    if encoder is not None and encoder.to_dict()["name"] == "clip" and not hasattr(encoder, "model"):
        encoder = build_text_encoder(encoder.to_dict())  # embeddings on disk name the encoder that made them
    return generator, encoder


def _check(generator: nn.Module, iterations: int | None) -> int:
    config = generator.config
    if config.depth.carry:
        raise SettingError(
            "depth.carry=true cannot be exported: its first evaluation is another function than the rest"
        )
    if iterations is None:
        return config.iterations
    if iterations < 1 or (not config.depth.share and iterations != config.iterations):
        allowed = "at least 1" if config.depth.share else f"model.iterations={config.iterations} with depth.share=false"
        raise SettingError(f"iterations={iterations} must be {allowed}")
    return iterations


def _captions(encoder: TextEncoder, batch: int) -> Sequence[str]:
    """Captions that the encoder knows, of different lengths."""
    values = encoder.to_dict()
    if "classes" in values:
        return [values["classes"][i % len(values["classes"])] for i in range(batch)]
    words = values.get("words", ["a", "large", "red", "circle", "above", "a", "small", "blue", "square"])
    return [" ".join(words[: 2 + 3 * i % 7]) for i in range(1, batch + 1)]
