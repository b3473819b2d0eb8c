"""Judges: the networks that FID features, CLIP scores and attribute accuracies come from.

Adding a judge is one file with a subclass of ``Judge`` and one line in ``JUDGES``. A judge is asked for by name and is
that judge or an error: no other network ever stands in for it.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.judges.weights import MissingWeights
from iris.errors import SettingError

__all__ = ["JUDGES", "Description", "Judge", "MissingWeights", "describe", "load_judge"]

# Name -> "module:class"; imported when asked for, so that one judge's libraries do not slow down another's start.
JUDGES: dict[str, str] = {
    "shapes": "eval.judges.shapes:ShapesJudge",
    "inception": "eval.judges.inception:InceptionJudge",
    "clip_vit_b32": "eval.judges.clip:ClipVitB32Judge",
    "clip": "eval.judges.clip:ClipJudge",
    "dinov2": "eval.judges.dinov2:DINOv2Judge",
}


@dataclass(frozen=True)
class Description:
    """What is known of a judge before its network is loaded.

    Attributes:
        sha256: of the weights file; of a folder, of its configuration and weights.
        metric_name: what a Fréchet distance between its features is called.
        resize: how images are brought to its size; figures of two ways are not compared.
        feature_width: D of its image features.
        worlds: drawn worlds whose attributes it can read off a picture; may be empty.
        verified: whether the weights are the published ones.
        record: how the judge was made and how good it is.
    """

    sha256: str
    metric_name: str
    resize: str
    feature_width: int
    worlds: tuple[str, ...] = ()
    verified: bool = True
    record: dict[str, Any] = field(default_factory=dict)


class Judge(ABC):
    """A frozen network with an image tower and perhaps a text tower.

    Attributes:
        name: as in ``JUDGES``; every figure carries it.
        options: what may be set of it, of ``weights``, ``model`` and ``prefix``.
        has_text: whether it reads captions.
        device: where its network is; features stay there.

    The other attributes are those of ``Description``.
    """

    name: str
    options: tuple[str, ...] = ()
    has_text: bool = False

    def __init__(self, description: Description, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self.sha256, self.verified, self.record = description.sha256, description.verified, description.record
        self.metric_name, self.resize = description.metric_name, description.resize
        self.feature_width, self.worlds = description.feature_width, description.worlds

    @classmethod
    @abstractmethod
    def description(cls, **options: str) -> Description:
        """What is known without loading the network. Takes and raises what the constructor does."""

    @abstractmethod
    def image_features(self, images: Tensor) -> Tensor:
        """Float images [B, 3, H, W] in [-1, 1], any H and W -> float32 [B, D], not normalised.

        Raises:
            ValueError: see ``eval.judges.images.check_batch``.
        """

    def text_features(self, captions: list[str]) -> Tensor:
        """Captions [B] -> float32 [B, D], not normalised.

        Raises:
            SettingError: this judge has no text tower, or cannot read a caption.
        """
        able = ", ".join(name for name in JUDGES if _class_of(name).has_text)
        raise SettingError(f"judge {self.name} reads no captions, so it gives no CLIP score; judges that do: {able}")

    def similarity(self, images: Tensor, captions: list[str]) -> Tensor:
        """Cosine of each image [B, 3, H, W] with its own caption: float32 [B] in [-1, 1].

        Raises:
            ValueError: as many captions as images are needed.
            SettingError: as ``text_features``.
        """
        if len(images) != len(captions):
            raise ValueError(f"similarity needs one caption an image: {len(images)} images, {len(captions)} captions")
        text = self.text_features(captions)
        return F.cosine_similarity(self.image_features(images), text, dim=-1)

    def attributes(self, world: str, images: Tensor) -> dict[str, Tensor]:
        """Predicted class of each attribute of a drawn world: {name: int64 [B]}.

        Raises:
            SettingError: this judge cannot read that world's attributes.
        """
        known = ", ".join(self.worlds) or "no world"
        raise SettingError(f"judge {self.name} reads attributes of {known}, not of data '{world}'")


def load_judge(
    name: str,
    device: str | torch.device = "cpu",
    *,
    weights: str | None = None,
    model: str | None = None,
    prefix: str | None = None,
) -> Judge:
    """The judge called ``name``, in evaluation mode on ``device``.

    Args:
        weights: a weights file or folder, or for ``clip`` a tag of open_clip; None: the published file, from a cache.
        model: which of the judge's networks: an open_clip model for ``clip``, a size for ``dinov2``.
        prefix: put before every caption, such as "A photo depicts " (Hessel et al. 2021).

    Raises:
        SettingError: no judge has that name, or it takes no such setting or value.
        MissingWeights: its weights are not on this machine.
        ValueError: its weights are not what they should be.
    """
    return _class_of(name)(device=device, **_options(name, weights=weights, model=model, prefix=prefix))


def describe(
    name: str, weights: str | None = None, model: str | None = None, prefix: str | None = None
) -> dict[str, Any]:
    """What a record says of a judge, without loading its network: its ``Description`` and its ``record`` in one.

    Raises:
        SettingError, MissingWeights, ValueError: as ``load_judge``.
    """
    kind = _class_of(name)
    found = kind.description(**_options(name, weights=weights, model=model, prefix=prefix))
    return {
        **found.record,
        "name": name,
        "sha256": found.sha256,
        "worlds": list(found.worlds),
        "has_text": kind.has_text,
        "metric_name": found.metric_name,
        "resize": found.resize,
        "feature_width": found.feature_width,
        "verified": found.verified,
    }


def _class_of(name: str) -> type[Judge]:
    if name not in JUDGES:
        raise SettingError(f"judge must be one of {', '.join(JUDGES)}, not '{name}'")
    module, kind = JUDGES[name].split(":")
    return getattr(importlib.import_module(module), kind)


def _options(name: str, **chosen: str | None) -> Mapping[str, str]:
    """The options that are set, all of which the judge must know."""
    known = _class_of(name).options
    options = {key: value for key, value in chosen.items() if value is not None}
    for key in options:
        if key not in known:
            allowed = ", ".join(f"judge.{option}" for option in known) or "none"
            raise SettingError(f"judge {name} takes no judge.{key}; its settings: {allowed}")
    return options


def judge_facts(judge: Judge, image_size: int | Sequence[int]) -> dict[str, Any]:
    """What must agree between features that are compared: the judge, its weights, its resizing and the images' size.

    Args:
        judge: that made, or will make, the features.
        image_size: side of the images in pixels, or (height, width).
    """
    size = image_size if isinstance(image_size, int) else [int(side) for side in image_size]
    if isinstance(size, list) and len(set(size)) == 1:
        size = size[0]
    return {"judge": judge.name, "judge_sha256": judge.sha256, "resize": judge.resize, "image_size": size}
