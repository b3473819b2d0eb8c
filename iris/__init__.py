"""IRIS: Iterative Recurrent Image Synthesis.

    from iris import IrisPipeline, create_iris_small      # whole models
    from iris import Generator, WaveletVAE, integrate     # the parts that they are made of

What is named here is imported when it is first asked for, so that ``import iris`` costs nothing.
"""

# ruff: noqa: F401 (the imports below are never run)

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers, which do not run __getattr__
    from iris.diffusion.flow import SAMPLERS, TimeSampling, integrate, interpolate, time_grid, velocity_loss
    from iris.diffusion.guidance import Guidance
    from iris.diffusion.sampling import GuidedVelocity, SamplingSettings
    from iris.latents import LATENTS, WaveletVAE, build_latent
    from iris.latents.haar import dwt, idwt
    from iris.model import IrisModel
    from iris.nn.condition import TextCondition
    from iris.nn.depth import Depth
    from iris.nn.generator import Generator, GeneratorConfig
    from iris.nn.mixers import GRFM, MIXERS, MixerOptions, build_mixer
    from iris.nn.scan import linear_scan
    from iris.pipeline import IrisPipeline
    from iris.presets import create_iris_base, create_iris_small, create_iris_tiny
    from iris.randomness import initialise

_MODULES = {
    "iris.diffusion.flow": ("SAMPLERS", "TimeSampling", "integrate", "interpolate", "time_grid", "velocity_loss"),
    "iris.diffusion.guidance": ("Guidance",),
    "iris.diffusion.sampling": ("GuidedVelocity", "SamplingSettings"),
    "iris.latents": ("LATENTS", "WaveletVAE", "build_latent"),
    "iris.latents.haar": ("dwt", "idwt"),
    "iris.model": ("IrisModel",),
    "iris.nn.condition": ("TextCondition",),
    "iris.nn.depth": ("Depth",),
    "iris.nn.generator": ("Generator", "GeneratorConfig"),
    "iris.nn.mixers": ("GRFM", "MIXERS", "MixerOptions", "build_mixer"),
    "iris.nn.scan": ("linear_scan",),
    "iris.pipeline": ("IrisPipeline",),
    "iris.presets": ("create_iris_base", "create_iris_small", "create_iris_tiny"),
    "iris.randomness": ("initialise",),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'iris' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
