"""From an HF data set to arrays: decode, crop, count what cannot be used."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from iris.errors import SettingError

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

SMALLEST = 8  # pixels a side
NAMED = 5  # bad rows that an error message lists
UNDECODED = 512  # rows held undecoded at once


@dataclass(frozen=True)
class Decoded:
    """A split in memory: images uint8 [N, size, size, 3], captions [N], attributes {name: int64 [N]}.

    ``bad`` names each row that was skipped and says why, in order.
    """

    images: np.ndarray
    captions: list[str]
    attributes: dict[str, np.ndarray]
    bad: list[str]


def pixels(dataset: datasets.Dataset, size: int, max_bad: float = 0.01) -> Decoded:
    """Decode a split that ``iris.data.load`` made: RGB, short side resized (antialiased) to ``size``, centre crop.

    A row is bad, and skipped, when its image cannot be read, is smaller than 8 pixels on a side or has no RGB form, or
    when its caption is empty.

    Args:
        dataset: columns image, caption; every ClassLabel column becomes an attribute.
        size: side of the result in pixels.
        max_bad: share of bad rows that is tolerated, 0 <= max_bad < 1.

    Raises:
        SettingError: more bad rows than that (names data.max_bad), no caption at all (names data.text_column), no
            usable row, or a size or share out of range.
    """
    import datasets as hf

    if size < SMALLEST:
        raise SettingError(f"data.size must be >= {SMALLEST} pixels, not {size}")
    if not 0.0 <= max_bad < 1.0:
        raise SettingError(f"data.max_bad must be a share in [0, 1), not {max_bad}")
    captions = [(text or "").strip() for text in dataset["caption"]]
    if captions and not any(captions):
        raise SettingError(f"data.text_column: all {len(captions)} captions are empty")
    images, kept, bad = np.empty((len(dataset), size, size, 3), np.uint8), [], []
    raw = dataset.select_columns(["image"]).cast_column("image", hf.Image(decode=False))
    rows = dataset["row"] if "row" in dataset.column_names else range(len(dataset))
    for start in range(0, len(raw), UNDECODED):
        for i, cell in enumerate(raw[start : start + UNDECODED]["image"], start):
            problem = None if captions[i] else "empty caption"
            if problem is None:
                problem = _decode_into(cell, images[len(kept)])
            if problem is None:
                kept.append(i)
            else:
                bad.append(f"{(cell or {}).get('path') or f'row {rows[i]}'} ({problem})")
    if len(bad) > max_bad * len(dataset) or not kept:
        named = ", ".join(bad[:NAMED]) + (", …" if len(bad) > NAMED else "")
        count = f"{len(bad)} of {len(dataset)}"
        raise SettingError(
            f"data.max_bad allows {max_bad:.2%} unusable rows, but {count} are: {named}"
            if bad
            else "the data set has no rows"
        )
    attributes = {
        name: np.asarray(dataset[name], np.int64)[kept]
        for name, feature in dataset.features.items()
        if isinstance(feature, hf.ClassLabel)
    }
    return Decoded(images[: len(kept)], [captions[i] for i in kept], attributes, bad)


def decode_image(cell: dict[str, Any] | None, size: int, where: tuple[float, float] = (0.5, 0.5)) -> np.ndarray | str:
    """One image cell {"bytes", "path"} as uint8 [size, size, 3], or, if it cannot be used, the problem in words.

    The largest square is cut out, at ``where`` of the room there is for it (0: left or top, 0.5: centre), and resized.
    """
    out = np.empty((size, size, 3), np.uint8)
    return _decode_into(cell, out, where) or out


def _decode_into(cell: dict[str, Any] | None, out: np.ndarray, where: tuple[float, float] = (0.5, 0.5)) -> str | None:
    """Decode one image cell {"bytes", "path"} into ``out`` [size, size, 3]; the problem in words, or None."""
    from PIL import Image

    if cell is None or not (cell.get("bytes") or cell.get("path")):
        return "no image"
    try:
        with Image.open(io.BytesIO(cell["bytes"]) if cell.get("bytes") else cell["path"]) as image:
            if min(image.size) < SMALLEST:
                return f"{image.width}x{image.height} pixels, fewer than {SMALLEST} on a side"
            out[:] = _square(_rgb(image), len(out), where)
    except FileNotFoundError:
        return "no such file"
    except Exception as error:  # Pillow's format readers raise nearly anything on damaged bytes, not only OSError
        return f"unreadable: {type(error).__name__}"
    return None


def _rgb(image: Image) -> Image:
    """Upright and RGB; transparency is laid over white, since dropping it shows whatever colour lies below."""
    from PIL import Image, ImageOps

    if image.mode[0] in "IF":
        raise ValueError(f"mode {image.mode} has no defined white")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _square(image: Image, size: int, where: tuple[float, float]) -> np.ndarray:
    """A square of full height or width, resized bicubically with antialiasing: uint8 [size, size, 3].

    Untouched if it fits.
    """
    from PIL import Image

    if image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) * where[0], (image.height - side) * where[1]
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(image, np.uint8)
