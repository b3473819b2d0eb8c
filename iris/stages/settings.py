"""The settings of ``python -m iris.training``: typed, checked, and what of them determines a stage's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iris.data.settings import KINDS, READY
from iris.errors import SettingError
from iris.latents.discriminator import AdversarialOptions
from iris.latents.losses import ReconstructionOptions
from iris.latents.perceptual import PerceptualOptions
from iris.nn.depth import Depth
from iris.nn.mixers import AttentionOptions, FourierOptions, FusionOptions, RecurrenceOptions, SpatialOptions
from iris.settings import Composer, build, number, one_of, plain_values
from iris.training.distill_settings import DistillSettings
from iris.training.flow_settings import FlowTraining, Model

STAGES = ("vae", "class", "text", "aesthetic", "distill")
CONF = Path(__file__).parents[1] / "training" / "conf"
GROUPS = ("stage", "data", "latent", "model", "scale")
COMPOSER = Composer("iris.training.conf", CONF, GROUPS, "stage=text or train.steps=2000")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Captioned images (conf/data); null leaves a choice to the source. See ``iris.data.SourceSettings``; ``live`` and
    ``workers`` are the stages' own."""

    name: str = one_of(*KINDS, *READY)
    path: str | None
    config: str | None
    revision: str | None
    streaming: bool | None
    size: int | None = number(8)
    crop: str | None
    image_column: str | None
    text_column: str | None
    label_column: str | None
    score_column: str | None
    min_score: float | None
    labels: list | None
    train: int | None = number(1)
    validation: int | float | None = number(0)
    seed: int | None
    buffer: int | None = number(1)
    max_bad: float | None = number(0, 0.99)
    live: bool
    workers: int = number(0)


@dataclass(frozen=True, kw_only=True)
class LatentChoice:
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
    store: str = one_of("float16", "bfloat16", "float32")
    kl_weight: float = number(0)
    detail_weight: float = number(0)


@dataclass(frozen=True, kw_only=True)
class Train(FlowTraining):
    """How a stage is trained: train.* of the stage that the command names."""

    precision: str = one_of("no", "bf16", "fp16")
    compile: bool
    device: str
    accumulate: int = number(1)
    gradient_checkpointing: bool
    skip_nonfinite: int = number(0)
    checkpoint_seconds: float = number(0)
    keep: int = number(1)
    log_every: int = number(1)
    validate_every: int = number(0)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The pictures that train.validate_every makes. guidance 1 means none."""

    count: int = number(1, 256)
    prompts: list | None
    sampler: str = one_of("euler", "heun", "midpoint", "stochastic")
    steps: int = number(1)
    guidance: float = number(0)
    guidance_start: float = number(0, 1)
    guidance_end: float = number(0, 1)
    guidance_rescale: float = number(0, 1)
    shift: float = number(0, above=True)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The whole configuration. ``start`` is the setting ``from``, a word that Python keeps for itself."""

    stage: str = one_of(*STAGES)
    data: Data
    latent: LatentChoice
    reconstruction: ReconstructionOptions
    perceptual: PerceptualOptions
    adversarial: AdversarialOptions
    model: Model
    depth: Depth
    fourier: FourierOptions
    recurrence: RecurrenceOptions
    spatial: SpatialOptions
    fusion: FusionOptions
    attention: AttentionOptions
    train: Train
    student: DistillSettings
    sample: Sample
    start: str | None
    vae: str | None
    out: str | None
    runs_dir: str
    seed: int = number(0)
    threads: int | None = number(1)
    log: str = one_of("mlflow", "none")


# Of train.*: where and how a run is computed, watched and kept. The rest determines the weights.
RUNNING = (
    "device",
    "accumulate",
    "gradient_checkpointing",
    "skip_nonfinite",
    "checkpoint_seconds",
    "keep",
    "log_every",
    "validate_every",
)
# Of train.*: what a VAE has a use for.
VAE_TRAIN = (
    "steps",
    "batch",
    "optimiser",
    "learning_rate",
    "weight_decay",
    "warmup",
    "decay",
    "clip",
    "ema",
    "precision",
    "compile",
)
# Those words of a command line that a stage which is made on the way shares with the stage that asked for it: not how
# that one is trained, what it starts from, or which rows it selects.
OWN = ("stage", "train", "student", "from", "out")
SELECTION = ("data.score_column", "data.min_score")  # of stage=aesthetic
PASSING = ("data.live", "data.workers", "data.crop")  # of no use to stage=vae, which stores its pictures
SHARED_TRAIN = ("device", "precision", "compile", "skip_nonfinite", "checkpoint_seconds", "keep", "log_every")


def compose(overrides: Sequence[str]) -> Any:
    """The composed configuration of a command line; ``student.steps=1,2,4`` is a list, as it looks.

    Raises:
        SettingError: a group, option, key or value that does not exist or cannot be read.
    """
    return COMPOSER.composed([listed(word) for word in overrides])


def settings_of(overrides: Sequence[str]) -> Settings:
    """Checked settings of a command line.

    Raises:
        SettingError: as ``compose`` and ``iris.settings.build``; no stage.
    """
    if not any(word.startswith("stage=") for word in overrides):
        raise SettingError(f"stage is missing; allowed: {', '.join(STAGES)}")
    values = plain_values(compose(overrides))
    for name in ("from", "vae", "out"):
        if not isinstance(values[name], str | None):
            raise SettingError(f"{name}={values[name]!r} must be str or null")
    values["start"] = values.pop("from")
    return build(Settings, values)


def listed(word: str) -> str:
    """``key=1,2,4`` as ``key=[1,2,4]``: Hydra takes the former for a sweep."""
    key, equals, value = word.partition("=")
    return f"{key}=[{value}]" if equals and "," in value and not set(value) & set("[]{}()'\"") else word


def words_for(stage: str, overrides: Sequence[str]) -> list[str]:
    """The command line of an earlier stage that a command needs: what both share, under ``stage=``."""
    own = {*OWN, *(() if stage == "aesthetic" else SELECTION), *(("vae", *PASSING) if stage == "vae" else ())}

    shared = {f"train.{name}" for name in SHARED_TRAIN}

    def kept(key: str) -> bool:
        return key in shared or not any(key == name or key.startswith(f"{name}.") for name in own)

    return [f"stage={stage}", *[word for word in overrides if kept(word.partition("=")[0])]]
