"""Images -> judge features that know where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.judges import Judge
from eval.metrics.fid import FeatureStatistics, check_features
from eval.metrics.images import check_images, to_float


@dataclass(frozen=True)
class Features:
    """Judge features of a set of images.

    Attributes:
        values: float32 [N, D].
        statistics: their count, mean and covariance; ``statistics.metadata`` names at least the judge ("judge",
            "judge_sha256", "resize") and "image_size", and of generated images "metric_name", what their distance to
            a reference is called.
    """

    values: Tensor
    statistics: FeatureStatistics

    @classmethod
    def of(cls, values: Tensor | np.ndarray, metadata: dict[str, Any]) -> Features:
        """Features [N, D] and what they were made with.

        Raises:
            ValueError: not [N, D] with N >= 2, or a value that is not finite.
        """
        checked = check_features(values)
        return cls(torch.as_tensor(values).detach().cpu().float(), FeatureStatistics.of(checked, metadata))

    @property
    def metadata(self) -> dict[str, Any]:
        """What the features were made with."""
        return self.statistics.metadata

    def __len__(self) -> int:
        return len(self.values)


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


def extract_features(
    judge: Judge, images: Tensor | np.ndarray | Sequence[Any], batch: int = 256, name: str = "images", **facts: Any
) -> Features:
    """Features of images, checked first.

    Args:
        judge: whose image tower is used.
        images: as ``check_images`` takes them, N >= 2.
        batch: images converted at once.
        name: what an error calls the images.
        facts: more to keep in the metadata, such as seed or data.

    Raises:
        ValueError: as ``check_images``; a feature that is not finite.
    """
    checked = check_images(images, name=name)
    values = torch.cat([judge.image_features(to_float(part)).cpu() for part in checked.split(batch)])
    height, width = checked.shape[1:3] if checked.dtype == torch.uint8 else checked.shape[2:]
    made_with = {**judge_facts(judge, (height, width)), "metric_name": judge.metric_name}
    return Features.of(values, {**made_with, **facts})
