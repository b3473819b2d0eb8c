"""The training loop: whatever is trained, this runs it, keeps it safe and says how it goes.

``fit`` is the loop, top to bottom; ``TrainingRun`` (``iris.training.run``) is the state between two steps. A step is
the same whether one process takes the whole batch, or several do, or one in several shares: the task draws everything
for the global batch at the step's address, and each share takes its rows.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from iris.errors import SettingError, require_choice
from iris.io.files import write_atomically
from iris.training.checkpoint import CHECKPOINT
from iris.training.optimiser import OptimiserSettings, learning_rate_at
from iris.training.run import TrainingRun
from iris.training.safety import NonFiniteLoss, Signals, explained_disk, explained_loss_of_worker, explained_memory
from iris.training.share import WHOLE, Share

__all__ = ["CHECKPOINT", "METRICS", "WHOLE", "LoopSettings", "NonFiniteLoss", "Share", "Task", "fit"]

METRICS = "metrics.jsonl"


class Task(Protocol):
    """What is trained: weights, and a loss addressed by the step alone.

    Three methods more are used where they are there: ``describe(step) -> BatchFacts`` for messages; ``validate() ->
    float``, lower is better, called each ``validate_every`` steps with the averaged weights in ``module``; and
    ``go_on_at(step)``, called once in each process, before the first call of ``loss``, which is for step ``step``.
    """

    module: nn.Module
    batch: int  # rows of a step, over all processes and shares

    def loss(self, step: int, share: Share = WHOLE) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss (a scalar) of the rows ``share`` of step ``step``, and extra scalars to log.

        All randomness is drawn for the global batch, addressed by ``step``, and then sliced.
        """
        ...


@dataclass(frozen=True)
class LoopSettings:
    """How long, how computed, how watched and how kept.

    Attributes:
        ema: decay of the averaged weights at the end of its warm-up.
        precision: no (float32), bf16, fp16 (with a scaled loss; GPU only).
        accumulate: shares that each process adds up in a step: less memory, the same result.
        compile: torch.compile the module's repeated blocks.
        gradient_checkpointing: compute the core's passes again in the backward instead of keeping them.
        keep: checkpoints kept beside the best.
        skip_nonfinite: steps with a loss or gradient that is not finite that are skipped before one stops the run.
        device: cpu, auto, or a torch device type.
        validate_every: steps between two calls of the task's ``validate`` (0: never).
        group: of settings that steps and optimiser come from, for messages.

    Raises:
        SettingError: a value that cannot be used.
    """

    steps: int
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    ema: float = 0.995
    log_every: int = 10
    checkpoint_seconds: float = 20.0
    precision: str = "no"
    accumulate: int = 1
    compile: bool = False
    gradient_checkpointing: bool = False
    keep: int = 2
    skip_nonfinite: int = 0
    device: str = "cpu"
    validate_every: int = 0
    group: str = "train"

    def __post_init__(self) -> None:
        require_choice("compute.precision", self.precision, ("no", "bf16", "fp16"))
        least_values = {"accumulate": 1, "keep": 1, "log_every": 1, "skip_nonfinite": 0, "validate_every": 0}
        for name, least in least_values.items():
            if getattr(self, name) < least:
                raise SettingError(f"compute.{name}={getattr(self, name)} must be at least {least}")


Observer = Callable[[dict[str, float]], None]


def fit(
    task: Task,
    settings: LoopSettings,
    folder: Path,
    observe: Observer = lambda row: None,
    meter: Callable[[], dict[str, float]] = dict,
) -> nn.Module:
    """Train ``task.module`` in place and leave the averaged weights in it; returns it, on the device that it came on.

    State goes to ``folder``: a checkpoint at least each ``checkpoint_seconds``, and a line of metrics each
    ``log_every`` steps (with what ``meter`` returns then, and handed to ``observe``). Called again after a kill it continues at the
    checkpoint and ends with the weights of an uninterrupted run, bit by bit on the same machine, because each step's
    randomness has an address. Started by torchrun, or by submitit with several tasks, the processes share each batch;
    the first one writes, all of them read ``folder``.

    Raises:
        NonFiniteLoss: loss or gradient is not finite; weights stay at the last checkpoint.
        OutOfMemory, DiskFull, LostWorker: as they say; the last checkpoint is there.
        Stopped: SIGTERM, SIGUSR1 or SIGUSR2 came, and a checkpoint was written.
        SettingError: a setting does not fit the task or the machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = TrainingRun(task, settings, folder)
    if run.main:
        _cut_metrics(folder / METRICS, run.step)
    saved = logged = time.monotonic()
    since = 0

    with (
        open(folder / METRICS if run.main else os.devnull, "a") as metrics,
        Signals() as signals,
        run.compiled(),
        explained_disk(folder, run.left),
        explained_loss_of_worker(run.world, run.left),
    ):
        while run.step < settings.steps:
            # Forward and backward of the whole batch. Until update() the weights are those of the last step, whose row
            # is written: a worker that is lost here, and only here, finds a state that can be saved.
            rate = learning_rate_at(run.step, settings.steps, settings.optimiser)
            with explained_memory(run.advice):
                with explained_loss_of_worker(run.world, run.rescue):
                    step = run.gradients(signals.pending)
                if math.isfinite(step.loss) and math.isfinite(step.norm):
                    run.update(rate)
                else:
                    run.skip(step)
            run.step += 1
            since += task.batch
            last = run.step == settings.steps

            # The averaged weights on the task's own measure; the best so far are kept.
            value = None
            if settings.validate_every and (last or run.step % settings.validate_every == 0):
                with explained_memory(run.advice_on_look):
                    value = run.validate()

            # A row for whoever watches.
            if last or value is not None or run.step % settings.log_every == 0:
                extra, now = run.means(step.extras), time.monotonic()
                row = {
                    "step": run.step,
                    "steps": settings.steps,
                    "time": time.time(),
                    "loss": step.loss,
                    "lr": rate,
                    "grad_norm": step.norm,
                    "images_per_s": since / max(now - logged, 1e-9),
                }
                row |= extra | ({} if value is None else {"validation": value})
                row |= {"skipped": run.skipped} if run.skipped else {}
                if run.main:
                    row |= meter()
                    metrics.write(json.dumps(row) + "\n")
                    metrics.flush()
                    observe(row)
                logged, since = now, 0

            # A checkpoint when it is time, at the end, and before a signal is obeyed.
            if last or step.signal or time.monotonic() - saved > settings.checkpoint_seconds:
                run.save()
                saved = time.monotonic()
            if step.signal:
                run.accelerator.wait_for_everyone()
                run.saved = run.step  # by the first process, for all
                signals.hand_over(step.signal, f"{run.left()} of {settings.steps}. Run the same command again to go on")

    with explained_loss_of_worker(run.world, run.left):
        return run.finish()


def _cut_metrics(path: Path, step: int) -> None:
    """Drop rows after ``step``, and a half-written last line: the resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            kept.append(line)
    write_atomically(path, "".join(line + "\n" for line in kept).encode())
