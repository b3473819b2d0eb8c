"""A trial's samples as pictures for MLflow."""

from __future__ import annotations

import io
import math
import uuid
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

THUMBNAIL = 256  # pixels of the copy that MLflow's charts show
COLUMNS, ROWS, SIDE, GAP = 8, 8, 64, 4  # of a sheet; pixels


def draw_samples(file: Path, folder: Path, run_id: str, step: int, time_ms: int) -> None:
    """Draw a samples.npz (uint8 "images" and, where stored, "real", [n, H, W, 3]) into ``folder``: samples.png, real.png,
    and images/, in the form that MLflow's charts put side by side for several runs.

    The latter are named as ``MlflowClient.log_image`` does, but for its random part: drawn again they are the same ones.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name][: COLUMNS * ROWS] for name in ("images", "real") if name in archive.files}
    except (zipfile.BadZipFile, EOFError, ValueError):  # cut off by a kill
        return
    if "real" in arrays:
        (folder / "real.png").write_bytes(_png(arrays["real"].tobytes(), arrays["real"].shape))
    if "images" not in arrays:
        return
    unique = uuid.uuid5(uuid.NAMESPACE_OID, f"{run_id} samples {step}")
    charted = folder / "images" / f"samples+step+{step}+timestamp+{time_ms}+{unique}.png"
    charted.parent.mkdir()
    for place in (folder / "samples.png", charted):
        place.write_bytes(_png(arrays["images"].tobytes(), arrays["images"].shape))
    sheet = contact_sheet(arrays["images"])
    sheet.thumbnail((THUMBNAIL, THUMBNAIL))
    sheet.save(charted.with_name(f"{charted.stem}+compressed.webp"), method=0)


@lru_cache(maxsize=4)
def _png(pixels: bytes, shape: tuple[int, ...]) -> bytes:
    """A sheet of images; the trials of a grid share their real ones."""
    file = io.BytesIO()
    contact_sheet(np.frombuffer(pixels, np.uint8).reshape(shape)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def contact_sheet(images: np.ndarray) -> Image.Image:
    """Uint8 images [n, H, W, 3] as one picture, small ones enlarged by whole pixels to about ``SIDE``."""
    count, height, width = images.shape[:3]
    scale, columns = max(1, SIDE // max(height, width)), min(COLUMNS, count)
    down, right = height * scale + GAP, width * scale + GAP
    sheet = np.full((GAP + down * math.ceil(count / columns), GAP + right * columns, 3), 255, np.uint8)
    for index, image in enumerate(images.repeat(scale, 1).repeat(scale, 2)):
        top, left = GAP + down * (index // columns), GAP + right * (index % columns)
        sheet[top : top + height * scale, left : left + width * scale] = image
    return Image.fromarray(sheet)
