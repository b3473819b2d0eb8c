"""Judges: the networks that FID features, CLIP scores and attribute accuracies come from.

Adding a judge is one file with a subclass of ``Judge`` and one line in ``JUDGES``. A judge is asked for by name and is
that judge or an error: no other network ever stands in for it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from iris.errors import SettingError

# Name -> "module:class"; imported when asked for, so that one judge's libraries do not slow down another's start.
JUDGES: dict[str, str] = {
    "shapes": "eval.judges.shapes:ShapesJudge",
}


class Judge(ABC):
    """A frozen network with an image tower and a text tower.

    Attributes:
        name: as in ``JUDGES``; every figure carries it.
        sha256: of the weights file.
        record: how the judge was made and how good it is.
        worlds: drawn worlds whose attributes it can read off a picture; may be empty.
    """

    name: str
    sha256: str
    record: dict[str, Any]
    worlds: tuple[str, ...] = ()

    @abstractmethod
    def image_features(self, images: Tensor) -> Tensor:
        """Float images [B, 3, H, W] in [-1, 1], any H and W -> float32 [B, D], not normalised."""

    @abstractmethod
    def text_features(self, captions: list[str]) -> Tensor:
        """Captions [B] -> float32 [B, D], not normalised."""

    def similarity(self, images: Tensor, captions: list[str]) -> Tensor:
        """Cosine of each image [B, 3, H, W] with its own caption: float32 [B] in [-1, 1].

        Raises:
            ValueError: as many captions as images are needed.
        """
        if len(images) != len(captions):
            raise ValueError(f"similarity needs one caption an image: {len(images)} images, {len(captions)} captions")
        return F.cosine_similarity(self.image_features(images), self.text_features(captions), dim=-1)

    def attributes(self, world: str, images: Tensor) -> dict[str, Tensor]:
        """Predicted class of each attribute of a drawn world: {name: int64 [B]}.

        Raises:
            SettingError: this judge cannot read that world's attributes.
        """
        known = ", ".join(self.worlds) or "no world"
        raise SettingError(f"judge {self.name} reads attributes of {known}, not of data '{world}'")


def load_judge(name: str, device: str | torch.device = "cpu") -> Judge:
    """The judge called ``name``, in evaluation mode on ``device``.

    Raises:
        SettingError: no judge has that name.
        ValueError: its weights do not have the recorded sha256.
        FileNotFoundError: its weights are missing.
    """
    if name not in JUDGES:
        raise SettingError(f"judge must be one of {', '.join(JUDGES)}, not '{name}'")
    module, kind = JUDGES[name].split(":")
    return getattr(importlib.import_module(module), kind)(device=device)


def describe(name: str) -> dict[str, Any]:
    """A judge's name, the sha256 of its weights file, its worlds and its record, without loading the network.

    Raises:
        SettingError: no judge has that name.
        FileNotFoundError: its files are missing.
    """
    if name not in JUDGES:
        raise SettingError(f"judge must be one of {', '.join(JUDGES)}, not '{name}'")
    weights = Path(__file__).with_name(f"{name}.safetensors")
    stored = json.loads(weights.with_suffix(".json").read_text())
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    return {**stored["record"], "name": name, "sha256": sha256, "worlds": list(stored["attributes"])}
