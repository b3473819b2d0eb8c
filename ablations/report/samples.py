"""Sample pictures side by side: the same captions and the same noise for every trial, the real pictures first."""

from __future__ import annotations

import base64
import io
import textwrap
import zipfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ablations.answer.records import GridOutcome
from ablations.answer.verdict import arms_of
from ablations.report.palette import INK, MUTED, PAPER

COLUMNS = 8
SEEDS = 3  # seeds whose pictures are shown
CELL = 96  # pixels of one picture in the PNG, at least
PHOTO_SIDE = 96  # beyond this a picture is stored as JPEG: PNG would make the page tens of megabytes
REAL = "real"


@dataclass(frozen=True)
class SampleRow:
    """Pictures of one trial, in the order of the grid's captions."""

    label: str  # the arm, or "real"
    pictures: np.ndarray  # uint8 [n, H, W, 3]
    uris: list[str]  # the same as data URIs


@dataclass(frozen=True)
class SampleGrid:
    """All arms of one seed under the same captions."""

    seed: int
    captions: list[str]
    rows: list[SampleRow]
    file: str  # PNG, relative to the report
    left_out: list[str]  # arms whose captions differ, so that their pictures cannot stand here


def read_samples(folder: Path) -> tuple[np.ndarray, list[str], np.ndarray] | None:
    """Images, captions and real images of a trial's samples.npz; None where there is none or it was cut off."""
    path = folder / "samples.npz"
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            return stored["images"], [str(c) for c in stored["captions"]], stored["real"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def sample_grids(outcome: GridOutcome, drawn: list[str], folder: Path) -> list[SampleGrid]:
    """One grid a seed, of the first seeds, written as ``folder``/figures/samples_seed<n>.png: the first captions, none is picked.

    ``drawn``: the arms to show.
    """
    grids = []
    for seed in sorted({record.seed for record in outcome.records})[:SEEDS]:
        rows: list[SampleRow] = []
        captions: list[str] = []
        left_out: list[str] = []
        for arm, trials in arms_of(outcome).items():
            if arm not in drawn:
                continue
            stored = next((s for t in trials if t.seed == seed and (s := read_samples(t.folder))), None)
            if stored is None:
                continue
            images, names, real = (part[:COLUMNS] for part in stored)
            if not rows:
                captions = list(names)
                rows.append(SampleRow(REAL, real, [data_uri(p) for p in real]))
            if list(names) == captions:
                rows.append(SampleRow(arm, images, [data_uri(p) for p in images]))
            else:
                left_out.append(arm)
        if rows:
            name = f"figures/samples_seed{seed}.png"
            draw_sheet(rows, captions).save(folder / name, optimize=True)
            grids.append(SampleGrid(seed, captions, rows, name, left_out))
    return grids


def data_uri(picture: np.ndarray) -> str:
    """A picture (uint8 [H, W, 3]) as a data URI in its own size; the page scales it."""
    buffer, small = io.BytesIO(), max(picture.shape[:2]) <= PHOTO_SIDE
    Image.fromarray(picture).save(
        buffer, format="PNG" if small else "JPEG", **({"optimize": True} if small else {"quality": 88})
    )
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def draw_sheet(rows: list[SampleRow], captions: list[str]) -> Image.Image:
    """Rows of pictures, enlarged by whole pixels, under their captions."""
    side = max(rows[0].pictures.shape[1:3])
    cell = max(1, -(-CELL // side)) * side
    font, gap = _font(13), 8
    wrapped = [textwrap.wrap(caption, max(10, cell // 8)) for caption in captions]
    top = 17 * max((len(lines) for lines in wrapped), default=1) + 2 * gap
    labels = [textwrap.wrap(row.label, 18, break_on_hyphens=False) for row in rows]
    left = int(max(font.getlength(line) for lines in labels for line in lines)) + 3 * gap
    sheet = Image.new("RGB", (left + len(captions) * (cell + gap), top + len(rows) * (cell + gap)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, lines in enumerate(wrapped):
        pen.multiline_text((left + i * (cell + gap), gap), "\n".join(lines), fill=MUTED, font=font, spacing=3)
    for j, (row, lines) in enumerate(zip(rows, labels, strict=True)):
        y = top + j * (cell + gap)
        pen.multiline_text((gap, y + cell / 2), "\n".join(lines), fill=INK, font=font, anchor="lm", spacing=3)
        for i, picture in enumerate(row.pictures):
            enlarged = Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + i * (cell + gap), y))
    return sheet
