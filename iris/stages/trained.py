"""What the trained stages share: a loop in the stage's folder, looked at now and then, and weights in the end."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from iris.errors import SettingError
from iris.io.pictures import save_grid
from iris.stages.engine import WEIGHTS, Context, Stage, Work, content_key
from iris.stages.settings import TRAINED_BY, Recipe
from iris.training.loop import CHECKPOINT, WHOLE, Share, Task, fit
from iris.training.safety import BatchFacts
from iris.training.settings import loop_settings

PICTURES = "pictures"

# What is seen at a look: lower is better, and what else to log.
Seen = tuple[float, dict[str, float]]


class Trained(Stage):
    """A stage that trains, with all processes.

    Raises:
        SettingError: anything that would fail later and can be known now.
    """

    stage: ClassVar[str]  # of iris.stages.settings.STAGES
    collective = True

    def __init__(self, context: Context, recipe: Recipe, needs: Mapping[str, Work | None]) -> None:
        super().__init__(context, needs)
        self.recipe = recipe
        self.loop = loop_settings(self.training, recipe.compute, self.group)
        parts = context.processes.count * recipe.compute.accumulate
        if self.training.batch % parts:
            raise SettingError(
                f"{self.group}.batch={self.training.batch} must be a multiple of {parts}: {context.processes.count} "
                f"processes times compute.accumulate={recipe.compute.accumulate}"
            )
        self.check()

    @property
    def group(self) -> str:
        """The group of settings that says how it is trained."""
        return TRAINED_BY[self.stage]

    @property
    def training(self) -> Any:
        """Those settings."""
        return self.recipe.training(self.stage)

    @property
    def place(self) -> Path:
        """The folder of its finished weights."""
        return self.folder / WEIGHTS

    @property
    def begun(self) -> bool:
        return (self.folder / CHECKPOINT).exists()

    @abstractmethod
    def check(self) -> None:
        """Raise a SettingError for what cannot be trained."""

    @abstractmethod
    def usage(self, weights: Path) -> list[str]:
        """Commands that use the weights where they lie."""

    def settings(self) -> dict[str, Any]:
        return asdict(self.recipe)

    def fit(self, task: Task, look: Callable[[int], Seen]) -> nn.Module:
        """Train ``task``, seen at each compute.validate_every steps; ends with the averaged weights in its module."""
        watched, progress = Watched(task, look), self.context.progress
        with self.context.observe(self.folder):
            return fit(
                watched,
                self.loop,
                self.folder,
                lambda row: progress.training(f"train {self.label}", self.told(row), self.training.batch),
                watched.facts,
            )

    def picture(self, name: str, images: np.ndarray, columns: int) -> None:
        """Keep uint8 images [N, H, W, 3] as a grid, in the first process."""
        if self.context.processes.first:
            save_grid(self.folder / PICTURES / f"{name}.png", images, columns)

    def known(self) -> dict[str, Any]:
        """What tells later whether the weights are still those that were made."""
        return {"content": content_key(self.kind, self.place)}

    def told(self, row: dict[str, float]) -> dict[str, float]:
        """A row of metrics as a person is told it."""
        return row


class Watched:
    """A task whose averaged weights are looked at now and then: what the loop calls validation.

    Args:
        task: what is trained.
        look: called with the number of steps done.
    """

    def __init__(self, task: Task, look: Callable[[int], Seen]) -> None:
        self.module, self.batch = task.module, task.batch
        self._task, self._look = task, look
        self._step, self._facts = 0, {}

    def loss(self, step: int, share: Share = WHOLE) -> tuple[Tensor, dict[str, Tensor]]:
        self._step = step + 1
        return self._task.loss(step, share)

    def go_on_at(self, step: int) -> None:
        """Let a task that reads in passing find its place."""
        if hasattr(self._task, "go_on_at"):
            self._task.go_on_at(step)

    def describe(self, step: int) -> BatchFacts:
        """What a message about step ``step`` names."""
        return self._task.describe(step)

    def validate(self) -> float:
        """What the look gives."""
        value, self._facts = self._look(self._step)
        return value

    def facts(self) -> dict[str, float]:
        """What else was seen at the last look, once."""
        facts, self._facts = self._facts, {}
        return facts


def shown(values: Sequence[str]) -> str:
    """The first of some captions, for an example on the command line."""
    return values[0].replace('"', "'")[:80] if values else "a red circle"
