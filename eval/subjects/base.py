"""The one interface through which the command sees what it measures."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from eval.speed.workers import Loader
from iris.io.hashing import files_sha256

MODEL_FILES = (".json", ".safetensors", ".txt", ".model")  # weights, configurations, tokenizers


LARGEST, PIXELS = 256, 1 << 18  # images at once, where sample.batch does not say: at most, and as many as hold so much


class Subject(ABC):
    """A model, text in and images out, or the images that one made.

    Attributes:
        kind: as in ``KINDS``.
        model: the path or name it was opened by.
        root: the folder, or the file, that it lies in.
        name: a short one, for folders and headings.
        size: (height, width) of its images in pixels.
        sampling: how they are made, every value resolved; empty for stored images.
        dtype, device: of the computation; None for stored images.
        captions: of stored images, one each; None: there are none, or any caption can be asked for.
        count: of stored images; None: as many as one likes.
        batch: images made at once.
        loads_parts: whether the loader can load a part alone (``eval.speed.workers.Loader``).
        notes: what a reader of the numbers should know.
    """

    kind: str
    model: str
    root: Path
    name: str
    size: tuple[int, int]
    sampling: dict[str, Any]
    dtype: str | None = None
    device: str | None = None
    captions: list[str] | None = None
    count: int | None = None
    batch: int = 256
    loads_parts: bool = False
    notes: tuple[str, ...] = ()

    def take(self, batch: int | None) -> None:
        """Set ``batch``, or what a processor's memory takes of images of this size."""
        height, width = self.size
        self.batch = batch or max(1, min(LARGEST, PIXELS // (height * width)))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what determines the images, the way they are made apart: files, and what lies elsewhere."""
        own, elsewhere = files_sha256(self.files(), self.root), self.elsewhere()
        return hashlib.sha256("\x1f".join([own, *elsewhere]).encode()).hexdigest() if elsewhere else own

    def elsewhere(self) -> list[str]:
        """Digests of what determines the images and is named, not held, by the files; where it lies is no part of them."""
        return []

    @abstractmethod
    def files(self) -> list[Path]:
        """The files that determine the images."""

    @abstractmethod
    def generate(self, captions: Sequence[str | None], seed: int, first: int) -> Tensor:
        """Images uint8 [N, H, W, 3] of N captions; image i starts from noise addressed by (seed, first + i) alone.

        Stored images are those numbered from ``first`` on, whatever the seed.

        Raises:
            ValueError: an image that cannot be measured.
        """

    def check(self, captions: Sequence[str]) -> None:  # noqa: B027 (most subjects read any)
        """Raise a SettingError if a caption cannot be read, before an image is made of any."""

    def example(self) -> str:
        """A caption that can be read."""
        return "a picture"

    def facts(self) -> dict[str, Any]:
        """What is known of the model once images were made: "parameters" by part, "nfe" for one image."""
        return {}

    def loader(self, caption: str, parts: bool = False) -> Loader | None:
        """How a measuring process gets the model, to make images of ``caption``; None: there is none to run.

        ``parts``: its parts are to be named, which may take a run while it is loaded.
        """
        return None
