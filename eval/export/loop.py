"""The looped core as a loop in the graph, for runtimes that have one: its operations are there once.

Unrolled, r passes are r copies of them: iris_base at 8 iterations would be a graph of 48 core layers. Weights are in a
file once either way, but the time to export a graph, to optimise it and to load it grows with its operations.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan  # torch 2.15 has no public name for it

from eval.export.parts import ExportPart, GeneratorPart
from iris.nn.condition import TextCondition
from iris.nn.generator import Generator


class LoopedGenerator(Generator):
    """A generator whose passes are one operation; made of another by ``looped``, whose weights it shares."""

    def loop(
        self,
        state: Tensor,
        given: Tensor,
        condition: Tensor,
        text: TextCondition,
        iterations: int,
        backprop: int | None = None,
        exits: Sequence[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """As ``Generator.loop``, for evaluation without exits."""
        tokens = self.text_norm(text.tokens)
        prepared = [layer.cross.prepare(tokens) for layer in self.core]
        signals = torch.stack(self._pass_signals(condition, iterations))

        def body(state: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
            return self._pass(0, state, given, signal, prepared, text.mask), signal.new_zeros(1)

        last, _ = scan(body, state.clone(), signals)  # scan refuses a start that is also read inside
        return last, []


def looped(part: ExportPart) -> ExportPart:
    """``part`` with the passes through a shared core as one loop; a part without such passes as it is."""
    inner = part.module
    if not (isinstance(inner, GeneratorPart) and inner.iterations > 1 and inner.generator.config.depth.share):
        return part
    generator = copy.copy(inner.generator)
    generator.__class__ = LoopedGenerator
    return replace(part, module=GeneratorPart(generator, inner.iterations).eval())
