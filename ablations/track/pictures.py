"""A trial's samples as pictures for MLflow."""

from __future__ import annotations

import io
import uuid
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np

from iris.io.pictures import picture_grid

THUMBNAIL = 256  # pixels of the copy that MLflow's charts show
COLUMNS, ROWS = 8, 8  # of a sheet


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
    sheet = picture_grid(arrays["images"], COLUMNS)
    sheet.thumbnail((THUMBNAIL, THUMBNAIL))
    sheet.save(charted.with_name(f"{charted.stem}+compressed.webp"), method=0)


@lru_cache(maxsize=4)
def _png(pixels: bytes, shape: tuple[int, ...]) -> bytes:
    """A sheet of images; the trials of a grid share their real ones."""
    file = io.BytesIO()
    picture_grid(np.frombuffer(pixels, np.uint8).reshape(shape), COLUMNS).save(file, "PNG", compress_level=1)
    return file.getvalue()
