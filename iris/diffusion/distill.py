"""Few-step students of a rectified-flow teacher: what they aim at, their settings, how one becomes a plain generator.

Both methods evaluate networks and nothing else, so that every mixer can be distilled. MeanFlow (arXiv 2505.13447) would
need forward-mode derivatives, which the scan's autograd.Function and fused attention do not have; finite differences in
their place divide float32's rounding by the step. Shortcut models learn the same quantity, the mean velocity of a step,
from two half steps.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from iris.diffusion.flow import time_grid
from iris.diffusion.guidance import TOLERANCE
from iris.diffusion.sampling import SamplingSettings
from iris.errors import SettingError, require_choice
from iris.nn.condition import TextCondition
from iris.nn.generator import Generator
from iris.nn.layers import ScalarEmbedding, ZeroLinear
from iris.randomness import initialise

METHODS = ("consistency", "shortcut")
SOLVERS = ("euler", "heun")
LONGEST_GRID = 4096

# Latents z [B, ...] at times t [B] -> their velocity [B, ...]; every row has a time of its own.
RowVelocity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DistillSettings:
    """Settings student.*.

    Attributes:
        method: ``consistency`` (discrete consistency distillation, arXiv 2303.01469, as in latent consistency models,
            arXiv 2310.04378) or ``shortcut`` (arXiv 2410.12557, its smallest step learned from the teacher).
        steps: sampling steps the student is for: 1, "1,2,4" or a list. A shortcut student takes powers of two.
        grid: teacher steps from noise to data; 64 divides by all of 1, 2, 4, and shortcut needs a power of two.
        grid_end: the grid at the end of training, reached geometrically (None: ``grid`` throughout). Consistency only.
        segments: into how many parts of the grid the flow is cut, in each of which the student jumps to its end. 1 is
            the consistency model; n makes a student of n Euler steps (multistep consistency, arXiv 2403.06807).
        solver, solver_steps: how the teacher crosses one interval of the grid.
        guidance: folded into the teacher, so that the student needs one evaluation a step; 1 means none.
        guidance_max: the student is told the scale, drawn uniformly from ``guidance`` to here (None: fixed).
        guidance_start, guidance_end: flow times between which the teacher is guided.
        shift: of the grid's times, see ``iris.diffusion.flow.time_grid``. Consistency only.
        ema: decay a step of the target network (0: the student itself).
        delta: of the elementwise pseudo-Huber loss, in standardised latents; 0.001 in LCM. Consistency only.
        bootstrap: share of a batch that learns from half steps rather than from the teacher. The paper's 1/8 is for
            training from nothing; here the teacher's part is known at the start. Shortcut only.
        iterations, teacher_iterations: passes through the core of student and teacher (None: as configured).

    Raises:
        SettingError: a word that is unknown, a number outside its range, or a combination that means nothing.
    """

    method: str = "consistency"
    steps: tuple[int, ...] = (1, 2, 4)
    grid: int = 64
    grid_end: int | None = None
    segments: int = 1
    solver: str = "euler"
    solver_steps: int = 1
    guidance: float = 3.0
    guidance_max: float | None = None
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    shift: float = 1.0
    ema: float = 0.95
    delta: float = 1e-3
    bootstrap: float = 0.5
    iterations: int | None = None
    teacher_iterations: int | None = None

    def __post_init__(self) -> None:
        require_choice("student.method", self.method, METHODS)
        require_choice("student.solver", self.solver, SOLVERS)
        object.__setattr__(self, "steps", _counts(self.steps))
        for name in ("grid", "grid_end"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= LONGEST_GRID:
                raise SettingError(f"student.{name}={value} must lie in 1 … {LONGEST_GRID}")
        for name in ("segments", "solver_steps", "iterations", "teacher_iterations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"student.{name}={value} must be at least 1")
        for name in ("shift", "delta"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingError(f"student.{name}={getattr(self, name)} must be positive and finite")
        if not 0 <= self.ema < 1:
            raise SettingError(f"student.ema={self.ema} must be at least 0 and below 1")
        if not 0 < self.bootstrap < 1:
            raise SettingError(f"student.bootstrap={self.bootstrap} must lie between 0 and 1")
        self._check_guidance()
        self._check_shortcut() if self.method == "shortcut" else self._check_consistency()

    def _check_guidance(self) -> None:
        if not 0 <= self.guidance < math.inf:
            raise SettingError(f"student.guidance={self.guidance} must be finite and at least 0")
        if self.guidance_max is not None and not self.guidance < self.guidance_max < math.inf:
            raise SettingError(
                f"student.guidance_max={self.guidance_max} must be finite and above student.guidance="
                f"{self.guidance}, or null: a fixed scale"
            )
        if not 0 <= self.guidance_start <= self.guidance_end <= 1:
            raise SettingError(
                f"student.guidance_start={self.guidance_start} and student.guidance_end="
                f"{self.guidance_end} must lie in [0, 1], in this order"
            )

    def _check_consistency(self) -> None:
        for name in ("grid", "grid_end"):
            value = getattr(self, name)
            if value is not None and value % self.segments:
                raise SettingError(f"student.{name}={value} must be a multiple of student.segments={self.segments}")
        if self.segments > 1 and self.steps != (self.segments,):
            raise SettingError(
                f"student.segments={self.segments} makes a student of {self.segments} steps: "
                f"student.steps={_written(self.steps)} must be {self.segments}, or student.segments 1"
            )

    def _check_shortcut(self) -> None:
        if self.grid < 2 or self.grid & (self.grid - 1):
            raise SettingError(f"student.grid={self.grid} must be a power of two from 2 with student.method=shortcut")
        wrong = [n for n in self.steps if n & (n - 1) or n > self.grid]
        if wrong:
            raise SettingError(
                f"student.steps={_written(self.steps)} must be powers of two up to student.grid="
                f"{self.grid} with student.method=shortcut"
            )
        for name, only in (("segments", 1), ("shift", 1.0), ("grid_end", None)):
            if getattr(self, name) != only:
                raise SettingError(f"student.{name}={getattr(self, name)} belongs to student.method=consistency")

    @property
    def numbers(self) -> tuple[str, ...]:
        """What the student is told beside the time, each as a number in [0, 1]."""
        told = {"step": self.method == "shortcut", "guidance": self.guidance_max is not None}
        return tuple(name for name, wanted in told.items() if wanted)

    @property
    def levels(self) -> int:
        """log2 of the grid: level k is a step of 2^-k, from 0 (the whole way) to here (one interval)."""
        return self.grid.bit_length() - 1

    def grid_at(self, step: int, steps: int | None) -> int:
        """Intervals of the grid at training step ``step`` (from 0) of ``steps``: a multiple of the segments."""
        if self.grid_end is None:
            return self.grid
        done = min(1.0, step / max(1, steps - 1))
        return self.segments * round(self.grid * (self.grid_end / self.grid) ** done / self.segments)

    def sampling(self, steps: int) -> SamplingSettings:
        """How the student makes images in ``steps`` steps: one evaluation each, guidance being folded in.

        A consistency model jumps to the data and is noised anew; the others follow their own path.

        Raises:
            SettingError: a number of steps the student was not made for.
        """
        replace(self, steps=(steps,))  # raises for what the method cannot do
        stochastic = self.method == "consistency" and self.segments == 1
        return SamplingSettings(steps, "stochastic" if stochastic else "euler", shift=self.shift)


def _counts(value: int | str | Sequence[int]) -> tuple[int, ...]:
    """student.steps as numbers."""
    parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else list(value)
    try:
        counts = tuple(int(part) if isinstance(part, str) else operator.index(part) for part in parts)
    except (TypeError, ValueError):
        counts = ()
    if not counts or min(counts) < 1:
        raise SettingError(f"student.steps={value!r} must be one or several numbers from 1, such as 1,2,4")
    return counts


def _written(counts: Sequence[int]) -> str:
    return ",".join(str(count) for count in counts)


def move(z: Tensor, velocity: Tensor, t: Tensor, to: Tensor) -> Tensor:
    """z + (to - t) velocity: latents [B, ...] moved from times t [B] to times ``to`` [B].

    With the velocity of a student and ``to`` = 0 it is the consistency function f(z, t) = z - t v; f(z, 0) = z holds by
    itself, whatever the network.
    """
    return z + _over(to - t, z) * velocity


def solve(velocity: RowVelocity, z: Tensor, t: Tensor, to: Tensor, solver: str = "euler", steps: int = 1) -> Tensor:
    """The latents to which ``velocity`` carries z [B, ...] from times t [B] to ``to`` [B], in equal steps.

    As ``iris.diffusion.flow.heun_step``, heun ends with an Euler step at time 0, where no network has been trained.
    """
    for k in range(steps):
        here, there = torch.lerp(t, to, k / steps), torch.lerp(t, to, (k + 1) / steps)
        slope = velocity(z, here)
        if solver == "heun":
            mean = (slope + velocity(move(z, slope, here, there), there)) / 2
            slope = torch.where(_over(there, z) > 0, mean, slope)
        z = move(z, slope, here, there)
    return z


def consistency_target(student: RowVelocity, ahead: Tensor, t: Tensor, end: Tensor) -> Tensor:
    """f at ``ahead`` [B, ...], where the teacher came to at times t [B]: the student's jump from there to ``end`` [B].

    Where t = ``end`` it is ``ahead`` itself.
    """
    return move(ahead, student(ahead, t), t, end)


def shortcut_target(student: Callable[[Tensor, Tensor, Tensor], Tensor], z: Tensor, t: Tensor, level: Tensor) -> Tensor:
    """The mean velocity of a step of 2^-level from times t [B]: that of the student's two half steps.

    Args:
        student: of z [B, ...], t [B] and the level [B] of its step -> mean velocity [B, ...].
    """
    middle = t - torch.exp2(-(level + 1.0)).to(t)
    first = student(z, t, level + 1)
    second = student(move(z, first, t, middle), middle, level + 1)
    return (first + second) / 2


def pseudo_huber(predicted: Tensor, target: Tensor, delta: float) -> Tensor:
    """Mean over all elements of sqrt(d^2 + delta^2) - delta: squared for small differences d, absolute for large ones.

    In float32 at least: half precision does not hold the difference of 1 + delta^2 from 1.
    """
    wide = torch.promote_types(predicted.dtype, torch.float32)
    return ((predicted.to(wide) - target.to(wide)).square() + delta**2).sqrt().mean() - delta


def rising_grid(count: int, shift: float = 1.0) -> Tensor:
    """Times [count + 1] from 0 to 1, those at which a sampler of ``count`` steps and this shift evaluates, and 0."""
    return time_grid(count, shift).flip(0)


def guided(
    generator: Generator,
    text: TextCondition,
    null: TextCondition | None,
    scale: Tensor,
    interval: tuple[float, float],
    iterations: int | None = None,
) -> RowVelocity:
    """The velocity that guidance makes of a teacher: v_u + scale (v_c - v_u) inside the interval of times, v_c outside.

    Args:
        text, null: conditions of the rows, [B, ...]; without ``null`` the conditional velocity alone.
        scale: of each row [B].
    """
    if null is None:
        return lambda z, t: generator(z, t, text, iterations).to(z.dtype)
    both = TextCondition(*(torch.cat(halves) for halves in zip(text, null, strict=True)))
    start, end = interval

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        halves = generator(torch.cat([z, z]), torch.cat([t, t]), both, iterations).to(z.dtype)
        conditional, unconditional = halves.chunk(2)
        inside = (t >= start - TOLERANCE) & (t <= end + TOLERANCE)
        return torch.lerp(unconditional, conditional, _over(torch.where(inside, scale, 1.0), z).to(z.dtype))

    return velocity


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


def make_student(teacher: Generator, settings: DistillSettings, seed: int) -> Generator:
    """A copy of the teacher that also reads ``settings.numbers``, and until it is trained does not heed them.

    It runs a fixed number of passes and carries no state from step to step: its steps are far apart.

    Raises:
        SettingError: passes that a teacher with depth.share=false does not have.
    """
    config = teacher.config
    for name in ("iterations", "teacher_iterations"):
        wanted = getattr(settings, name)
        if not config.depth.share and wanted not in (None, config.iterations):
            raise SettingError(
                f"student.{name}={wanted} must be model.iterations={config.iterations} with depth.share=false"
            )
    student = copy.deepcopy(teacher).requires_grad_(True)
    student.config = replace(
        config,
        iterations=settings.iterations or config.iterations,
        depth=replace(config.depth, training="fixed", carry=False),
    )
    student.carried = None
    if settings.numbers:
        like = student.time.outer.weight
        student.time = StudentTime(student.time, settings.numbers)
        initialise(student.time.further, seed).to(like)
    return student


def student_times(
    settings: DistillSettings, t: Tensor, level: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """What the student's embedding reads: times [B], or with the step's level [B], the guidance scale [B] or both."""
    if not settings.numbers:
        return t
    told = _told(settings, level, scale)
    return torch.stack([t, *(told[name].to(t) for name in settings.numbers)], 1)


def fold(student: Generator, settings: DistillSettings, steps: int, guidance: float | None = None) -> Generator:
    """The student for ``steps`` steps at one guidance scale, as a plain generator of its configuration.

    Args:
        guidance: the scale, where the student was trained for a range of them (None: the smallest).

    Raises:
        SettingError: steps or a scale that the student was not trained for.
    """
    settings.sampling(steps)
    scale = settings.guidance if guidance is None else guidance
    if not settings.guidance <= scale <= (settings.guidance_max or settings.guidance):
        raise SettingError(
            f"guidance={scale}: the student was trained for student.guidance={settings.guidance}, "
            f"student.guidance_max={settings.guidance_max}"
        )
    plain = copy.deepcopy(student)
    if settings.numbers:
        told = _told(settings, torch.tensor(math.log2(steps)), torch.tensor(scale))
        plain.time = plain.time.folded({name: float(told[name]) for name in settings.numbers})
    return plain


def _told(settings: DistillSettings, level: Tensor | None, scale: Tensor | None) -> dict[str, Tensor]:
    """The student's numbers, from 0 to 1."""
    told = {}
    if "step" in settings.numbers:
        told["step"] = level / settings.levels
    if "guidance" in settings.numbers:
        told["guidance"] = (scale - settings.guidance) / (settings.guidance_max - settings.guidance)
    return told


def _over(t: Tensor, z: Tensor) -> Tensor:
    """t [B] shaped to be broadcast over z [B, ...]."""
    return t.view(-1, *(1,) * (z.dim() - 1))
