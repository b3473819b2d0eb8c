"""The state of a training run between two steps, and what a step does to it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from iris.errors import SettingError
from iris.training.checkpoint import Checkpoints, random_state, restore_random_state
from iris.training.devices import compiled_blocks, make_accelerator
from iris.training.optimiser import Optimisers
from iris.training.safety import BatchFacts, non_finite
from iris.training.share import Share

if TYPE_CHECKING:
    from iris.training.loop import LoopSettings, Task


class _Loss(nn.Module):
    """A task's loss as a module's forward: what Accelerate wraps in autocast and DDP, so that both cover all of it."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.module = task.module
        self._of = task.loss

    def forward(self, step: int, index: int, of: int) -> tuple[Tensor, dict[str, Tensor]]:
        # A task from before shares, or one that cannot be split, need not know of them.
        return self._of(step) if of == 1 else self._of(step, Share(index, of))


class Step(NamedTuple):
    """A step's loss and gradient norm over the global batch, the extras of this process's shares, a signal that came."""

    loss: float
    norm: float
    extras: list[dict[str, Tensor]]
    signal: int


class TrainingRun:
    """The state of a run between two steps: weights, their average, the optimisers', and how far it is."""

    def __init__(self, task: Task, settings: LoopSettings, folder: Path) -> None:
        self.task, self.settings, self.folder = task, settings, folder
        self.accelerator = make_accelerator(settings.device, settings.precision, settings.accumulate)
        self.world, self.main = self.accelerator.num_processes, self.accelerator.is_main_process
        self._check()
        self._origin = next(task.module.parameters()).device
        self.module = task.module.to(self.accelerator.device).train()
        for part in self._looped():
            part.checkpoint_passes = settings.gradient_checkpointing
        # Not a frozen text encoder's.
        self.trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.optimisers = Optimisers(self.module, settings.optimiser)
        self.average = {name: p.detach().clone() for name, p in self.trained.items()}
        self.checkpoints = Checkpoints(folder, settings.keep)
        self.step, self.skipped, self.saved = 0, 0, 0
        self.best, self.best_step = math.inf, None
        self._resume()
        self.module.zero_grad(set_to_none=True)
        self.loss = self.accelerator.prepare(_Loss(task))
        if hasattr(task, "go_on_at"):  # last: one process's failure is a lost worker to the others' first step
            task.go_on_at(self.step)

    def _check(self) -> None:
        shares = self.world * self.settings.accumulate
        if self.task.batch % shares:
            raise SettingError(
                f"{self.settings.group}.batch={self.task.batch} must be a multiple of {shares}: {self.world} processes "
                f"times compute.accumulate={self.settings.accumulate}"
            )
        if self.settings.gradient_checkpointing and not self._looped():
            raise SettingError("compute.gradient_checkpointing=true: this stage has no looped core; allowed: false")
        if self.settings.validate_every and not hasattr(self.task, "validate"):
            raise SettingError(
                f"compute.validate_every={self.settings.validate_every}: this stage has no validation; allowed: 0"
            )

    def _looped(self) -> list[nn.Module]:
        return [part for part in self.task.module.modules() if hasattr(part, "checkpoint_passes")]

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Inside, the module's blocks are compiled, if the settings say so."""
        blocks = compiled_blocks(self.module) if self.settings.compile else []
        for block in blocks:
            block.compile()
        try:
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None

    def gradients(self, signal: int) -> Step:
        """Leave the clipped gradient of the global batch's mean loss in the weights."""
        count = self.settings.accumulate
        first, of = self.accelerator.process_index * count, self.world * count
        losses, extras = [], []
        for index in range(count):
            # Processes exchange gradients once a step, with the last share.
            with self.accelerator.no_sync(self.loss) if index < count - 1 else nullcontext():
                loss, extra = self.loss(self.step, first + index, of)
                self.accelerator.backward(loss)  # divides by ``accumulate``, and scales in fp16
            losses.append(loss.detach())
            extras.append(extra)
        if self.accelerator.scaler is not None:
            # Here, not in Accelerate's optimisers: those unscale the second one's gradients twice.
            for part in self.optimisers.parts:
                self.accelerator.scaler.unscale_(part)
        norm = nn.utils.clip_grad_norm_(list(self.trained.values()), self.settings.optimiser.clip)
        loss = losses[0] if count == 1 else torch.stack(losses).mean()
        if self.world > 1:  # all processes must judge and stop alike
            shared = self.accelerator.gather(torch.stack([loss.float(), torch.full_like(loss, signal).float()])[None])
            loss, signal = shared[:, 0].mean(), int(shared[:, 1].max())
        return Step(loss.item(), norm.item(), extras, signal)

    def update(self, rate: float) -> None:
        """Take the step."""
        self.optimisers.step(rate)
        _update_average(self.average, self.trained, self.settings.ema, self.step)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()

    def skip(self, step: Step) -> None:
        """Leave the weights alone, or give up. In fp16 too large a gradient lowers the loss's scale, uncounted."""
        scaler, chosen = self.accelerator.scaler, self.settings.optimiser
        if scaler is None or not math.isfinite(step.loss) or scaler.get_scale() <= 1:
            self.skipped += 1
            if self.skipped > self.settings.skip_nonfinite:
                group = self.settings.group
                likely = {
                    f"{group}.learning_rate": chosen.learning_rate,
                    f"{group}.clip": chosen.clip,
                    f"{group}.optimiser": chosen.name,
                    "compute.precision": self.settings.precision,
                    "compute.skip_nonfinite": self.settings.skip_nonfinite,
                }
                raise non_finite(self.step + 1, step.loss, step.norm, self._facts(), likely)
        self.module.zero_grad(set_to_none=True)
        if scaler is not None:
            scaler.update()

    def means(self, extras: list[dict[str, Tensor]]) -> dict[str, float]:
        """The extras over all shares of the step."""
        if len(extras) == self.world == 1 or not extras[0]:
            return {name: value.item() for name, value in extras[0].items()}
        values = torch.stack([torch.stack([value.float() for value in extra.values()]) for extra in extras]).mean(0)
        return dict(zip(extras[0], self.accelerator.reduce(values, "mean").tolist(), strict=True))

    def validate(self) -> float:
        """The task's measure of the averaged weights; a checkpoint that has the lowest yet is kept as the best."""
        self._swap()
        self.module.eval()
        try:
            value = float(self.task.validate())
        finally:
            self.module.train()
            self._swap()
        if value < self.best:
            self.best, self.best_step = value, self.step
            self.save()
            if self.main:
                self.checkpoints.keep_best()
        return value

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.trained.items():
            kept = parameter.clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(kept)

    def save(self) -> None:
        """Write a checkpoint: all that the next step depends on. The data's position is the step's number, or, of a task
        with ``go_on_at``, what the task keeps beside it."""
        if not self.main or (self.saved == self.step and self.step):
            return
        tensors = {f"model.{name}": value for name, value in self.module.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        tensors |= {f"optimiser.{name}": value for name, value in self.optimisers.tensors().items()}
        tensors |= {f"random.{name}": value for name, value in random_state().items()}  # of the first process
        about = {
            "step": self.step,
            "skipped": self.skipped,
            "best": self.best if math.isfinite(self.best) else None,
            "best_step": self.best_step,
        }
        if self.accelerator.scaler is not None:
            about["scaler"] = self.accelerator.scaler.state_dict()
        self.checkpoints.save(tensors, about)
        self.saved = self.step

    def _resume(self) -> None:
        """Load the newest readable checkpoint, if any."""
        loaded = self.checkpoints.load()
        if loaded is not None:
            tensors, about = loaded

            def part(prefix: str) -> dict[str, Tensor]:
                return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

            self.module.load_state_dict(part("model."))
            for name, value in part("average.").items():
                self.average[name].copy_(value)
            self.optimisers.load_tensors(part("optimiser."))
            if "random.torch" in tensors:
                restore_random_state(part("random."))
            if self.accelerator.scaler is not None and "scaler" in about:
                self.accelerator.scaler.load_state_dict(about["scaler"])
            self.step = self.saved = about["step"]
            self.skipped = about.get("skipped", 0)
            self.best = math.inf if about.get("best") is None else about["best"]
            self.best_step = about.get("best_step")
            if self.main and self.best_step == self.step:  # a kill may have come before it was kept
                self.checkpoints.keep_best()

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """Put the averaged weights into the module."""
        for name, parameter in self.trained.items():
            parameter.copy_(self.average[name])
        if self.world > 1:  # the first process may still be writing what the others' callers read
            self.accelerator.wait_for_everyone()
        return self.module.to(self._origin).eval()

    def left(self) -> str:
        """Which checkpoint a message can promise."""
        if not self.main and self.saved != self.step:
            return f"checkpoints, which the first process writes, are in {self.folder}"
        newest = f"the last checkpoint in {self.folder} is of step {self.saved}"
        return newest if self.saved else f"there is no checkpoint in {self.folder} yet"

    def rescue(self) -> str:
        """Save between two steps, without the other processes."""
        self.save()
        return self.left()

    def advice(self) -> str:
        """Where memory ran out, and what to turn."""
        chosen, size = self.settings, self._facts().size
        rows = self.task.batch // (self.world * chosen.accumulate)
        batch = f"{chosen.group}.batch"
        text = f"in step {self.step + 1} with {batch}={self.task.batch}, {rows} rows at a time"
        text += f" of size {' x '.join(map(str, size))}" if size else ""
        text += f": lower {batch}, or raise compute.accumulate={chosen.accumulate} (the same result in smaller shares)"
        if self._looped() and not chosen.gradient_checkpointing:
            text += ", or set compute.gradient_checkpointing=true"
        return text

    def advice_on_look(self) -> str:
        """The same of ``validate``."""
        return (
            f"while the averaged weights were looked at after step {self.step}: lower preview.count, or set "
            f"compute.validate_every={self.settings.validate_every} to 0 to do without"
        )

    def _facts(self) -> BatchFacts:
        facts = self.task.describe(self.step) if hasattr(self.task, "describe") else BatchFacts()
        group = self.settings.group
        return facts._replace(settings={n if "." in n else f"{group}.{n}": v for n, v in facts.settings.items()})


@torch.no_grad()
def _update_average(average: dict[str, Tensor], trained: dict[str, nn.Parameter], decay: float, step: int) -> None:
    """Exponential moving average whose horizon grows with the run: a short run is not dominated by its start."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.values()), list(trained.values()), weight)
