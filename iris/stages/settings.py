"""The settings of a trained model: each group declared beside the code that reads it, put together here.

A chain of stages reads them: ``vae.*``, ``pretrain.*``, ``train.*``, ``finetune.*`` and ``distill.*`` say how the stages vae,
class, text, aesthetic and distill are trained; all of them share the data, the latent, the model and ``compute.*``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from iris.data.settings import DATA_OPTIONS, Data
from iris.diffusion.sampling import Sample
from iris.latents import LATENTS
from iris.latents.discriminator import AdversarialOptions
from iris.latents.losses import ReconstructionOptions
from iris.latents.perceptual import PerceptualOptions
from iris.nn.depth import Depth
from iris.nn.mixers import AttentionOptions, FourierOptions, FusionOptions, RecurrenceOptions, SpatialOptions
from iris.presets import MODEL_OPTIONS
from iris.settings import Tree, setting
from iris.training.distill_settings import DistillSettings
from iris.training.settings import Compute, FlowTraining, Training, VAETraining

STAGES = ("vae", "class", "text", "aesthetic", "distill")
# Stage -> the group that says how it is trained.
TRAINED_BY = {"vae": "vae", "class": "pretrain", "text": "train", "aesthetic": "finetune", "distill": "distill"}


@dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """Settings latent.*: the space that the flow works in; a latent ignores what it has no use for."""

    name: str = setting("wavelet_vae", "the kind", choices=tuple(LATENTS))
    weights: str | None = setting(None, "a key or folder of a trained latent; null: stage vae trains it", result=False)
    patch: int = setting(4, "of pixel: side of a patch", low=1)
    levels: int = setting(2, "halvings by the front end: Haar levels", low=1, high=6)
    stages: int = setting(0, "further halvings that the VAE learns", low=0, high=6)
    channels: int = setting(8, "of a VAE", low=1)
    width: int = setting(96, "channels inside a VAE", low=8)
    blocks: int = setting(1, "residual blocks per resolution of a VAE", low=0)
    front: str = setting("conv", "of conv_vae", choices=("conv", "unshuffle"))
    decoder: str = setting("standard", "phone: at most 1.5 M parameters", choices=("standard", "phone"))
    source: str | None = setting(None, "of pretrained: hub name or folder of a diffusers autoencoder")
    subfolder: str | None = setting(None, "of pretrained, where the source is more than the autoencoder")
    store: str = setting("float32", "encoded data on disk", choices=("float16", "bfloat16", "float32"))


@dataclass(frozen=True, kw_only=True)
class Model:
    """Settings model.*: the generator and the text encoder trained with it."""

    mixer: str = setting("grfm", "a name of iris.nn.mixers.MIXERS, grfm[…] with pathways, or my_module:MyMixer")
    mixer_width: int | None = setting(None, "inner width of the mixer; null: dim (grid.match sets it)", low=1)
    dim: int = setting(64, "channels", low=4)
    heads: int = setting(4, "of attention, blocks of block-diagonal maps", low=1)
    prelude: int = setting(2, "convolution blocks before the core", low=1)
    core: int = setting(1, "layers that are looped", low=1)
    coda: int = setting(2, "blocks of local attention behind the core", low=1)
    iterations: int = setting(4, "passes through the core", low=1)
    ffn_ratio: float = setting(3.0, "hidden width of a feed-forward over dim", low=0, above=True)
    text: str = setting(
        "words", "words: trained with it; labels: captions are classes", choices=("words", "labels", "clip")
    )
    text_source: str | None = setting(None, "of clip: hub name or folder; null: openai/clip-vit-large-patch14")
    text_width: int = setting(64, "of words and labels", low=4)
    text_length: int = setting(20, "of words: tokens of a caption", low=2)
    text_layers: int = setting(1, "of words: transformer layers", low=0)


# The settings of ``model`` that describe its text encoder.
MODEL_TEXT = ("text", "text_source", "text_width", "text_length", "text_layers")


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Settings preview.*: the pictures that compute.validate_every makes, sampled as sample.* says."""

    count: int = setting(16, "pictures", low=1, high=256, result=False)
    prompts: list | None = setting(None, "null: captions of held-out rows", result=False)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a trained model depends on, and how it is trained."""

    stage: str = setting("text", "the stage that the chain ends with", choices=STAGES)
    start: str | None = setting(None, "what it starts from: stages such as class or class,text, a key or a folder")
    seed: int = setting(0, "of everything that is trained", low=0)
    data: Data
    latent: LatentSpace
    vae: VAETraining
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
    pretrain: FlowTraining
    train: FlowTraining
    finetune: FlowTraining
    student: DistillSettings
    distill: Training
    compute: Compute
    sample: Sample
    preview: Preview

    def training(self, stage: str) -> Any:
        """How a stage is trained."""
        return getattr(self, TRAINED_BY[stage])


RECIPE_CHANGES: dict[str, Any] = {
    "finetune": {"steps": 200, "learning_rate": 1.0e-3, "warmup": 0.1},
    "student": {"guidance": 2.5},
}
RECIPE_GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "data": DATA_OPTIONS,
    "latent": {name: {"name": name} for name in LATENTS},
    "model": {"iris": {}, **MODEL_OPTIONS},  # with the text encoder of model.text
    "sample": {
        "default": {},
        "euler": {"sampler": "euler", "steps": 6},
        "heun": {"sampler": "heun", "steps": 4},
        "midpoint": {"sampler": "midpoint", "steps": 4},
        "stochastic": {"sampler": "stochastic", "steps": 4},
    },
}
SCALES: dict[str, dict[str, Any]] = {
    # Two processor cores, minutes.
    "default": {},
    # Seconds: does everything run? Its weights mean nothing.
    "smoke": {
        "data": {"train": 512, "validation": 128, "heldout": 64},
        "latent": {"width": 32},
        "vae": {"steps": 30, "batch": 16},
        "model": {"dim": 32, "text_width": 32},
        "pretrain": {"steps": 12, "batch": 16},
        "train": {"steps": 12, "batch": 16},
        "finetune": {"steps": 12, "batch": 16},
        "student": {"grid": 8},
        "distill": {"steps": 12, "batch": 16},
        "compute": {"log_every": 4},
        "preview": {"count": 4},
        "sample": {"steps": 2},
    },
    # One data-centre GPU a process, hours.
    "gpu": {
        "data": {"validation": 10000},
        "latent": {"store": "float16"},
        "vae": {"steps": 20000, "batch": 256, "learning_rate": 1.0e-3, "ema": 0.9995},
        "model": {"dim": 384, "heads": 6, "core": 2, "iterations": 8},
        "pretrain": {"steps": 40000, "batch": 256, "learning_rate": 1.0e-3, "ema": 0.9995},
        "train": {"steps": 40000, "batch": 256, "learning_rate": 1.0e-3, "ema": 0.9995},
        "finetune": {"steps": 4000, "batch": 256, "ema": 0.9995},
        "distill": {"steps": 20000, "batch": 256, "ema": 0.9995},
        "compute": {"device": "auto", "precision": "bf16", "log_every": 50, "checkpoint_seconds": 120.0},
    },
}


@dataclass(frozen=True, kw_only=True)
class Command(Recipe):
    """The settings of ``python -m iris.training``."""

    out: str | None = setting(None, "folder for the finished weights; null: they stay below runs_dir", result=False)
    runs_dir: str = setting("runs", "stages", result=False)
    threads: int | None = setting(None, "processor threads; null: all cores", low=1, result=False)
    log: str = setting("mlflow", "who is told of it", choices=("mlflow", "none"), result=False)


TREE = Tree(
    Command,
    RECIPE_GROUPS,
    {"scale": lambda: SCALES},
    {"scale": "default"},
    RECIPE_CHANGES | {"compute": {"validate_every": 300}},
    "stage=text or train.steps=2000",
)
