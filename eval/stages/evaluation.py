"""An evaluation: what makes images, the data and the judge, and the stages that its measures share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from eval.metrics.features import judge_facts
from eval.settings import Measure
from eval.stages.data import RealData, Rows
from eval.stages.features import ImageFeatures, Reference
from eval.stages.images import HELDOUT, MAIN, TRAINED, CaptionSet, Images, Stored
from eval.stages.judging import Judging
from eval.stages.makers import Maker
from iris.stages.engine import Context

CHUNK = 256


@dataclass(frozen=True)
class Evaluation:
    """What measures are taken on.

    Attributes:
        stored: images that were there; None: ``maker`` makes them.
        count: images of the main set.
        seed: of the images' noise, and of random choices in a method.
    """

    context: Context
    measure: Measure
    maker: Maker
    data: RealData
    judging: Judging
    count: int
    seed: int
    stored: Stored | None = None

    @cached_property
    def main(self) -> Images | Stored:
        """Images of the data's captions, or those that are stored."""
        return self.stored or self.images(CaptionSet(MAIN, self.data, self.data.split, self.count))

    @cached_property
    def heldout(self) -> Images | None:
        """Images of combinations that training never showed, where the data has some and they are wanted."""
        if self.stored is not None or not self.measure.heldout or self.data.world is None:
            return None
        return self.images(CaptionSet(HELDOUT, self.data, "heldout", self.measure.heldout))

    @cached_property
    def searched(self) -> tuple[str, Images | Stored]:
        """The set in which copies are looked for: a model copies, if it does, on captions it was trained on."""
        if self.data.world is None or self.stored is not None:
            return MAIN, self.main
        chosen = self.measure.duplicates.samples
        return TRAINED, self.images(CaptionSet(TRAINED, self.data, "train", chosen, self.data.seed + 1))

    def images(self, captions: CaptionSet) -> Images:
        """A set of images."""
        return Images(self.context, self.maker, captions, self.seed)

    def features(self, images: Images | Stored) -> ImageFeatures:
        """Judge features of a set of images."""
        return ImageFeatures(self.context, self.judging, images, self.maker.size)

    def reference(self, split: str, count: int | None) -> Reference:
        """Judge features of real images; None: as many as the data's default."""
        wanted = self.data.default_count(split) if count is None else count
        return Reference(self.context, self.judging, self.data, split, wanted)

    def report(self, work: str) -> Any:
        """Tells the progress of a work."""
        return lambda done, total=None: self.context.progress.done(f"judge {self.judging.name}: {work}", done, total)

    def judged(self, **facts: Any) -> dict[str, Any]:
        """What numbers of the judge were made with."""
        return {**judge_facts(self.judging.judge, self.maker.size), "threads": torch.get_num_threads(), **facts}


def in_parts(images: np.ndarray, captions: list[str]) -> Iterator[Rows]:
    """Images and captions, some at a time."""
    for i in range(0, len(images), CHUNK):
        yield Rows(np.ascontiguousarray(images[i : i + CHUNK]), captions[i : i + CHUNK])
