"""What is measured, behind one interface: a saved or an exported model of IRIS, a diffusers pipeline, or images that are
there.

Adding a kind of subject is one file with a subclass of ``Subject`` and one line in ``KINDS`` (and, if a folder can be
told to be one, one in ``kind_of``).
"""

from __future__ import annotations

import importlib
from pathlib import Path

from eval.export import PIPELINE
from eval.subjects.base import Subject
from eval.subjects.images import SUFFIXES, holds_images
from iris.diffusion.sampling import Sample
from iris.errors import SettingError, require_choice
from iris.io.hub import is_hub_name

__all__ = ["KINDS", "Sample", "Subject", "kind_of", "open_subject"]

# Name -> "module:class"; imported when asked for, as each brings libraries that take seconds.
KINDS: dict[str, str] = {
    "iris": "eval.subjects.iris_model:IrisModel",
    "exported": "eval.subjects.exported:ExportedModel",
    "diffusers": "eval.subjects.diffusers_model:DiffusersModel",
    "images": "eval.subjects.images:StoredImages",
}


def open_subject(model: str, kind: str | None, sample: Sample, dtype: str, device: str) -> Subject:
    """The subject that ``model`` names, its files looked at and no weights read.

    Args:
        model: a folder, an array file (.npy, .npz), or a name on the Hugging Face hub.
        kind: one of ``KINDS``; None: seen from the files.
        sample: how images are made.
        dtype: float32, float16 or bfloat16, of the weights.
        device: as torch names it.

    Raises:
        SettingError: nothing there, nothing that can be measured, or a setting that this kind of subject has not.
    """
    if kind is not None:
        require_choice("kind", kind, tuple(KINDS))
    chosen = kind or kind_of(model)
    module, _, name = KINDS[chosen].partition(":")
    return getattr(importlib.import_module(module), name)(model, sample, dtype, device)


def kind_of(model: str) -> str:
    """Which kind of subject lies at a path.

    Raises:
        SettingError: nothing does, or nothing that is known.
    """
    place = Path(model).expanduser()
    if place.suffix in SUFFIXES and place.is_file():
        return "images"
    if not place.exists() and is_hub_name(model) and "/" in model:
        raise SettingError(
            f"model={model}: no such folder; if it is a name on the Hugging Face hub, say which kind of "
            "model: kind=iris or kind=diffusers"
        )
    if not place.is_dir():
        raise SettingError(f"model={model}: no such folder or array file ({', '.join(SUFFIXES)})")
    if (place / "model_index.json").is_file():
        return "diffusers"
    if (place / PIPELINE).is_file():
        return "exported"
    if (place / "config.json").is_file():
        return "iris"
    if holds_images(place):
        return "images"
    raise SettingError(
        f"model={model}: expected a saved model (config.json), an exported one ({PIPELINE}), a diffusers pipeline "
        "(model_index.json) or a folder of images"
    )
