"""Settings -> the parts of IRIS that they describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iris.diffusion.flow import TimeSampling
from iris.diffusion.sampling import SamplingSettings
from iris.latents import Latent, build_latent, latent_options
from iris.nn.generator import GeneratorConfig
from iris.nn.mixers import OPTION_GROUPS, MixerOptions, option_groups, source_digest
from iris.stages.settings import RUNNING, Settings, Train
from iris.text import ClassLabels, CLIPText, TextEncoder, Vocabulary, WordEncoder
from iris.training.loop import LoopSettings
from iris.training.optimiser import OptimiserSettings

TEXT = ("text", "text_source", "text_width", "text_length", "text_layers")  # the settings of a text encoder
VERSION = 1  # raised when a change of code changes what the same settings give


def latent_shape(settings: Settings) -> dict[str, Any]:
    """The options that the latent is built with; a folder as an absolute path, since models are used from elsewhere."""
    options = {name: getattr(settings.latent, name) for name in latent_options(settings.latent.name)}
    return options | ({"source": place_of(options["source"])} if options.get("source") else {})


def latent_of(settings: Settings) -> Latent:
    """The latent, not initialised."""
    return build_latent(settings.latent.name, **latent_shape(settings))


def text_of(settings: Settings, captions: Sequence[str]) -> TextEncoder:
    """The text encoder, not initialised; what it knows of words or classes comes from ``captions``."""
    model = settings.model
    if model.text == "clip":
        return CLIPText(place_of(model.text_source)) if model.text_source else CLIPText()
    if model.text == "labels":
        return ClassLabels.from_captions(captions, model.text_width)
    return WordEncoder(Vocabulary.from_captions(captions, model.text_length), model.text_width, model.text_layers)


def place_of(source: str) -> str:
    """A folder of this machine as an absolute path; a name on the hub as it is."""
    path = Path(source).expanduser()
    return str(path.absolute()) if path.is_dir() else source


def generator_config(settings: Settings, channels: int, text_width: int) -> GeneratorConfig:
    """The generator's shape."""
    shape = {name: value for name, value in asdict(settings.model).items() if name not in TEXT}
    mixers = MixerOptions(**{group: getattr(settings, group) for group in OPTION_GROUPS})
    return GeneratorConfig(channels=channels, text_width=text_width, mixers=mixers, depth=settings.depth, **shape)


def model_facts(settings: Settings) -> dict[str, Any]:
    """What of model.*, depth.* and the mixers' groups a generator's weights depend on."""
    mixer = settings.model.mixer
    facts = {"model": asdict(settings.model), "depth": asdict(settings.depth)}
    facts |= {group: asdict(getattr(settings, group)) for group in option_groups(mixer)}
    if settings.model.text == "clip":  # what its weights are, not where they lie
        facts["model"]["text_source"] = text_of(settings, []).fingerprint()
    return facts | ({"mixer_code": source_digest(mixer)} if ":" in mixer else {})


def train_facts(train: Train) -> dict[str, Any]:
    """What of train.* the weights depend on."""
    return {name: value for name, value in asdict(train).items() if name not in RUNNING}


def loop_settings(train: Train) -> LoopSettings:
    """How the loop runs."""
    optimiser = OptimiserSettings(
        train.optimiser, train.learning_rate, train.weight_decay, train.warmup, train.decay, train.clip
    )
    names = (
        "steps",
        "ema",
        "log_every",
        "checkpoint_seconds",
        "precision",
        "accumulate",
        "compile",
        "gradient_checkpointing",
        "keep",
        "skip_nonfinite",
        "device",
        "validate_every",
    )
    return LoopSettings(optimiser=optimiser, **{name: getattr(train, name) for name in names})


def times_of(train: Train) -> TimeSampling:
    """The distribution of training times."""
    return TimeSampling(train.time, train.time_mean, train.time_std, train.time_scale, train.time_shift)


def sampling_of(settings: Settings) -> SamplingSettings:
    """How pictures are made while training."""
    return SamplingSettings(
        **{name: value for name, value in asdict(settings.sample).items() if name not in ("count", "prompts")}
    )
