"""Pictures on disk, for people to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

GAP = 2  # pixels between the pictures of a grid
LEAST_SIDE = 64  # smaller pictures are enlarged by whole pixels to about this


def picture_grid(images: np.ndarray, columns: int) -> Image.Image:
    """uint8 images [N, H, W, 3] as one picture, row by row; small ones enlarged by whole pixels."""
    count, height, width = images.shape[:3]
    scale = max(1, LEAST_SIDE // max(height, width))
    columns = min(columns, count)
    down, right = height * scale + GAP, width * scale + GAP
    sheet = np.full((-(-count // columns) * down - GAP, columns * right - GAP, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * down, i % columns * right
        sheet[top : top + height * scale, left : left + width * scale] = image.repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(sheet)


def save_grid(path: Path, images: np.ndarray, columns: int) -> None:
    """Write ``picture_grid`` as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    picture_grid(images, columns).save(temporary, "PNG")
    temporary.replace(path)
