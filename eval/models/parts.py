"""The parts of a model as functions of no arguments, with what measuring wants to know about each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from eval.models.activations import decoder_peak, generator_peak, mixer_peak
from eval.models.ledger import ENCODING
from iris.diffusion.sampling import SamplingSettings
from iris.latents import Latent
from iris.nn.condition import TextCondition
from iris.nn.generator import Generator
from iris.randomness import addressed
from iris.text import TextEncoder, encode_prompts


@dataclass
class Part:
    """A part of a model as a function of no arguments.

    Attributes:
        prepare: makes its inputs when it is first called, and returns what computes it on them.
        count: runs that one call of the whole model takes.
        within: the part that contains this one, whose time this one's is a share of.
        weights_bytes: of the weights that it uses.
        activations_bytes: what its architecture predicts for the peak of its live tensors (None: no formula).
        device: where it runs.
    """

    prepare: Callable[[], Callable[[], Any]]
    count: int
    within: str | None
    weights_bytes: int
    activations_bytes: int | None
    device: str

    @cached_property
    def _run(self) -> Callable[[], Any]:
        return self.prepare()

    @torch.inference_mode()
    def __call__(self) -> Any:
        return self._run()


def part_of(
    module: nn.Module,
    prepare: Callable[[], Callable[[], Any]],
    count: int = 1,
    within: str | None = None,
    peak: int | None = None,
) -> Part:
    """A part whose weights and device are those of ``module``."""
    device = next((str(parameter.device) for parameter in module.parameters()), "cpu")
    return Part(prepare, count, within, size_of(module), peak, device)


def size_of(*modules: nn.Module) -> int:
    """Bytes of all parameters and buffers; what modules share counts once."""
    return _bytes(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values())


def text_part(
    encoder: TextEncoder,
    captions: Sequence[str],
    against: Sequence[str] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Part:
    """Captions, and with guidance what it leads away from, tokenised and encoded."""
    return part_of(encoder, lambda: partial(encode_prompts, encoder, captions, against, dtype, device))


def generator_parts(
    generator: Generator, grid: tuple[int, int], text_length: int, batch: int, settings: SamplingSettings
) -> dict[str, Part]:
    """An evaluation of ``batch`` images (a guided step takes two), a pass through the core, a mixer of the core."""
    config, itemsize = generator.config, generator.input.weight.element_size()
    iterations, evaluations = settings.iterations or config.iterations, settings.evaluations
    tokens, width = grid[0] * grid[1], config.mixer_width or config.dim

    @cache
    def inputs() -> tuple[Any, ...]:
        return _generator_inputs(generator, grid, text_length, batch, iterations)

    @cache
    def arguments() -> tuple[Any, ...]:
        return _pass_arguments(generator, inputs())

    passes = evaluations * iterations
    core, mixer = generator.core[: config.core], generator.core[0].mixer
    peak = generator_peak(config, *grid, text_length, batch, iterations, itemsize)
    mixed = mixer_peak(config.mixer, tokens, width, batch, itemsize)
    return {
        "generator": part_of(generator, lambda: partial(generator, *inputs()), evaluations, None, peak),
        "iteration": part_of(core, lambda: partial(generator._pass, *arguments()), passes, "generator"),
        "mixer": part_of(mixer, lambda: partial(mixer, arguments()[1]), passes * config.core, "iteration", mixed),
    }


def _generator_inputs(
    generator: Generator, grid: tuple[int, int], text_length: int, batch: int, iterations: int
) -> tuple[Any, ...]:
    """Drawn arguments of an evaluation."""
    config, weight, draws = generator.config, generator.input.weight, addressed("measured inputs")

    def drawn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=draws).to(weight)

    mask = torch.ones(batch, text_length, dtype=torch.bool, device=weight.device)
    text = TextCondition(drawn(text_length, config.text_width), mask, drawn(config.text_width))
    return drawn(config.channels, *grid), torch.full((batch,), 0.5, device=weight.device), text, iterations


@torch.inference_mode()
def _pass_arguments(generator: Generator, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What an evaluation hands to its last pass through the core."""
    taken: list[tuple[Any, ...]] = []

    def record(*given: Any) -> Tensor:
        taken.append(given)
        return Generator._pass(generator, *given)

    generator._pass = record
    try:
        generator(*inputs)
    finally:
        del generator._pass
    return taken[-1]


def decoder_part(latent: Latent, grid: tuple[int, int], batch: int) -> Part:
    """Latents to images."""

    def prepare() -> Callable[[], Tensor]:
        z = torch.randn(batch, latent.channels, *grid, generator=addressed("measured inputs")).to(latent.mean)
        return partial(latent.decode, z)

    decoding = [
        value
        for values in (latent.named_parameters(), latent.named_buffers())
        for name, value in values
        if ENCODING.isdisjoint(name.split("."))
    ]
    peak = decoder_peak(latent, *grid, batch, latent.mean.element_size())
    return Part(prepare, 1, None, _bytes(decoding), peak, str(latent.mean.device))
