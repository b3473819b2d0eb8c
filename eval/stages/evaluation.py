"""An evaluation: what makes images, the data and the judge, and the stages that its measures share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from eval.judges import judge_facts
from eval.results import hardware
from eval.settings import Measure
from eval.stages.data import RealData
from eval.stages.features import ImageFeatures, Reference
from eval.stages.images import HELDOUT, MAIN, TRAINED, CaptionSet, Images, Stored
from eval.stages.judging import Judging
from eval.stages.makers import Maker
from iris.stages.engine import Context

SAMPLES = 2048  # images of a model, where measure.samples does not say
MACHINE = ("processor", "gpu", "torch")  # what a number says of the hardware


@dataclass(frozen=True)
class Evaluation:
    """What measures are taken on.

    Attributes:
        made: what makes the images, or images that were there.
        seed: of the images' noise, and of random choices in a method.
    """

    context: Context
    measure: Measure
    made: Maker | Stored
    data: RealData
    judging: Judging
    seed: int

    @property
    def maker(self) -> Maker | None:
        """What makes the images; None: they were there."""
        return self.made if isinstance(self.made, Maker) else None

    @property
    def count(self) -> int:
        """Images of the main set, or more than there are captions."""
        return self.made.count if isinstance(self.made, Stored) else self.measure.samples or SAMPLES

    @cached_property
    def main(self) -> Images | Stored:
        """Images of the data's captions, or those that are stored."""
        if isinstance(self.made, Stored):
            return self.made
        return self.images(CaptionSet(MAIN, self.data, self.data.split, self.count))

    @cached_property
    def heldout(self) -> Images | None:
        """Images of combinations that training never showed, where the data has some and they are wanted."""
        if self.maker is None or not self.measure.heldout or self.data.world is None:
            return None
        return self.images(CaptionSet(HELDOUT, self.data, "heldout", self.measure.heldout))

    @property
    def named(self) -> dict[str, Images | Stored]:
        """The sets whose captions name attributes."""
        return {name: one for name, one in ((MAIN, self.main), (HELDOUT, self.heldout)) if one is not None}

    @cached_property
    def searched(self) -> tuple[str, Images | Stored]:
        """The set in which copies are looked for: a model copies, if it does, on captions it was trained on."""
        if self.data.world is None or self.maker is None:
            return MAIN, self.main
        chosen = self.measure.duplicates.samples
        return TRAINED, self.images(CaptionSet(TRAINED, self.data, "train", chosen, self.data.seed + 1))

    def images(self, captions: CaptionSet) -> Images:
        """A set of images."""
        return Images(self.context, self.made, captions, self.seed)

    def features(self, images: Images | Stored) -> ImageFeatures:
        """Judge features of a set of images."""
        return ImageFeatures(self.context, self.judging, images, self.made.size)

    def reference(self, split: str, count: int | None) -> Reference:
        """Judge features of real images; None: as many as the data's default."""
        wanted = self.data.default_count(split) if count is None else count
        return Reference(self.context, self.judging, self.data, split, wanted)

    def report(self, work: str) -> Any:
        """Tells the progress of a work."""
        return lambda done, total=None: self.context.progress.done(f"judge {self.judging.name}: {work}", done, total)

    def made_with(self) -> dict[str, Any]:
        """How the images were made, and on what."""
        machine = hardware()
        known = {"threads": torch.get_num_threads(), "hardware": {k: machine[k] for k in MACHINE if k in machine}}
        if self.maker is None:
            return known
        made = {name: getattr(self.maker, name) for name in ("sampling", "dtype", "device")}
        return known | {"images_seed": self.seed} | made

    def judged(self, **facts: Any) -> dict[str, Any]:
        """What numbers of the judge were made with."""
        return judge_facts(self.judging.judge, self.made.size) | self.made_with() | facts
