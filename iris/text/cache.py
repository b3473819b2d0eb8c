"""Captions encoded once and kept on disk, so that training needs no text encoder in memory.

A cache is a folder: captions.json (row 0 is the null prompt ""), tokens.npy [N, L, W], mask.npy [N, L],
pooled.npy [N, W], and about.json, written last, which says what the cache was made with and how large each file is.
ViT-L/14 takes 120 kB a caption in float16.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from iris.errors import SettingError, require_choice
from iris.io.arrays import GrowingArray
from iris.io.files import naming, write_atomically, write_json
from iris.nn.condition import TextCondition
from iris.text.base import TextEncoder

ABOUT, CAPTIONS, PROGRESS = "about.json", "captions.json", "progress.json"
FORMAT = 1
DTYPES = ("float16", "float32")
SAVE_SECONDS = 10.0  # what a power cut can cost


class EmbeddedText(TextEncoder):
    """A frozen encoder that looks captions up in a folder made by ``embed_captions``: numbers are rows [B, 1].

    Rows are read from disk as they are asked for. ``to_dict`` describes the encoder that made them, which is the one
    that a saved model needs for other captions.

    Args:
        folder: of the cache.
        verify: also read every file through and compare its sha256, which takes about a second per gigabyte.

    Raises:
        SettingError: no whole cache in the folder, or a damaged one.
    """

    frozen = True

    def __init__(self, folder: Path | str, verify: bool = False) -> None:
        super().__init__()
        self.folder = Path(folder)
        self._about = _read_about(self.folder)
        self.length, self.width = self._about["length"], self._about["width"]
        _check_files(self.folder, self._about, verify)
        captions = json.loads((self.folder / CAPTIONS).read_text())
        self._rows = {caption: row for row, caption in enumerate(captions)}

    def tokenise(self, captions: Sequence[str]) -> Tensor:
        """Rows int64 [len(captions), 1].

        Raises:
            SettingError: a caption that was not embedded.
        """
        for caption in captions:
            if caption not in self._rows:
                raise SettingError(
                    f"caption {caption!r} is not among the {len(self._rows)} text embeddings of "
                    f"{self.folder}; embed it, or use the text encoder itself"
                )
        return torch.tensor([self._rows[caption] for caption in captions], dtype=torch.int64).unsqueeze(1)

    @torch.no_grad()
    def forward(self, numbers: Tensor) -> TextCondition:
        rows = numbers[:, 0].cpu().numpy()
        tokens, mask, pooled = (self._read(name, rows).to(numbers.device) for name in ("tokens", "mask", "pooled"))
        return TextCondition(tokens.float(), mask, pooled.float())

    def to_dict(self) -> dict[str, Any]:
        return dict(self._about["encoder"])

    def fingerprint(self) -> str:
        return self._about["fingerprint"]

    def _read(self, name: str, rows: np.ndarray) -> Tensor:
        # Mapped anew each time: what a held map has touched counts as this process's memory, in the end the whole file.
        return torch.from_numpy(np.load(self.folder / f"{name}.npy", mmap_mode="r")[rows])


def embed_captions(
    encoder: TextEncoder,
    captions: Sequence[str],
    folder: Path | str,
    dtype: str = "float16",
    batch: int = 64,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Encode the different ones of ``captions`` and the null prompt; returns the cache's folder, for ``EmbeddedText``.

    That folder lies in ``folder`` under the hash of the captions, dtype and encoder (its weights included), so that
    several caches live side by side, and the same call finds the one it made before, reads it through and compares its
    sha256. Killed at any point, it goes on there; two processes that want the same cache make it once.

    Args:
        dtype: float16 or float32, on disk.
        batch: captions encoded at once.
        report: called with (captions done, captions in all) after each batch.

    Raises:
        SettingError: unknown dtype; batch < 1; a value too large for float16, or not finite; a cache that is damaged.
    """
    require_choice("text embeddings: dtype", dtype, DTYPES)
    if batch < 1:
        raise SettingError(f"text embeddings: batch={batch} must be at least 1")
    unique = ["", *sorted(set(captions) - {""})]
    fingerprint = encoder.fingerprint()
    place = Path(folder) / _key(fingerprint, dtype, unique)
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / "lock"):
        there = (place / ABOUT).exists()
        if not there:
            with naming(place):
                _embed(encoder, unique, place, dtype, batch, report)
                _finish(encoder, fingerprint, unique, place, dtype)
    EmbeddedText(place, verify=there)  # refuses a damaged one
    return place


def _key(fingerprint: str, dtype: str, captions: list[str]) -> str:
    digest = hashlib.sha256(f"{FORMAT} {fingerprint} {dtype}".encode())
    for caption in captions:
        digest.update(json.dumps(caption).encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def _embed(
    encoder: TextEncoder, captions: list[str], place: Path, dtype: str, batch: int, report: Callable[[int, int], None]
) -> None:
    """Write the three arrays, from the row on that an earlier, killed call had reached."""
    write_atomically(place / CAPTIONS, json.dumps(captions).encode())
    device = next((weight.device for weight in encoder.parameters()), torch.device("cpu"))
    trained, saved = encoder.training, time.monotonic()
    encoder.eval()
    try:
        files = _open(place, encoder(encoder.tokenise([""]).to(device)), len(captions), dtype)
        for start in range(files[0].rows, len(captions), batch):
            text = encoder(encoder.tokenise(captions[start : start + batch]).to(device))
            for file, value in zip(files, text, strict=True):
                file.append(value)
            report(files[0].rows, len(captions))
            if time.monotonic() - saved > SAVE_SECONDS:
                _save_progress(place, files)
                saved = time.monotonic()
        _save_progress(place, files)
    finally:
        encoder.train(trained)


def _open(place: Path, one: TextCondition, count: int, dtype: str) -> list[GrowingArray]:
    """The files of ``count`` captions shaped as ``one``, at the last row that is known to be on the disk."""
    dtypes = TextCondition(dtype, "bool", dtype)
    files = [
        GrowingArray(place / f"{name}.npy", (count, *value.shape[1:]), kind)
        for name, value, kind in zip(TextCondition._fields, one, dtypes, strict=True)
    ]
    try:
        rows = json.loads((place / PROGRESS).read_text())["rows"]
    except (OSError, ValueError, KeyError):
        rows = 0
    rows = rows if all(file.holds(rows) for file in files) else 0
    for file in files:
        file.continue_at(rows)
    return files


def _save_progress(place: Path, files: list[GrowingArray]) -> None:
    for file in files:
        file.sync()
    write_json(place / PROGRESS, {"rows": files[0].rows})


def _finish(encoder: TextEncoder, fingerprint: str, captions: list[str], place: Path, dtype: str) -> None:
    """Write about.json, which makes the cache a whole one."""
    tokens = np.load(place / "tokens.npy", mmap_mode="r")
    names = ["tokens.npy", "mask.npy", "pooled.npy", CAPTIONS]
    write_json(
        place / ABOUT,
        {
            "format": FORMAT,
            "encoder": encoder.to_dict(),
            "fingerprint": fingerprint,
            "dtype": dtype,
            "rows": len(captions),
            "length": tokens.shape[1],
            "width": tokens.shape[2],
            "files": {
                name: {"bytes": (place / name).stat().st_size, "sha256": _sha256(place / name)} for name in names
            },
        },
    )
    (place / PROGRESS).unlink(missing_ok=True)


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / ABOUT).read_text())
    except FileNotFoundError as error:
        raise SettingError(f"text embeddings {folder}: {ABOUT} is missing; embed_captions writes it last") from error
    except (OSError, ValueError) as error:
        raise SettingError(f"text embeddings {folder}: {ABOUT} is not readable ({error})") from error
    missing = {"format", "encoder", "fingerprint", "dtype", "rows", "length", "width", "files"} - set(about)
    if missing or about["format"] != FORMAT:
        raise SettingError(
            f"text embeddings {folder}: {ABOUT} is not one of format {FORMAT}; delete the folder to embed anew"
        )
    return about


def _check_files(folder: Path, about: dict[str, Any], verify: bool) -> None:
    """Sizes, headers and the (small) captions always; with ``verify`` the contents of all files."""
    for name, facts in about["files"].items():
        path = folder / name
        size = path.stat().st_size if path.exists() else -1
        if size != facts["bytes"]:
            raise _damaged(path, "missing" if size < 0 else f"{size} bytes long instead of {facts['bytes']}")
        if (verify or name == CAPTIONS) and _sha256(path) != facts["sha256"]:
            raise _damaged(path, "changed since it was written (another sha256)")
    rows, length, width, dtype = (about[name] for name in ("rows", "length", "width", "dtype"))
    for name, shape, kind in (
        ("tokens", (rows, length, width), dtype),
        ("mask", (rows, length), "bool"),
        ("pooled", (rows, width), dtype),
    ):
        try:
            array = np.load(folder / f"{name}.npy", mmap_mode="r")
        except (OSError, ValueError) as error:
            raise _damaged(folder / f"{name}.npy", f"not a numpy file ({error})") from error
        if array.shape != shape or array.dtype != kind:
            raise _damaged(folder / f"{name}.npy", f"{array.dtype.name} {array.shape} instead of {kind} {shape}")


def _damaged(path: Path, problem: str) -> SettingError:
    return SettingError(f"text embeddings {path.parent}: {path.name} is {problem}; delete the folder to embed anew")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
