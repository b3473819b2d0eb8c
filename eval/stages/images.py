"""Stage images: what a model makes of captions, kept on disk; a stopped one goes on."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eval.stages.data import DrawnWorld, RealData
from eval.stages.makers import Maker
from eval.subjects import Subject
from iris.errors import SettingError
from iris.io.files import write_json
from iris.io.hashing import digest
from iris.stages.engine import Context, Stage

IMAGES, CAPTIONS, PARTS, JOINED = "images.npy", "captions.json", "parts", "joined"
MAIN, HELDOUT, TRAINED = "main", "heldout", "trained"  # sets of images: what their captions are
WORDS = {MAIN: "images", HELDOUT: "images of held-out combinations", TRAINED: "images of training captions"}


@dataclass(frozen=True)
class CaptionSet:
    """Captions of a data set: the first ``count`` of a split, or all that it has, known before they are read.

    ``seed``: of a drawn world's captions, where they are other ones than its pictures have.
    """

    name: str
    data: RealData
    split: str
    count: int
    seed: int | None = None

    def facts(self) -> dict[str, Any]:
        """What determines them."""
        other = {} if self.seed is None else {"seed": self.seed}
        return {"data": self.data.fingerprint(self.split), "split": self.split, "count": self.count} | other

    def read(self) -> list[str]:
        """At most ``count``."""
        if self.seed is not None and isinstance(self.data, DrawnWorld):
            return self.data.captions(self.split, self.count, self.seed)
        return self.data.captions(self.split, self.count)


class Images(Stage):
    """Images uint8 [N, H, W, 3] that a model makes of captions; image i starts from the noise of (seed, i)."""

    kind = "images"

    def __init__(self, context: Context, maker: Maker, captions: CaptionSet, seed: int) -> None:
        super().__init__(context, {"model": maker.work})
        self.maker, self.set, self.seed = maker, captions, seed

    @property
    def label(self) -> str:
        return WORDS[self.set.name]

    def facts(self) -> dict[str, Any]:
        made = {"sampling": self.maker.sampling, "dtype": self.maker.dtype}
        return made | {"captions": self.set.facts(), "seed": self.seed}

    @property
    def begun(self) -> bool:
        return (self.folder / PARTS).exists()

    @cached_property
    def captions(self) -> list[str]:
        """[N]."""
        return self.set.read()

    def work(self) -> dict[str, Any]:
        subject, captions = self.maker.open(), self.captions
        subject.check(captions)
        if self.begun or not (self.folder / IMAGES).exists():  # else killed when only the result was left to write
            try:
                _make(subject, captions, self.seed, self.folder, self._report)
            except ValueError as error:  # what cannot be measured, such as pixels that are not finite
                raise SettingError(str(error)) from error
        shutil.rmtree(self.folder / JOINED, ignore_errors=True)
        write_json(self.folder / CAPTIONS, captions)
        return {"sha256": hashlib.sha256(self.images()).hexdigest(), "model": subject.facts()}

    def images(self) -> np.ndarray:
        """Read from disk as needed."""
        return np.load(self.folder / IMAGES, mmap_mode="c")  # copy on write: torch takes no read-only arrays

    def _report(self, done: int, total: int) -> None:
        self.context.progress.done(self.label, done, total)


def _make(subject: Subject, captions: Sequence[str], seed: int, folder: Path, report: Any) -> None:
    """Make them part by part, and all in one array; parts that are there are not made again."""
    parts, total = folder / PARTS, len(captions)
    parts.mkdir(exist_ok=True)
    done = 0
    while done < total:
        part = parts / f"{done:08d}.npy"
        if part.is_file():
            done += len(np.load(part, mmap_mode="r"))
        else:
            images = subject.generate(captions[done : done + subject.batch], seed, done).numpy()
            temporary = part.with_suffix(".tmp.npy")
            np.save(temporary, images)
            temporary.replace(part)
            done += len(images)
        report(min(done, total), total)
    _join(sorted(parts.glob("[0-9]*[0-9].npy")), folder / IMAGES, total)
    parts.rename(folder / JOINED)  # at once: where there are parts, the array may not be whole


def _join(files: list[Path], target: Path, total: int) -> None:
    """All parts in one array."""
    first, done = np.load(files[0], mmap_mode="r"), 0
    whole = np.lib.format.open_memmap(target, "w+", np.uint8, (total, *first.shape[1:]))
    for file in files:
        part = np.load(file)
        whole[done : done + len(part)] = part
        done += len(part)
    whole.flush()


class Stored:
    """Images that were there: the same interface, nothing to make.

    Args:
        count: the first so many; None: all.

    Raises:
        SettingError: more are asked for than are stored.
    """

    done = True
    label = WORDS[MAIN]

    def __init__(self, subject: Subject, count: int | None = None) -> None:
        if count is not None and count > subject.count:
            raise SettingError(f"measure.samples={count}: {subject.model} holds {subject.count} images")
        self.subject, self.count, self.size = subject, count or subject.count, subject.size
        self.captions = None if subject.captions is None else subject.captions[: self.count]
        self.key = digest([subject.fingerprint, self.count, self.captions])  # captions may lie beside the images
        self.result: dict[str, Any] = {"model": subject.facts()}

    def make(self) -> Path:
        """Where they lie."""
        return self.subject.root

    def chain(self) -> Iterator[Stage]:
        """Nothing is made."""
        return iter(())

    @cached_property
    def _pixels(self) -> np.ndarray:
        count, batch = self.count, self.subject.batch
        parts = [self.subject.generate([None] * min(batch, count - i), 0, i).numpy() for i in range(0, count, batch)]
        return np.concatenate(parts)

    def images(self) -> np.ndarray:
        """uint8 [N, H, W, 3]."""
        return self._pixels
