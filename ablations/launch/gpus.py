"""Which GPUs local workers compute on: those that this process may use, each trial its own."""

from __future__ import annotations

import os
from itertools import takewhile
from typing import TYPE_CHECKING

from iris.errors import SettingError

if TYPE_CHECKING:
    from ablations.question.settings import Launcher

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them: numbers, or identifiers."""
    given = os.environ.get(VISIBLE)
    if given is not None:
        names = [part.strip() for part in given.split(",")]
        return list(takewhile(lambda name: name and not name.startswith("-"), names))  # as CUDA, which stops at -1
    import torch  # which asks the driver (NVML) and opens nothing

    return [str(number) for number in range(torch.cuda.device_count())]


def slots(launcher: Launcher, device: str) -> list[list[str]]:
    """The GPUs of each local slot, as many slots as trials may run at once.

    ``device`` is compute.device. Where it is not the processor a trial has one GPU, unless launcher.gpus_per_trial asks
    otherwise, and as many trials run at once as have one (launcher.trials_per_gpu of them on each).

    Raises:
        SettingError: GPUs are asked for that are not there.
    """
    asked = launcher.gpus_per_trial
    if device in ("cpu", "mps") and not asked:
        return [[]] * launcher.workers
    there = visible_gpus()
    if not there and device == "auto" and not asked:
        return [[]] * launcher.workers
    each = max(1, asked)
    if each > len(there):
        setting = f"launcher.gpus_per_trial={asked}" if asked else f"compute.device={device}"
        raise SettingError(
            f"{setting}: {len(there) or 'no'} GPUs are visible here{_said()}; allowed: compute.device=cpu"
        )
    groups = [there[start : start + each] for start in range(0, len(there) - each + 1, each)]
    return [group for group in groups for _ in range(launcher.trials_per_gpu)][: launcher.workers]


def _said() -> str:
    return f" ({VISIBLE}={os.environ[VISIBLE]})" if VISIBLE in os.environ else ""
