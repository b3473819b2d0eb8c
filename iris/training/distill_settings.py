"""Settings student.*: how a few-step student is made of a teacher, and how it is sampled."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from iris.diffusion.distillation import SOLVERS
from iris.diffusion.sampling import SamplingSettings
from iris.errors import SettingError
from iris.nn.generator import GeneratorConfig
from iris.settings import check, setting

METHODS = ("consistency", "shortcut")
LONGEST_GRID = 4096


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

    method: str = setting("consistency", "how it learns", choices=METHODS)
    steps: tuple[int, ...] = setting((1, 2, 4), "sampling steps that students are made for: 1,2,4")
    grid: int = setting(64, "teacher steps from noise to data", low=1, high=LONGEST_GRID)
    grid_end: int | None = setting(None, "the grid at the end of training; null: the same", low=1, high=LONGEST_GRID)
    segments: int = setting(1, "of consistency: parts of the flow, each jumped", low=1)
    solver: str = setting("euler", "how the teacher crosses an interval", choices=SOLVERS)
    solver_steps: int = setting(1, "in how many steps", low=1)
    guidance: float = setting(3.0, "folded into the teacher; 1: none", low=0)
    guidance_max: float | None = setting(None, "the student is told a scale up to this; null: fixed", low=0)
    guidance_start: float = setting(0.0, "the teacher is guided at times from here", low=0, high=1)
    guidance_end: float = setting(1.0, "to here", low=0, high=1)
    shift: float = setting(1.0, "of consistency: of the grid's times", low=0, above=True)
    ema: float = setting(0.95, "decay of the target network; 0: the student itself", low=0)
    delta: float = setting(1e-3, "of consistency: of the pseudo-Huber loss", low=0, above=True)
    bootstrap: float = setting(0.5, "of shortcut: share of a batch that learns from half steps", low=0, above=True)
    iterations: int | None = setting(None, "passes of the student; null: as trained", low=1)
    teacher_iterations: int | None = setting(None, "passes of the teacher; null: as trained", low=1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _counts(self.steps))
        check(self, "student")
        for name in ("ema", "bootstrap"):
            if getattr(self, name) >= 1:
                raise SettingError(f"student.{name}={getattr(self, name)} must be below 1")
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

    def check_passes(self, config: GeneratorConfig) -> None:
        """Raise a SettingError for passes that a teacher with depth.share=false does not have."""
        for name in ("iterations", "teacher_iterations"):
            wanted = getattr(self, name)
            if not config.depth.share and wanted not in (None, config.iterations):
                raise SettingError(
                    f"student.{name}={wanted} must be model.iterations={config.iterations} with depth.share=false"
                )

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

    def told(self, level: Tensor | None, scale: Tensor | None) -> dict[str, Tensor]:
        """The values of ``numbers`` for steps of 2^-level at guidance scales, all [B] or scalars."""
        told = {}
        if "step" in self.numbers:
            told["step"] = level / self.levels
        if "guidance" in self.numbers:
            told["guidance"] = (scale - self.guidance) / (self.guidance_max - self.guidance)
        return told

    def told_throughout(self, steps: int, guidance: float | None = None) -> dict[str, float]:
        """The same in all of ``steps`` sampling steps at one scale (None: the smallest).

        Raises:
            SettingError: steps or a scale that the student was not trained for.
        """
        self.sampling(steps)
        scale = self.guidance if guidance is None else guidance
        if not self.guidance <= scale <= (self.guidance_max or self.guidance):
            raise SettingError(
                f"guidance={scale}: the student was trained for student.guidance={self.guidance}, "
                f"student.guidance_max={self.guidance_max}"
            )
        told = self.told(torch.tensor(math.log2(steps)), torch.tensor(scale))
        return {name: value.item() for name, value in told.items()}


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
