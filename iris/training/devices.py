"""Where a run computes: device, precision and processes, through Hugging Face Accelerate."""

from __future__ import annotations

import atexit
import os
from typing import TYPE_CHECKING

import torch
from torch import nn

from iris.errors import SettingError

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(device: str, precision: str, accumulate: int) -> Accelerator:
    """An Accelerator; with torchrun's or submitit's environment it joins the other processes (NCCL, or gloo on CPUs).

    Args:
        device: "cpu", "auto" (what the machine has), or a torch device type such as "cuda" or "mps".
        precision: "no", "bf16" or "fp16".
        accumulate: shares that a process adds up in a step.

    Raises:
        SettingError: the device is not there, or cannot compute in this precision.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs  # here: saved models load without it
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import GradientAccumulationPlugin

    _export_submitit()
    # Its state is global and refuses other settings than the first run's; a process may train a latent, then a flow.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    # Some steps leave weights without gradient (depth.carry); of other tasks' steps nothing is known.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    try:
        accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision=precision,
            kwargs_handlers=[ddp],
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulate),
        )
    except ValueError as error:
        raise SettingError(
            f"compute.precision={precision} cannot be used with compute.device={device}: {error}"
        ) from error
    kind = accelerator.device.type
    if device not in ("auto", kind):
        raise SettingError(f"compute.device={device} is not there; this machine offers cpu, auto (now {kind})")
    if precision == "fp16" and accelerator.scaler is None:
        raise SettingError(f"compute.precision=fp16 needs a GPU; on {kind} allowed: no, bf16")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        atexit.unregister(_leave)
        atexit.register(_leave)
    return accelerator


def process_rank() -> int:
    """This process's number among those that share each batch, before any of them is joined: 0 where it is alone."""
    if "RANK" in os.environ:  # torchrun
        return int(os.environ["RANK"])
    if "SUBMITIT_EXECUTOR" in os.environ:
        from submitit import JobEnvironment

        return JobEnvironment().global_rank
    return 0


def process_count() -> int:
    """How many processes share each batch."""
    if "WORLD_SIZE" in os.environ:  # torchrun
        return int(os.environ["WORLD_SIZE"])
    if "SUBMITIT_EXECUTOR" in os.environ:
        from submitit import JobEnvironment

        return JobEnvironment().num_tasks
    return 1


def own_device(device: str) -> torch.device:
    """The device of this process for ``device`` as in ``make_accelerator``, for work beside training.

    Raises:
        SettingError: it is not there.
    """
    there = torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if there is None else there.type
    if device == "cpu" or (device == "auto" and kind == "cpu"):
        return torch.device("cpu")
    if device not in ("auto", kind):
        raise SettingError(f"compute.device={device} is not there; this machine offers cpu, auto (now {kind})")
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))


def _export_submitit() -> None:
    """Give torch the ranks of a submitit job of several tasks; torchrun sets them itself."""
    if "SUBMITIT_EXECUTOR" not in os.environ or "LOCAL_RANK" in os.environ:
        return
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    if JobEnvironment().num_tasks > 1:
        # submitit's port is drawn from the job's number; devices stay visible, since Accelerate picks by LOCAL_RANK.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def compiled_blocks(module: nn.Module) -> list[nn.Module]:
    """What ``torch.compile`` is applied to: the entries of each outermost ModuleList, and each outermost Sequential.

    Blocks that repeat share one compilation, and what draws or branches between them stays plain Python.
    """
    if isinstance(module, nn.Sequential):
        return [module]
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [block for child in module.children() for block in compiled_blocks(child)]
