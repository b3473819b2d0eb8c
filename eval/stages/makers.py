"""What makes images: a model that is there, or one that a stage makes when it is its turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from eval.subjects import Sample, Subject, open_subject
from iris.stages.engine import Work


class Maker(Protocol):
    """A model as stages know it before it is opened.

    Attributes:
        key: what it is known by.
        needs: the stage that makes it, if one does.
        sampling: how it makes images, every value resolved; empty for stored images.
        dtype: of the computation, as torch names it.
        size: (height, width) of its images in pixels.
    """

    key: str
    needs: Mapping[str, Work]
    sampling: dict[str, Any]
    dtype: str | None
    size: tuple[int, int]

    def open(self) -> Subject:
        """The model, ready to make images."""


@dataclass(frozen=True)
class Opened:
    """A model that a person named."""

    subject: Subject
    needs: Mapping[str, Work] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Of its files, or of the stage that made them."""
        return self.subject.fingerprint

    @property
    def sampling(self) -> dict[str, Any]:
        return self.subject.sampling

    @property
    def dtype(self) -> str | None:
        return self.subject.dtype

    @property
    def size(self) -> tuple[int, int]:
        return self.subject.size

    def open(self) -> Subject:
        return self.subject


@dataclass(frozen=True)
class Made:
    """A model that a stage makes.

    Attributes:
        work: leaves its weights in a folder; below it in ``sub``.
        kind: of ``eval.subjects.KINDS``.
    """

    work: Work
    kind: str
    sampling: dict[str, Any]
    dtype: str
    size: tuple[int, int]
    device: str = "cpu"
    batch: int | None = None
    sub: str = ""

    @property
    def key(self) -> str:
        """Of the stage."""
        return f"{self.work.key}/{self.sub}" if self.sub else self.work.key

    @property
    def needs(self) -> Mapping[str, Work]:
        return {"model": self.work}

    @property
    def folder(self) -> Path:
        """Where it lies once it is made."""
        return self.work.make() / self.sub

    def open(self) -> Subject:
        sample = Sample(**self.sampling, batch=self.batch)
        return open_subject(str(self.folder), self.kind, sample, self.dtype, self.device)
