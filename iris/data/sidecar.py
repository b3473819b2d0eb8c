"""Folders of images with a .txt of the same name beside each: the caption of 0001.jpg is in 0001.txt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from iris.data.sources import METADATA, _split_of
from iris.errors import SettingError

if TYPE_CHECKING:
    import datasets

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def has_metadata(root: Path) -> bool:
    """Whether captions come from a metadata file; so too where there are neither: its error says what is missing."""
    root = root.expanduser()
    return any(next(root.rglob(name), None) for name in METADATA) or next(root.rglob("*.txt"), None) is None


def captioned_files(root: Path, text_column: str) -> dict[str, datasets.Dataset]:
    """Split -> rows (image, caption) of a folder's images, by relative name; an image without a .txt has no caption.

    The split is the word validation or test in the name of the image's subfolder, else train.

    Raises:
        SettingError: no image in the folder.
    """
    import datasets as hf

    root = root.expanduser()
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGES)
    if not files:
        raise SettingError(f"data.path: {root} has no images ({', '.join(IMAGES)})")
    splits: dict[str, dict[str, list]] = {}
    for file in files:
        sidecar = file.with_suffix(".txt")
        split = _split_of(Path(file.parent.relative_to(root).name) / "x")
        columns = splits.setdefault(split, {"image": [], text_column: []})
        columns["image"].append({"bytes": None, "path": str(file)})
        columns[text_column].append(sidecar.read_text(errors="replace").strip() if sidecar.is_file() else None)
    features = hf.Features({"image": hf.Image(), text_column: hf.Value("string")})
    return {split: hf.Dataset.from_dict(columns, features=features) for split, columns in splits.items()}
