"""Images that a model made, kept on disk: the same model, captions and settings make them once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from eval.subjects import Subject
from iris.io.files import write_json

FORMAT = 1
ABOUT, IMAGES = "about.json", "images.npy"


@dataclass(frozen=True)
class Samples:
    """Images and what is known of them.

    Attributes:
        images: uint8 [N, H, W, 3], read from disk as needed.
        captions: [N], None if they have none.
        sha256: of the pixels.
        facts: of the model, as ``Subject.facts`` gave them.
        cached: whether they were there already.
    """

    images: np.ndarray
    captions: list[str] | None
    sha256: str
    facts: dict[str, Any]
    cached: bool


def make_samples(
    subject: Subject,
    captions: Sequence[str] | None,
    count: int,
    seed: int,
    folder: Path,
    ticks: Callable[[int, int], None],
) -> Samples:
    """``count`` images of the captions; what an earlier, even a stopped, call made is not made again.

    Args:
        captions: [count]; None for stored images without captions.
        seed: of the noise.
        folder: that holds all samples.
        ticks: called with images done and in all.
    """
    texts = [None] * count if captions is None else list(captions)
    place = folder / f"{subject.name[:40]}-{_key(subject, texts, seed)}"
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / "lock"):
        cached = (place / ABOUT).is_file()
        if not cached:
            _make(subject, texts, seed, place, ticks)
        about = json.loads((place / ABOUT).read_text())
    images = np.load(place / IMAGES, mmap_mode="c")  # copy on write: torch takes no read-only arrays
    return Samples(images, None if captions is None else texts, about["sha256"], about["facts"], cached)


def _key(subject: Subject, captions: list[str | None], seed: int) -> str:
    facts = [FORMAT, subject.kind, subject.fingerprint, subject.sampling, subject.dtype, subject.device, captions]
    if subject.count is None:
        facts += [seed, torch.__version__, subject.code()]  # what is stored depends on none of them
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _make(
    subject: Subject, captions: list[str | None], seed: int, place: Path, ticks: Callable[[int, int], None]
) -> None:
    parts, total = place / "parts", len(captions)
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
        ticks(min(done, total), total)
    digest = _join(sorted(parts.glob("[0-9]*[0-9].npy")), place / IMAGES, total)
    write_json(
        place / ABOUT,
        {
            "sha256": digest,
            "facts": subject.facts(),
            "model": subject.model,
            "sampling": subject.sampling,
            "seed": seed,
            "captions": captions,
        },
    )
    for file in parts.iterdir():
        file.unlink()
    parts.rmdir()


def _join(files: list[Path], target: Path, total: int) -> str:
    """All parts in one array; returns the sha256 of the pixels."""
    first = np.load(files[0], mmap_mode="r")
    whole = np.lib.format.open_memmap(target, "w+", np.uint8, (total, *first.shape[1:]))
    digest, done = hashlib.sha256(), 0
    for file in files:
        part = np.load(file)
        whole[done : done + len(part)] = part
        digest.update(part.tobytes())
        done += len(part)
    whole.flush()
    return digest.hexdigest()
