"""The sizes of IRIS: generators of 19, 47 and 135 million parameters with the latent and text width of its document.

They differ in width, heads and core layers alone; the rest is one family. The document gives totals and no layer sizes,
so widths and depths are chosen to meet them: two prelude and two coda blocks, feed-forward 3.75 times the width.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from iris.errors import SettingError, require_choice
from iris.model import IrisModel
from iris.nn.depth import Depth
from iris.nn.generator import GeneratorConfig
from iris.nn.mixers import MixerOptions
from iris.randomness import initialise

SIZE = 256
TEXT_WIDTH, TEXT_LENGTH = 768, 77  # CLIP ViT-L/14
# 256x256x3 -> 16x16x16, 48 times fewer numbers. The phone decoder is as wide as the encoder here, 128 at most.
LATENT_OPTIONS = {"levels": 1, "stages": 3, "channels": 16, "width": 128, "blocks": 2, "decoder": "phone"}
# What of a preset may be changed beside the generator.
SURROUNDINGS: dict[str, Any] = {"latent": "wavelet_vae", "latent_options": LATENT_OPTIONS, "size": SIZE}
FAMILY: dict[str, Any] = {
    "channels": LATENT_OPTIONS["channels"],
    "text_width": TEXT_WIDTH,
    "prelude": 2,
    "coda": 2,
    "iterations": 4,
    "mixer": "grfm",
}
# In which model.* each size differs from the embedded default model.
MODEL_OPTIONS: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 320, "heads": 5, "core": 4, "ffn_ratio": 3.75},
    "small": {"dim": 512, "heads": 8, "core": 4, "ffn_ratio": 3.75},
    "base": {"dim": 768, "heads": 12, "core": 6, "ffn_ratio": 3.75},
}


def create_iris_tiny(seed: int = 0, **changes: Any) -> IrisModel:
    """IRIS Tiny: 19,123,492 generator parameters (document: 19 M), dim 320, 5 heads, 4 core layers.

    Args:
        seed: of the initial weights.
        changes: other values of ``GeneratorConfig``'s fields (``mixer=``, ``iterations=``, ``depth=``, …), or of
            ``latent``, ``latent_options`` and ``size``.

    Raises:
        SettingError: an unknown name, or a value that cannot be used.
    """
    return _create("tiny", seed, changes)


def create_iris_small(seed: int = 0, **changes: Any) -> IrisModel:
    """IRIS Small: 46,521,904 generator parameters (document: 47 M), dim 512, 8 heads, 4 core layers.

    Arguments and errors as ``create_iris_tiny``.
    """
    return _create("small", seed, changes)


def create_iris_base(seed: int = 0, **changes: Any) -> IrisModel:
    """IRIS Base: 133,140,440 generator parameters (document: 135 M), dim 768, 12 heads, 6 core layers.

    Arguments and errors as ``create_iris_tiny``.
    """
    return _create("base", seed, changes)


PRESETS = {"tiny": create_iris_tiny, "small": create_iris_small, "base": create_iris_base}


def preset_config(size: str, changes: dict[str, Any]) -> tuple[GeneratorConfig, dict[str, Any]]:
    """What ``create_iris_tiny`` and the others make a model of, without making it.

    Args:
        size: a key of ``PRESETS``.
        changes: as theirs.

    Returns:
        the generator's configuration, and the other arguments of ``IrisModel``, by name.

    Raises:
        SettingError: an unknown size or name, or a value that cannot be used.
    """
    require_choice("preset", size, tuple(MODEL_OPTIONS))
    allowed = [field.name for field in fields(GeneratorConfig)]
    for name in changes:
        require_choice("the name of a change", name, (*allowed, *SURROUNDINGS))
    for name, kind in (("depth", Depth), ("mixers", MixerOptions)):
        if name in changes and not isinstance(changes[name], kind):
            raise SettingError(f"{name}={changes[name]!r} must be a {kind.__module__}.{kind.__name__}")
    config = FAMILY | MODEL_OPTIONS[size] | {name: value for name, value in changes.items() if name in allowed}
    surroundings = SURROUNDINGS | {name: value for name, value in changes.items() if name in SURROUNDINGS}
    return GeneratorConfig(**config), surroundings


def _create(size: str, seed: int, changes: dict[str, Any]) -> IrisModel:
    config, surroundings = preset_config(size, changes)
    return initialise(IrisModel(config, **surroundings), seed)
