"""The generator in three parts, so that a host runs the loop: what is exported does not grow with the iterations.

Unrolled, a core of 6 layers passed 8 times is a graph of 48 layers, which takes a lowering minutes to hours, and another
one for each number of iterations. In parts, each layer is there once, and the host chooses how often it is passed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eval.export.host.pipeline import progress_of
from eval.export.parts import ExportPart, GeneratorPart
from iris.errors import SettingError
from iris.nn.layers import position_embedding, rms_normalise

START_INPUTS = ("z", "t", "tokens", "mask", "pooled")


class Start(nn.Module):
    """z [B, C, h, w], t [B] and the text -> given [B, h, w, D], condition [B, D], keys and values of each layer, and the
    state to start from, unless that is ``given``."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, z: Tensor, t: Tensor, tokens: Tensor, mask: Tensor, pooled: Tensor) -> tuple[Tensor, ...]:
        g = self.generator
        condition = g.time(t) + g.text_pooled(rms_normalise(pooled))
        signal = g._signal(condition)
        given = g.input(z.permute(0, 2, 3, 1))
        given = given + position_embedding(*given.shape[1:], given.device, given.dtype)
        for block in g.prelude:
            given = block(given, signal)
        state = g._initial(given, None)
        text = g.text_norm(tokens)
        prepared = [part for layer in g.core for part in layer.cross.prepare(text)]
        return given, condition, *prepared, *(() if state is given else (state,))


class Pass(nn.Module):
    """One pass through the core; ``progress`` [1] tells how far the loop is, (k + 1) / iterations at pass k from 0."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def forward(
        self, state: Tensor, given: Tensor, condition: Tensor, progress: Tensor, mask: Tensor, *prepared: Tensor
    ) -> Tensor:
        g, signal = self.generator, condition
        if g.iteration is not None:
            signal = g._signal(condition + g.iteration(progress).to(condition.dtype))
        return g._pass(0, state, given, signal, list(zip(prepared[::2], prepared[1::2], strict=True)), mask)


class Read(nn.Module):
    """state [B, h, w, D], condition [B, D] -> velocity [B, C, h, w]."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, state: Tensor, condition: Tensor) -> Tensor:
        return self.generator._read(state, condition, self.generator._signal(condition))


def generator_in_passes(part: ExportPart) -> tuple[ExportPart, ExportPart, ExportPart]:
    """The parts "start", "pass" and "read" of ``eval.export.parts``' generator, which share its weights.

    Raises:
        SettingError: depth.share=false, whose passes have layers of their own, or a generator that was not asked for by
            ``iris.nn.generator.Generator``'s rules.
        ValueError: another part.
    """
    if not isinstance(part.module, GeneratorPart):
        raise ValueError(f"part={part.name!r} must be a generator in float32, got a {type(part.module).__name__}")
    generator, iterations = part.module.generator, part.module.iterations
    if not generator.config.depth.share:
        raise SettingError(
            "depth.share=false has other layers at each pass and cannot be exported as one pass; "
            "export the generator whole"
        )
    prepared = tuple(f"{kind}{i}" for i in range(len(generator.core)) for kind in ("key", "value"))
    started = ("given", "condition", *prepared, *(() if generator.config.depth.initial == "input" else ("state",)))
    start = ExportPart("start", Start(generator).eval(), part.inputs, START_INPUTS, started, part.precise)
    known = dict(zip(START_INPUTS, part.inputs, strict=True)) | dict(zip(started, start.outputs(), strict=True))
    known = {
        "state": known["given"],
        "progress": torch.tensor(progress_of(iterations, least_passes(generator.config))[:1]),
    } | known
    names = ("state", "given", "condition", "progress", "mask", *prepared)
    given = tuple(
        known[name].clone(memory_format=torch.contiguous_format) for name in names
    )  # export merges equal ones
    one = ExportPart("pass", Pass(generator).eval(), given, names, ("state",), part.precise)
    (state,) = one.outputs()
    read = ExportPart(
        "read", Read(generator).eval(), (state, known["condition"]), ("state", "condition"), ("velocity",), part.precise
    )
    return start, one, read


def least_passes(config: Any) -> int:
    """Passes that progress is a fraction of at least: with early exits trained, a loop that ends early counts in those."""
    return config.iterations if config.depth.training == "exits" else 1
