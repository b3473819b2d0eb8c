"""Images that are there already: a folder of picture files, or an array file; with their captions, if they have any."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.judges.images import check_images, to_pixels
from eval.subjects.base import Subject
from iris.diffusion.sampling import Sample
from iris.errors import SettingError

SUFFIXES = (".npy", ".npz")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LOSSY = (".jpg", ".jpeg", ".webp")
METADATA = ("metadata.jsonl", "metadata.csv", "captions.txt")
FILE_NAME, TEXT = "file_name", "text"  # columns, as ``datasets``' image folders have them
NAMED = 5  # files that a message lists


class StoredImages(Subject):
    """A folder of images or an array.

    A folder's captions are in metadata.jsonl or metadata.csv (``file_name``, ``text``) or in captions.txt, one a line,
    for the images in the order of their names, numbers in them read as numbers. An array file holds uint8 [N, H, W, 3]
    or floats [N, 3, H, W] in [-1, 1]; an .npz under "images" (or "arr_0"), with "captions" [N] if there are any.

    Raises:
        SettingError: no images, sizes or colour modes that differ, captions that are not one each, unreadable files.
    """

    kind = "images"

    def __init__(self, model: str, sample: Sample, dtype: str, device: str) -> None:
        sample.given(self.kind, ())
        place = Path(model).expanduser()
        self.model, self.root, self.sampling = model, place, {}
        self.name = place.stem if place.is_file() else place.resolve().name
        self._array: Tensor | None = None
        if place.is_file():
            self._files = [place]
            self._array, self.captions = read_array(place)
            self.count, shape = len(self._array), self._array.shape
            self.size = tuple(shape[1:3]) if self._array.dtype == torch.uint8 else tuple(shape[2:])
            return
        if not place.is_dir():
            raise SettingError(f"model={model}: no such folder or array file ({', '.join(SUFFIXES)})")
        self._files, self.captions = read_folder(place)
        self.count, self.size = len(self._files), common_size(self._files, place)
        lossy = sum(file.suffix.lower() in LOSSY for file in self._files)
        if lossy:
            self.notes = (f"{lossy} of {self.count} images are stored with loss (JPEG or WebP), which moves FID",)

    def files(self) -> list[Path]:
        return self._files

    def generate(self, captions: Sequence[str | None], seed: int, first: int) -> Tensor:
        if self._array is not None:
            return to_pixels(self._array[first : first + len(captions)])
        return torch.from_numpy(np.stack([_pixels(file) for file in self._files[first : first + len(captions)]]))


def holds_images(folder: Path) -> bool:
    """Whether a folder is one of images."""
    return any((folder / name).is_file() for name in METADATA) or bool(picture_files(folder))


def picture_files(folder: Path) -> list[Path]:
    """Picture files below a folder by name, 2.png before 10.png."""
    found = (file for file in folder.rglob("*") if file.suffix.lower() in PICTURES and not file.name.startswith("."))
    return sorted(found, key=lambda file: _natural(file.relative_to(folder).as_posix()))


def read_folder(folder: Path) -> tuple[list[Path], list[str] | None]:
    """Picture files and their captions, None if it has none.

    Raises:
        SettingError: no images, captions that are not one each, metadata that cannot be read.
    """
    files = picture_files(folder)
    if not files:
        raise SettingError(f"model={folder}: no images in the folder ({', '.join(PICTURES)})")
    source = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if source is None:
        return files, None
    try:
        text = source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingError(f"model={folder}: {source.name} is not UTF-8 ({error})") from error
    if source.suffix == ".txt":
        lines = text.splitlines()
        if len(lines) != len(files):
            raise SettingError(
                f"model={folder}: captions: {source.name} has {len(lines)} lines for {len(files)} "
                "images; one each is needed"
            )
        return files, _not_empty(lines, [file.name for file in files], source)
    return _matched(files, _rows(text, source), source)


def _rows(text: str, source: Path) -> dict[str, str]:
    """file_name -> text."""
    try:
        rows = (
            list(csv.DictReader(text.splitlines()))
            if source.suffix == ".csv"
            else [json.loads(line) for line in text.splitlines() if line.strip()]
        )
    except ValueError as error:
        raise SettingError(f"model={source.parent}: {source.name} cannot be read: {error}") from error
    found: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get(FILE_NAME), str) or not isinstance(row.get(TEXT), str):
            columns = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise SettingError(
                f"model={source.parent}: {source.name}, row {number}: {FILE_NAME} and {TEXT} are needed "
                f"as strings, it has {columns}"
            )
        if row[FILE_NAME] in found:
            raise SettingError(f"model={source.parent}: {source.name} names {row[FILE_NAME]} twice")
        found[row[FILE_NAME]] = row[TEXT]
    return found


def _matched(files: list[Path], rows: dict[str, str], source: Path) -> tuple[list[Path], list[str]]:
    folder = source.parent
    names = [file.relative_to(folder).as_posix() for file in files]
    lacking = [name for name in names if name not in rows]
    if lacking:
        raise SettingError(
            f"model={folder}: captions: {source.name} has none for {len(lacking)} of {len(files)} "
            f"images: {_listed(lacking)}"
        )
    missing = sorted(set(rows) - set(names))
    if missing:
        raise SettingError(
            f"model={folder}: {source.name} names {len(missing)} images that are not there: {_listed(missing)}"
        )
    return files, _not_empty([rows[name] for name in names], names, source)


def _not_empty(captions: list[str], names: list[str], source: Path) -> list[str]:
    captions = [caption.strip() for caption in captions]
    empty = [name for name, caption in zip(names, captions, strict=True) if not caption]
    if empty:
        raise SettingError(f"model={source.parent}: captions: {source.name} has an empty one for {_listed(empty)}")
    return captions


def common_size(files: list[Path], folder: Path) -> tuple[int, int]:
    """(height, width) of all pictures, from their headers.

    Raises:
        SettingError: sizes that differ, a colour mode without exactly red, green and blue, a file that is no picture.
    """
    sizes: Counter[tuple[int, int]] = Counter()
    for file in files:
        with _opened(file) as image:
            if image.mode != "RGB":
                raise SettingError(f"model={folder}: {file.name} has the colour mode {image.mode}; convert it to RGB")
            sizes[image.height, image.width] += 1
    if len(sizes) > 1:
        shown = ", ".join(f"{n} of {width}x{height}" for (height, width), n in sizes.most_common(NAMED))
        raise SettingError(f"model={folder}: the images differ in size: {shown} pixels; bring them to one size first")
    return next(iter(sizes))


def read_array(file: Path) -> tuple[Tensor, list[str] | None]:
    """Images as ``check_images`` returns them, and captions.

    Raises:
        SettingError: no such array in it, objects that would have to be unpickled, pixels that are not finite or out of
            range, or captions that are not one each.
    """
    try:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            parts = {"images": loaded}
        else:
            parts = {name: loaded[name] for name in ("images", "arr_0", "captions") if name in loaded}
    except (ValueError, OSError, EOFError) as error:
        raise SettingError(f"model={file}: cannot be read as an array ({error})") from error
    images = parts.get("images", parts.get("arr_0"))
    if images is None:
        raise SettingError(f"model={file}: it has no array 'images' (or 'arr_0')")
    captions = [str(caption).strip() for caption in parts["captions"]] if "captions" in parts else None
    try:
        return check_images(np.ascontiguousarray(images), captions, minimum=1), captions
    except (ValueError, TypeError) as error:
        raise SettingError(f"model={file}: {error}") from error


def _opened(file: Path) -> Image.Image:
    try:
        return Image.open(file)
    except (OSError, Image.DecompressionBombError) as error:
        raise SettingError(f"model={file}: it is not a picture that Pillow can read ({error})") from error


def _pixels(file: Path) -> np.ndarray:
    with _opened(file) as image:
        try:
            return np.asarray(image)
        except (OSError, SyntaxError) as error:  # the latter from damaged PNGs
            raise SettingError(f"model={file}: the picture is damaged ({error})") from error


def _natural(name: str) -> list[tuple[int, int | str]]:
    """A key by which numbers in names are ordered as numbers."""
    split: Callable[[str], list[str]] = re.compile(r"(\d+)").split
    return [(0, int(part)) if part.isdecimal() else (1, part.lower()) for part in split(name)]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
