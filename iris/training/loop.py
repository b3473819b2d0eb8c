"""The training loop: whatever is trained, this runs it, keeps it safe and says how it goes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from iris.training.checkpoint import load_tensors, save_tensors
from iris.training.files import write_atomically
from iris.training.optimiser import Optimisers, OptimiserSettings, learning_rate_at

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite; the message has the step and the settings to look at."""


class Task(Protocol):
    """What is trained: weights, and a loss addressed by the step alone."""

    module: nn.Module
    batch: int

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (a scalar) of step ``step`` and extra values to log. All randomness is addressed by ``step``."""
        ...


@dataclass(frozen=True)
class LoopSettings:
    """How long and how watched. ``ema`` is the decay of the averaged weights at the end of its warm-up."""

    steps: int
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    ema: float = 0.995
    log_every: int = 10
    checkpoint_seconds: float = 20.0


Observer = Callable[[dict[str, float]], None]


def fit(task: Task, settings: LoopSettings, folder: Path, observe: Observer = lambda row: None,
        meter: Callable[[], dict[str, float]] = dict) -> nn.Module:
    """Train ``task.module`` in place and leave the averaged weights in it; returns it.

    State goes to ``folder``: a checkpoint at least each ``checkpoint_seconds``, and a line of metrics each ``log_every``
    steps (with what ``meter`` returns then, and handed to ``observe``). Called again after a kill it continues at the checkpoint and ends with the
    weights of an uninterrupted run, bit by bit on the same machine, because each step's randomness has an address.

    Raises:
        NonFiniteLoss: loss or gradient is not finite; weights stay at the last checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    module = task.module.train()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}     # not a frozen text encoder's
    optimisers = Optimisers(module, settings.optimiser)
    average = {name: p.detach().clone() for name, p in trained.items()}
    first = _resume(folder, module, optimisers, average)
    module.zero_grad(set_to_none=True)
    saved = logged = time.monotonic()
    since = 0

    with open(folder / METRICS, "a") as metrics:
        for step in range(first, settings.steps):
            rate = learning_rate_at(step, settings.steps, settings.optimiser)
            loss, extra = task.loss(step)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(list(trained.values()), settings.optimiser.clip)
            if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
                raise NonFiniteLoss(
                    f"step {step + 1}: loss {loss.item()}, gradient norm {norm.item()}. Likely settings: "
                    f"train.learning_rate={settings.optimiser.learning_rate}, train.clip={settings.optimiser.clip}, "
                    f"train.optimiser={settings.optimiser.name}"
                )
            optimisers.step(rate)
            _update_average(average, trained, settings.ema, step)
            since += task.batch

            done = step + 1
            if done % settings.log_every == 0 or done == settings.steps:
                now = time.monotonic()
                row = {"step": done, "steps": settings.steps, "time": time.time(), "loss": loss.item(), "lr": rate,
                       "grad_norm": norm.item(), "images_per_s": since / max(now - logged, 1e-9)}
                row |= {name: value.item() for name, value in extra.items()} | meter()
                metrics.write(json.dumps(row) + "\n")
                metrics.flush()
                observe(row)
                logged, since = now, 0
            if done == settings.steps or time.monotonic() - saved > settings.checkpoint_seconds:
                _save(folder, module, optimisers, average, done)
                saved = time.monotonic()

    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(average[name])
    return module.eval()


@torch.no_grad()
def _update_average(average: dict[str, Tensor], trained: dict[str, nn.Parameter], decay: float, step: int) -> None:
    """Exponential moving average whose horizon grows with the run, so that a short run is not dominated by its start."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.values()), list(trained.values()), weight)


def _save(folder: Path, module: nn.Module, optimisers: Optimisers, average: dict[str, Tensor], step: int) -> None:
    tensors = {f"model.{name}": value for name, value in module.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    tensors |= {f"optimiser.{name}": value for name, value in optimisers.tensors().items()}
    save_tensors(folder / CHECKPOINT, tensors, {"step": step})


def _resume(folder: Path, module: nn.Module, optimisers: Optimisers, average: dict[str, Tensor]) -> int:
    """Load the checkpoint, if any; cut metrics after it. Returns the first step to run."""
    path = folder / CHECKPOINT
    step = 0
    if path.exists():
        tensors, about = load_tensors(path)
        part = lambda prefix: {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
        module.load_state_dict(part("model."))
        for name, value in part("average.").items():
            average[name].copy_(value)
        optimisers.load_tensors(part("optimiser."))
        step = about["step"]
    _cut_metrics(folder / METRICS, step)
    return step


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
