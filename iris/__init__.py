"""IRIS: Iterative Recurrent Image Synthesis.

    from iris import IrisPipeline, create_iris_small

What is named here is imported when it is first asked for, so that ``import iris`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.models.ledger import memory_ledger
    from iris.diffusion.sampling import SamplingSettings
    from iris.model import IrisModel
    from iris.pipeline import IrisPipeline
    from iris.presets import create_iris_base, create_iris_small, create_iris_tiny

_PLACES = {
    "IrisModel": "iris.model",
    "IrisPipeline": "iris.pipeline",
    "SamplingSettings": "iris.diffusion.sampling",
    "create_iris_base": "iris.presets",
    "create_iris_small": "iris.presets",
    "create_iris_tiny": "iris.presets",
    "memory_ledger": "eval.models.ledger",
}

__all__ = [
    "IrisModel",
    "IrisPipeline",
    "SamplingSettings",
    "create_iris_base",
    "create_iris_small",
    "create_iris_tiny",
    "memory_ledger",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'iris' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
