"""The processes that train together: one of them, the first, prepares, speaks and writes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from iris.training.devices import make_accelerator

Value = TypeVar("Value")
POLL_SECONDS = 0.2


def _started() -> bool:
    """Whether something that starts several processes started this one."""
    return any(name in os.environ for name in ("WORLD_SIZE", "SUBMITIT_EXECUTOR"))


class Place(NamedTuple):
    """Where one of the processes is."""

    rank: int
    count: int
    device: torch.device


class Processes:
    """This process among those that torchrun, or submitit with several tasks, started.

    Args:
        device: compute.device.
        planned: how many there will be, where work is planned for others.
    """

    def __init__(self, device: str, planned: int | None = None) -> None:
        self._device, self._planned = device, planned

    @property
    def name(self) -> str:
        """The setting."""
        return self._device

    @cached_property
    def _place(self) -> Place:
        """Joins the others; alone on the processor it needs no Accelerate, which takes seconds to load."""
        if self._device == "cpu" and not _started():
            return Place(0, 1, torch.device("cpu"))
        accelerator = make_accelerator(self._device, "no", 1)
        return Place(accelerator.process_index, accelerator.num_processes, accelerator.device)

    @property
    def count(self) -> int:
        """How many there are; 1 is known without loading Accelerate."""
        return self._planned or (self._place.count if _started() else 1)

    @property
    def rank(self) -> int:
        """Which of them this is."""
        return 0 if self._planned or self.count == 1 else self._place.rank

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this process computes.

        Raises:
            SettingError: there is no such device.
        """
        return self._place.device

    def agree(self, value: Callable[[], Value]) -> Value:
        """What the first process has to say, in all of them."""
        if self.count == 1:
            return value()
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value() if self.first else None])[0]

    def prepared(self, made: Path, make: Callable[[], None]) -> None:
        """The first process makes the file ``made``, the others wait for it, however long that takes.

        A collective would give up after minutes; if the first process ends, torchrun and Slurm end the others.
        """
        if self.first:
            make()
        while not made.exists():
            time.sleep(POLL_SECONDS)
