"""A few-step student's network: a copy of its teacher that is told more than the time, and folds into a plain generator."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from iris.errors import SettingError
from iris.nn.generator import Generator
from iris.nn.layers import ScalarEmbedding, ZeroLinear
from iris.randomness import initialise


class StudentTime(nn.Module):
    """The teacher's embedding of the time plus one of each further number, which start at zero.

    Reads [B, 1 + N]: the time, then the numbers in the order of ``names``, each in [0, 1]. Because their embeddings are
    only added, numbers that stay the same through sampling are a bias: see ``folded``.
    """

    def __init__(self, base: ScalarEmbedding, names: Sequence[str]) -> None:
        super().__init__()
        self.base = base
        self.further = nn.ModuleDict({name: ZeroEmbedding(base.outer.out_features) for name in names})

    def forward(self, values: Tensor) -> Tensor:
        """[B, 1 + N] -> [B, D].

        Raises:
            SettingError: a time alone, as a plain generator takes.
        """
        if values.dim() != 2 or values.shape[1] != 1 + len(self.further):
            raise SettingError(
                f"this student takes times with {', '.join(self.further)}: "
                f"[B, {1 + len(self.further)}], got {list(values.shape)}; fold() makes it plain"
            )
        embedded = self.base(values[:, 0])
        for embed, value in zip(self.further.values(), values.unbind(1)[1:], strict=True):
            embedded = embedded + embed(value)
        return embedded

    @torch.no_grad()
    def folded(self, numbers: Mapping[str, float]) -> ScalarEmbedding:
        """The embedding of the time alone that equals this one at these numbers."""
        base = copy.deepcopy(self.base)
        for name, embed in self.further.items():
            base.outer.bias += embed(base.outer.bias.new_tensor([numbers[name]]))[0]
        return base


class ZeroEmbedding(ScalarEmbedding):
    """A ``ScalarEmbedding`` that starts at zero."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.outer = ZeroLinear(dim, dim)


def make_student(teacher: Generator, names: Sequence[str], seed: int, iterations: int | None = None) -> Generator:
    """A copy of the teacher that also reads the numbers ``names``, and until it is trained does not heed them.

    It runs a fixed number of passes and carries no state from step to step: its steps are far apart.

    Args:
        seed: draws the embeddings of the numbers.
        iterations: passes through its core (None: as many as the teacher's).
    """
    config = teacher.config
    student = copy.deepcopy(teacher).requires_grad_(True)
    student.config = replace(
        config, iterations=iterations or config.iterations, depth=replace(config.depth, training="fixed", carry=False)
    )
    student.carried = None
    if names:
        like = student.time.outer.weight
        student.time = StudentTime(student.time, names)
        initialise(student.time.further, seed).to(like)
    return student


def student_times(t: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
    """What the student's embedding reads: times [B], or [B, 1 + N] with the ``numbers`` [B] that it is told."""
    return torch.stack([t, *(value.to(t) for value in numbers.values())], 1) if numbers else t


def fold(student: Generator, numbers: Mapping[str, float]) -> Generator:
    """The student at fixed ``numbers``, all that it is told, as a plain generator of its configuration."""
    plain = copy.deepcopy(student)
    if numbers:
        plain.time = plain.time.folded(numbers)
    return plain
