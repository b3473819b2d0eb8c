"""Stages features and reference: what a judge sees in images that were made, and in real ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.judges import Judge, judge_facts
from eval.judges.images import check_images, to_float
from eval.metrics.features import Features
from eval.metrics.fid import FeatureStatistics
from eval.stages.data import CHUNK, RealData
from eval.stages.images import Images, Stored
from eval.stages.judging import Judging
from iris.errors import SettingError
from iris.io.hashing import file_sha256
from iris.stages.engine import Context, Stage

FEATURES, STATISTICS = "features.npy", "statistics.npz"


class Judged(Stage):
    """Judge features float32 [N, D] with their statistics; read again, they are those that were written."""

    def __init__(self, context: Context, judging: Judging, needs: dict[str, Any]) -> None:
        super().__init__(context, needs)
        self.judging = judging

    def facts(self) -> dict[str, Any]:
        return {"judge": self.judging.facts()}

    def keep(self, values: Tensor, made_with: dict[str, Any]) -> dict[str, Any]:
        """Write features and statistics; what the result says of them."""
        features = Features.of(values, made_with)
        np.save(self.folder / FEATURES, features.values.numpy(), allow_pickle=False)
        features.statistics.save(self.folder / STATISTICS)
        return {
            "count": len(values),
            "sha256": {name: file_sha256(self.folder / name) for name in (FEATURES, STATISTICS)},
        }

    def features(self) -> Features:
        """As they are on disk.

        Raises:
            SettingError: they are not those that were written.
        """
        for name, sha256 in self.result["sha256"].items():
            self._check(name, sha256)
        values = torch.from_numpy(np.load(self.folder / FEATURES, allow_pickle=False))
        return Features(values, FeatureStatistics.load(self.folder / STATISTICS))

    def _check(self, name: str, sha256: str) -> None:
        there = (self.folder / name).is_file()
        if there and file_sha256(self.folder / name) == sha256:
            return
        problem = "has changed since it was written (another sha256)" if there else "is missing"
        raise SettingError(f"features {self.folder}: {name} {problem}; delete the folder to compute them anew")

    def _report(self, done: int, total: int | None) -> None:
        self.context.progress.done(self.label, done, total)


class ImageFeatures(Judged):
    """Of images that a model made, or that were there."""

    kind = "features"

    def __init__(self, context: Context, judging: Judging, images: Images | Stored, size: tuple[int, int]) -> None:
        super().__init__(context, judging, {"images": images})
        self.images, self.size = images, size

    @property
    def label(self) -> str:
        return f"judge {self.judging.name}: {self.images.label}"

    def work(self) -> dict[str, Any]:
        judge, images = self.judging.judge, self.images.images()
        parts = (images[i : i + CHUNK] for i in range(0, len(images), CHUNK))
        values = features_of(judge, parts, self._report, len(images))
        return self.keep(values, {**judge_facts(judge, self.size), "metric_name": judge.metric_name})


class Reference(Judged):
    """Of the real images of a split.

    Args:
        count: the first so many; None: all there are.
    """

    kind = "reference"

    def __init__(self, context: Context, judging: Judging, data: RealData, split: str, count: int | None) -> None:
        super().__init__(context, judging, {})
        self.data, self.split, self.count = data, split, count

    @property
    def label(self) -> str:
        return f"judge {self.judging.name}: real images of {self.split}"

    def facts(self) -> dict[str, Any]:
        known = {"data": self.data.fingerprint(self.split), "split": self.split, "size": self.data.size}
        return super().facts() | known | {"count": self.count or "all"}

    def work(self) -> dict[str, Any]:
        judge, images = self.judging.judge, (part.images for part in self.data.rows(self.split, self.count))
        values = features_of(judge, images, self._report, self.count)
        if self.count is not None and len(values) < self.count:
            raise SettingError(
                f"measure.reference={self.count}: split {self.split} of data {self.data.name} has only {len(values)} "
                "usable rows"
            )
        made = {"data": self.data.fingerprint(self.split), "split": self.split, "count": len(values)}
        return self.keep(values, judge_facts(judge, self.data.size) | made)


def features_of(
    judge: Judge, parts: Iterable[np.ndarray | Tensor], report: Any = None, total: int | None = None
) -> Tensor:
    """Judge features float32 [N, D] of images uint8 [n, H, W, 3], some at a time."""
    found, done = [], 0
    for part in parts:
        found.append(judge.image_features(to_float(torch.as_tensor(np.ascontiguousarray(part)))).cpu())
        done += len(part)
        if report is not None:
            report(done, total)
    return torch.cat(found) if found else torch.empty(0, judge.feature_width)


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
