"""Images -> judge features that know where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.metrics.fid import FeatureStatistics, check_features


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
