"""Trial settings -> the parts of IRIS that they describe."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from ablations.question.settings import MODEL_TEXT
from iris.diffusion.flow import TimeSampling
from iris.diffusion.sampling import SamplingSettings
from iris.latents import Latent, build_latent, latent_options
from iris.model import TextToLatent
from iris.nn.depth import Depth
from iris.nn.generator import Generator, GeneratorConfig
from iris.nn.mixers import OPTION_GROUPS, MixerOptions
from iris.randomness import initialise
from iris.text import ClassLabels, CLIPText, TextEncoder, Vocabulary, WordEncoder


def latent_shape(settings: dict[str, Any]) -> dict[str, Any]:
    """The options that the latent is built with."""
    chosen = settings["latent"]
    return {name: chosen[name] for name in latent_options(chosen["name"])}


def build_latent_of(settings: dict[str, Any]) -> Latent:
    """The latent, not initialised."""
    return build_latent(settings["latent"]["name"], **latent_shape(settings))


def latent_sizes(settings: dict[str, Any]) -> tuple[int, int]:
    """Channels and factor (image size over latent size) of the latent."""
    return _latent_sizes(settings["latent"]["name"], json.dumps(latent_shape(settings)))


@functools.lru_cache(maxsize=64)
def _latent_sizes(name: str, options: str) -> tuple[int, int]:
    """Kept, because `match` asks often and a pretrained latent reads its weights."""
    latent = build_latent(name, **json.loads(options))
    return latent.channels, latent.factor


def text_width(settings: dict[str, Any]) -> int:
    """Width of the text tokens that the generator reads."""
    model = settings["model"]
    return _clip(model["text_source"])[0] if model["text"] == "clip" else model["text_width"]


@functools.lru_cache(maxsize=4)
def _clip(source: str | None) -> tuple[int, str]:
    """Width and fingerprint of a pretrained text encoder."""
    encoder = _clip_text(source)
    return encoder.width, encoder.fingerprint()


def _clip_text(source: str | None) -> CLIPText:
    return CLIPText(source) if source else CLIPText()


def part_facts(settings: dict[str, Any]) -> dict[str, str]:
    """Fingerprints of the pretrained parts that a trial uses: their weights determine its result, not where they lie."""
    facts = {}
    if settings["latent"]["name"] == "pretrained":
        facts["latent"] = _latent_fingerprint(json.dumps(latent_shape(settings)))
    if settings["model"]["text"] == "clip":
        facts["text"] = _clip(settings["model"]["text_source"])[1]
    return facts


@functools.lru_cache(maxsize=4)
def _latent_fingerprint(options: str) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(build_latent("pretrained", **json.loads(options)).state_dict().items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def build_text(settings: dict[str, Any], captions: Sequence[str]) -> TextEncoder:
    """The text encoder, not initialised; what it knows of words or classes comes from ``captions``."""
    model = settings["model"]
    if model["text"] == "clip":
        return _clip_text(model["text_source"])
    if model["text"] == "labels":
        return ClassLabels.from_captions(captions, model["text_width"])
    return WordEncoder(
        Vocabulary.from_captions(captions, model["text_length"]), model["text_width"], model["text_layers"]
    )


def generator_config(settings: dict[str, Any], channels: int, text_width: int) -> GeneratorConfig:
    """The generator's shape, for latents of ``channels`` channels and text of ``text_width``."""
    shape = {name: value for name, value in settings["model"].items() if name not in MODEL_TEXT}
    mixers = MixerOptions.from_dict({group: settings[group] for group in OPTION_GROUPS})
    return GeneratorConfig(
        channels=channels, text_width=text_width, mixers=mixers, depth=Depth(**settings["depth"]), **shape
    )


def build_model(settings: dict[str, Any], channels: int, text: TextEncoder) -> TextToLatent:
    """Text encoder and generator of a trial, initialised from its seed."""
    generator = Generator(generator_config(settings, channels, text.width))
    return initialise(TextToLatent(text, generator), settings["seed"])


def sampling_of(settings: dict[str, Any]) -> SamplingSettings:
    """How the trial's images are made."""
    return SamplingSettings(**settings["sample"])


def times_of(settings: dict[str, Any]) -> TimeSampling:
    """The distribution of training times."""
    train = settings["train"]
    return TimeSampling(train["time"], train["time_mean"], train["time_std"], train["time_scale"], train["time_shift"])
