"""What makes images: a model that is there, or one that a stage makes when it is its turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eval.subjects import Sample, Subject, open_subject
from iris.stages.engine import Finished, Work


@dataclass(frozen=True)
class Maker:
    """A model as stages know it before it is opened.

    Attributes:
        work: leaves the model in a folder.
        kind: of ``eval.subjects.KINDS``.
        sampling: how it makes images, every value resolved.
        dtype: of the computation, as torch names it.
        size: (height, width) of its images in pixels.
        batch: images made at once; None: what fits.
        opened: the model, where a person named it.
    """

    work: Work
    kind: str
    sampling: dict[str, Any]
    dtype: str
    size: tuple[int, int]
    device: str = "cpu"
    batch: int | None = None
    opened: Subject | None = None

    @classmethod
    def of(cls, subject: Subject) -> Maker:
        """A model that a person named; its files are known by their content, or by the stage that made them."""
        work = Finished(subject.fingerprint, subject.root)
        return cls(work, subject.kind, subject.sampling, subject.dtype, subject.size, subject.device, opened=subject)

    def open(self) -> Subject:
        """The model, which is there, ready to make images."""
        if self.opened is not None:
            return self.opened
        sample = Sample(**self.sampling, batch=self.batch)
        return open_subject(str(self.work.place), self.kind, sample, self.dtype, self.device)
