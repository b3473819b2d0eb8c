"""Settings -> the parts of IRIS that they describe."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iris.diffusion.sampling import SamplingSettings
from iris.errors import SettingError
from iris.latents import Latent, build_latent, latent_options
from iris.nn.generator import Generator, GeneratorConfig
from iris.nn.mixers import OPTION_GROUPS, MixerOptions, option_groups, source_digest
from iris.randomness import blueprint
from iris.settings import facts
from iris.stages.settings import MODEL_TEXT, Recipe
from iris.text import ClassLabels, CLIPText, TextEncoder, Vocabulary, WordEncoder

# Known of parts that were built to be looked at: a grid's trials share most of them.
_sizes: dict[str, tuple[int, int]] = {}
_parameters: dict[str, int] = {}


def latent_shape(recipe: Recipe) -> dict[str, Any]:
    """The options that the latent is built with; a folder as an absolute path, since models are used from elsewhere."""
    options = {name: getattr(recipe.latent, name) for name in latent_options(recipe.latent.name)}
    return options | ({"source": place_of(options["source"])} if options.get("source") else {})


def latent_of(recipe: Recipe) -> Latent:
    """The latent, not initialised."""
    return build_latent(recipe.latent.name, **latent_shape(recipe))


def latent_sizes(recipe: Recipe) -> tuple[int, int]:
    """Channels and factor (image size over latent size) of the latent; kept, as a pretrained one reads its weights."""
    shape = repr([recipe.latent.name, latent_shape(recipe)])
    if shape not in _sizes:
        latent = latent_of(recipe)
        _sizes[shape] = (latent.channels, latent.factor)
    return _sizes[shape]


def require_side(latent: Latent, size: int) -> None:
    """Raise a SettingError unless the latent divides pictures of ``size`` x ``size`` pixels."""
    try:
        latent.grid(size, size)
    except SettingError as error:
        raise SettingError(f"data.size={size}: {error}") from error


def check_size(recipe: Recipe, size: int) -> None:
    """Raise a SettingError where the latent of a recipe cannot hold pictures of ``size`` x ``size`` pixels."""
    if size % latent_sizes(recipe)[1]:
        require_side(latent_of(recipe), size)


def parameters_of(config: GeneratorConfig) -> int:
    """Parameters of a generator, which is built without memory.

    Raises:
        SettingError: it cannot be built.
    """
    known = repr(config)
    if known not in _parameters:
        with blueprint():
            _parameters[known] = sum(p.numel() for p in Generator(config).parameters())
    return _parameters[known]


def text_of(recipe: Recipe, captions: Sequence[str], name: str | None = None) -> TextEncoder:
    """The text encoder, not initialised; what it knows of words or classes comes from ``captions``.

    ``name``: its kind; None: model.text.
    """
    model, name = recipe.model, name or recipe.model.text
    if name == "clip":
        return CLIPText(place_of(model.text_source)) if model.text_source else CLIPText()
    if name == "labels":
        return ClassLabels.from_captions(captions, model.text_width)
    return WordEncoder(Vocabulary.from_captions(captions, model.text_length), model.text_width, model.text_layers)


def text_fingerprint(recipe: Recipe) -> str:
    """Of a frozen text encoder: what its weights are, not where they lie."""
    return _clip(recipe.model.text_source)[1]


def text_width(recipe: Recipe) -> int:
    """Width of the text tokens that the generator reads."""
    return _clip(recipe.model.text_source)[0] if recipe.model.text == "clip" else recipe.model.text_width


@functools.lru_cache(maxsize=4)
def _clip(source: str | None) -> tuple[int, str]:
    """Width and fingerprint of a pretrained text encoder; kept, as it reads all weights."""
    encoder = CLIPText(place_of(source)) if source else CLIPText()
    return encoder.width, encoder.fingerprint()


def place_of(source: str) -> str:
    """A folder of this machine as an absolute path; a name on the hub as it is."""
    path = Path(source).expanduser()
    return str(path.absolute()) if path.is_dir() else source


def generator_config(recipe: Recipe, channels: int, text_width: int) -> GeneratorConfig:
    """The generator's shape, for latents of ``channels`` channels and text of ``text_width``."""
    shape = {name: value for name, value in vars(recipe.model).items() if name not in MODEL_TEXT}
    mixers = MixerOptions(**{group: getattr(recipe, group) for group in OPTION_GROUPS})
    return GeneratorConfig(channels=channels, text_width=text_width, mixers=mixers, depth=recipe.depth, **shape)


def model_facts(recipe: Recipe, text: str) -> dict[str, Any]:
    """What of model.*, depth.* and the mixers' groups a generator's weights depend on; ``text``: the encoder's kind."""
    mixer = recipe.model.mixer
    model = facts(recipe.model) | {"text": text}
    for name in {"words": ("text_source",), "labels": ("text_source", "text_length", "text_layers")}.get(
        text, MODEL_TEXT[2:]
    ):
        del model[name]
    if text == "clip":
        model["text_source"] = text_fingerprint(recipe)
    known = {"model": model, "depth": facts(recipe.depth)}
    known |= {group: facts(getattr(recipe, group)) for group in option_groups(mixer)}
    return known | ({"mixer_code": source_digest(mixer)} if ":" in mixer else {})


def sampling_of(recipe: Any, own: SamplingSettings) -> SamplingSettings:
    """How sample.* makes images with a model whose ``own`` sampling holds where nothing is set.

    Raises:
        SettingError: a value that cannot be used.
    """
    return SamplingSettings.resolved(own, **recipe.sample.given("iris", tuple(vars(own))))
