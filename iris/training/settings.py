"""How a stage is trained, and how that is computed: settings that the stages share."""

from __future__ import annotations

from dataclasses import dataclass

from iris.diffusion.flow import LOSS_WEIGHTS, MODE_SCALES, TIME_KINDS, TimeSampling
from iris.settings import setting
from iris.training.loop import LoopSettings
from iris.training.optimiser import OPTIMISERS, OptimiserSettings


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of every stage's training; these are the distilled student's own defaults."""

    steps: int = setting(600, "updates", low=1)
    batch: int = setting(64, "rows of a step, over all processes and parts", low=1)
    optimiser: str = setting("adamw", "muon: for matrices, AdamW for the rest", choices=OPTIMISERS)
    learning_rate: float = setting(1.0e-3, "at its highest", low=0, above=True)
    weight_decay: float = setting(0.01, "of matrices", low=0)
    warmup: float = setting(0.05, "share of the steps", low=0, high=1)
    decay: float = setting(0.5, "share of the steps", low=0, high=1)
    clip: float = setting(1.0, "largest gradient norm", low=0, above=True)
    ema: float = setting(0.995, "decay of the averaged weights", low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class VAETraining(Training):
    """Settings vae.*."""

    learning_rate: float = setting(3.0e-3, "at its highest", low=0, above=True)
    kl_weight: float = setting(1.0e-4, "of the KL divergence, mean per latent value", low=0)
    detail_weight: float = setting(0.5, "of the L1 error of the Haar detail bands", low=0)
    seed: int | None = setting(None, "of its weights and batches; null: seed", low=0)


@dataclass(frozen=True, kw_only=True)
class FlowTraining(Training):
    """Settings pretrain.*, train.* and finetune.*."""

    steps: int = setting(900, "updates", low=1)
    optimiser: str = setting("muon", "muon: for matrices, AdamW for the rest", choices=OPTIMISERS)
    learning_rate: float = setting(4.0e-3, "at its highest", low=0, above=True)
    caption_dropout: float = setting(0.1, "share of captions replaced by the empty one", low=0, high=1)
    time: str = setting("logit_normal", "distribution of training times; mode is SD3's", choices=TIME_KINDS)
    time_mean: float = setting(0.0, "of logit_normal")
    time_std: float = setting(1.0, "of logit_normal", low=0, above=True)
    time_scale: float = setting(1.29, "of mode", low=MODE_SCALES[0], high=MODE_SCALES[1])
    time_shift: float = setting(1.0, "resolution shift of the times; 1: none", low=0, above=True)
    loss_weight: str = setting("none", "odds: t / (1 - t)", choices=tuple(LOSS_WEIGHTS))
    min_snr_gamma: float = setting(5.0, "of min_snr", low=0, above=True)

    @property
    def times(self) -> TimeSampling:
        """The distribution of training times."""
        return TimeSampling(self.time, self.time_mean, self.time_std, self.time_scale, self.time_shift)


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Settings compute.*: where and how a training is computed, watched and kept. Of these precision alone is in a key."""

    precision: str = setting("no", "no: float32", choices=("no", "bf16", "fp16"))
    device: str = setting("cpu", "cpu, auto, cuda, mps", result=False)
    compile: bool = setting(False, "torch.compile the repeated blocks", result=False)
    accumulate: int = setting(1, "parts of a process's share of the batch, one after another", low=1, result=False)
    gradient_checkpointing: bool = setting(False, "compute the core's passes again in the backward", result=False)
    skip_nonfinite: int = setting(
        0, "steps without a finite loss that are skipped before one ends it", low=0, result=False
    )
    checkpoint_seconds: float = setting(20.0, "between two checkpoints", low=0, result=False)
    keep: int = setting(2, "checkpoints beside the best", low=1, result=False)
    log_every: int = setting(10, "steps", low=1, result=False)
    validate_every: int = setting(0, "steps between two looks at held-out data; 0: never", low=0, result=False)


def loop_settings(training: Training, compute: Compute, group: str) -> LoopSettings:
    """How the loop runs a stage's training; ``group``: the training's settings.

    Raises:
        SettingError: a value that it cannot use.
    """
    shared = vars(compute) | {"log_every": max(1, min(compute.log_every, training.steps // 4))}
    optimiser = OptimiserSettings(
        training.optimiser,
        training.learning_rate,
        training.weight_decay,
        training.warmup,
        training.decay,
        training.clip,
    )
    return LoopSettings(training.steps, optimiser, training.ema, group=group, **shared)
