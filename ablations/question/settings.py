"""Every setting, typed: composed values in, checked dataclasses out, or an error that names the key and what is allowed."""

from __future__ import annotations

from dataclasses import dataclass

from eval.judges import JUDGES
from iris.errors import SettingError
from iris.nn.depth import Depth
from iris.nn.mixers import (
    OPTION_GROUPS,
    AttentionOptions,
    FourierOptions,
    FusionOptions,
    RecurrenceOptions,
    SpatialOptions,
)
from iris.settings import build, flatten, number, one_of, suggestion
from iris.training.flow_settings import FlowTraining, Model

__all__ = ["MODEL_TEXT", "TRIAL_GROUPS", "Settings", "build", "flatten", "number", "one_of", "suggestion"]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The question (conf/grid): what is varied (``ablations.question.axes``), against what, and what difference matters."""

    name: str
    question: str
    claim: str
    baseline: dict
    axes: dict
    zip: list
    when: dict
    exclude: list
    points: list
    include: list
    match: str = one_of("params", "flops", "latency", "none")
    decide: dict
    halving: dict | None


@dataclass(frozen=True, kw_only=True)
class Data:
    """Captioned images (conf/data). Counts of null mean all there are."""

    name: str = one_of("shapes", "shapes2", "parquet", "folder")
    path: str | None
    size: int = number(8)
    image_column: str
    text_column: str
    labels: list | None
    train: int | None = number(1)
    validation: int | float | None = number(0, above=True)  # a share, or a count
    heldout: int | None = number(0)
    seed: int
    max_bad: float = number(0, 0.99)


@dataclass(frozen=True, kw_only=True)
class Latent:
    """The latent space (conf/latent); a latent ignores what it has no use for."""

    name: str = one_of("pixel", "haar", "wavelet_vae", "conv_vae", "pretrained")
    patch: int = number(1)
    levels: int = number(1, 6)
    stages: int = number(0, 6)
    channels: int = number(1)
    width: int = number(8)
    blocks: int = number(1)
    front: str = one_of("conv", "unshuffle")
    decoder: str = one_of("standard", "phone")
    source: str | None
    subfolder: str | None
    steps: int = number(1)
    batch: int = number(1)
    learning_rate: float = number(0, above=True)
    kl_weight: float = number(0)
    detail_weight: float = number(0)
    seed: int


@dataclass(frozen=True, kw_only=True)
class Train(FlowTraining):
    """How the flow is trained (conf/train)."""

    precision: str = one_of("no", "bf16", "fp16")
    device: str = one_of("cpu", "auto", "cuda", "mps")
    accumulate: int = number(1)
    compile: bool
    gradient_checkpointing: bool
    checkpoint_seconds: float = number(0)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """How images are made (conf/sample). guidance 1 means none."""

    sampler: str = one_of("euler", "heun", "midpoint", "stochastic")
    steps: int = number(1)
    guidance: float = number(0)
    guidance_start: float = number(0, 1)
    guidance_end: float = number(0, 1)
    guidance_rescale: float = number(0, 1)
    shift: float = number(0, above=True)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The network that FID features and CLIP scores come from (conf/judge)."""

    name: str = one_of(*JUDGES)
    weights: str | None
    model: str | None
    prefix: str | None


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How much is measured (conf/measure). latency_rounds 0: speed and memory are not."""

    samples: int = number(4)
    heldout_samples: int = number(0)
    iterations: list
    latency_rounds: int = number(0)
    latency_warmup: int = number(0)

    def __post_init__(self) -> None:
        if self.latency_rounds == 1:
            raise SettingError("measure.latency_rounds=1 has no spread; allowed: 2 or more, or 0 to measure no speed")


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Where trials run (conf/launcher); through submitit in every case. What is Slurm's is read by Slurm alone."""

    name: str = one_of("local", "inline", "slurm")
    workers: int = number(1)
    timeout_min: int = number(1)
    gpus_per_trial: int = number(0)
    setup: list
    interrupt: str = one_of("ask", "detach", "cancel")
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    nodes: int = number(1)
    memory_gb: float | None = number(0, above=True)
    requeues: int = number(0)
    signal_s: int = number(1)
    array_size: int = number(1)
    python: str | None
    speed_constraint: str | None
    sbatch: dict

    def __post_init__(self) -> None:
        if self.name != "slurm" and self.gpus_per_trial > 1:
            raise SettingError(
                f"launcher.gpus_per_trial={self.gpus_per_trial} with launcher={self.name}: a trial is one process there, "
                "on one GPU; allowed: 0, 1 (or launcher=slurm)"
            )


@dataclass(frozen=True, kw_only=True)
class Track:
    """What MLflow is told, and where it is."""

    uri: str | None
    models_mb: float = number(0)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The whole configuration."""

    grid: Grid
    data: Data
    latent: Latent
    model: Model
    depth: Depth
    fourier: FourierOptions
    recurrence: RecurrenceOptions
    spatial: SpatialOptions
    fusion: FusionOptions
    attention: AttentionOptions
    train: Train
    sample: Sample
    judge: Judge
    measure: Measure
    launcher: Launcher
    track: Track
    seeds: list
    threads: int | None = number(1)
    runs_dir: str
    reports_dir: str
    dry_run: bool
    action: str = one_of("run", "status", "cancel", "retry", "report")


# The settings of `model` that describe its text encoder.
MODEL_TEXT = ("text", "text_source", "text_width", "text_length", "text_layers")

# What a trial's result depends on; the rest says where and how it runs.
TRIAL_GROUPS = ("data", "latent", "model", "depth", *OPTION_GROUPS, "train", "sample", "judge", "measure")
