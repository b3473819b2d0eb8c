"""Features of real images kept on disk, so that a reference is computed once and never mistaken for another.

A reference is a folder: features.npy float32 [N, D], statistics.npz (``FeatureStatistics``) and about.json with the
key it was made for and each file's sha256. The folder's name is the key's hash, and it appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from eval.judges import Judge
from eval.metrics.features import Features, judge_facts
from eval.metrics.fid import FeatureStatistics
from iris.errors import SettingError

FORMAT = 1
FEATURES, STATISTICS, ABOUT = "features.npy", "statistics.npz", "about.json"


@dataclass(frozen=True)
class ReferenceKey:
    """All that determines a reference's features.

    Attributes:
        data: fingerprint of the data set, as ``iris.data.fingerprint`` or ``Source.fingerprint`` give it.
        split: of the data set.
        image_size: side of the images in pixels before the judge resizes them.
        judge: its name.
        judge_sha256: of its weights.
        resize: how it brings images to its own input size.
        count: images, the first ones of the split.
    """

    data: str
    split: str
    image_size: int
    judge: str
    judge_sha256: str
    resize: str
    count: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, str) and not value:
                raise SettingError(f"reference: {name} must not be empty")
        for name, least in (("image_size", 1), ("count", 2)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise SettingError(f"reference: {name} must be a whole number >= {least}, not {getattr(self, name)!r}")

    @classmethod
    def of(cls, judge: Judge, data: str, split: str, image_size: int, count: int) -> ReferenceKey:
        """The key of a judge's features."""
        return cls(data=data, split=split, count=count, **judge_facts(judge, image_size))

    @property
    def folder(self) -> str:
        """Name of the reference's folder: readable parts, then the hash that tells keys apart."""
        digest = hashlib.sha256(json.dumps([FORMAT, asdict(self)], sort_keys=True).encode()).hexdigest()[:16]
        parts = (self.judge, self.split, str(self.image_size), str(self.count))
        readable = "-".join("".join(c if c.isalnum() else "_" for c in part)[:24] for part in parts)
        return f"{readable}-{digest}"


def reference(key: ReferenceKey, make: Callable[[], Tensor | np.ndarray], folder: str | os.PathLike[str]) -> Features:
    """The features of ``key`` from ``folder``, computed by ``make`` and stored when they are not there.

    Two processes that want the same reference make it once; killed while making it, nothing is left behind that a
    reader would take for a reference.

    Args:
        key: what the features are of.
        make: returns float features [count, D].
        folder: that holds all references.

    Returns:
        The features with their statistics, as they are on disk.

    Raises:
        SettingError: what is stored is damaged, or of another key than its name says.
        ValueError: ``make`` returned another number of features, or values that are not finite.
    """
    place = Path(folder) / key.folder
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f".{place.name}.lock")):
        if not place.exists():
            _store(place, key, make())
        return load_reference(place, key)


def load_reference(place: str | os.PathLike[str], key: ReferenceKey | None = None) -> Features:
    """A stored reference, checked; with ``key`` also that it is the one asked for.

    Raises:
        SettingError: no reference there, a damaged one, or one of another key (the parts that differ are named).
    """
    place = Path(place)
    about = _read_about(place)
    if key is not None and about["key"] != asdict(key):
        differ = [
            f"{name} is {about['key'].get(name)!r}, asked for {value!r}"
            for name, value in asdict(key).items()
            if about["key"].get(name) != value
        ]
        raise SettingError(f"reference {place} is another one: {'; '.join(differ) or 'its key has other parts'}")
    for name, sha256 in about["sha256"].items():
        if not (place / name).is_file():
            raise _damaged(place, f"{name} is missing")
        if hashlib.sha256((place / name).read_bytes()).hexdigest() != sha256:
            raise _damaged(place, f"{name} has changed since it was written (another sha256)")
    values = torch.from_numpy(np.load(place / FEATURES, allow_pickle=False))
    return Features(values, FeatureStatistics.load(place / STATISTICS))


def _read_about(place: Path) -> dict[str, Any]:
    if not (place / ABOUT).is_file():
        raise SettingError(f"{place} holds no reference: {ABOUT} is missing")
    try:
        about = json.loads((place / ABOUT).read_text(encoding="utf-8"))
        known = (
            about["format"] == FORMAT
            and isinstance(about["key"], dict)
            and set(about["sha256"]) == {FEATURES, STATISTICS}
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(place, f"{ABOUT} cannot be read ({error})") from error
    if not known:
        raise _damaged(place, f"{ABOUT} is of another format")
    return about


def _damaged(place: Path, problem: str) -> SettingError:
    return SettingError(f"reference {place}: {problem}; delete the folder to compute it anew")


def _store(place: Path, key: ReferenceKey, values: Tensor | np.ndarray) -> None:
    """Write everything beside ``place``, then rename, which is atomic."""
    features = Features.of(values, asdict(key))
    if len(features) != key.count:
        raise ValueError(f"reference: {key.count} features were asked for, {len(features)} were made")
    temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        np.save(temporary / FEATURES, features.values.numpy(), allow_pickle=False)
        features.statistics.save(temporary / STATISTICS)
        sha256 = {name: hashlib.sha256((temporary / name).read_bytes()).hexdigest() for name in (FEATURES, STATISTICS)}
        about = {"format": FORMAT, "key": asdict(key), "shape": list(features.values.shape), "sha256": sha256}
        (temporary / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        for file in temporary.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        temporary.chmod(0o755)
        os.replace(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
