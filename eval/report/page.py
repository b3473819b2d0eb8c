"""The results as a page (index.html, one file that needs no other) and as Markdown (report.md)."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from eval.report.tables import facts, tables_of
from eval.results import DUPLICATES, PAGE, PER_IMAGE, REPORT, Results
from iris.io.files import write_atomically

SMALL = 96  # pixels of a side up to which the page shows single pixels sharply
LARGEST = 256  # pixels of a side that the page holds; larger images are shrunk


def write_pages(results: Results, folder: Path, images: np.ndarray | None, captions: Sequence[str] | None) -> None:
    """Write index.html and report.md.

    Args:
        images: uint8 [N, H, W, 3] to show, the first ones; None: there are none.
        captions: of these images and maybe more.
    """
    shown = (
        []
        if images is None
        else [
            {"uri": _uri(np.asarray(image)), "caption": captions[i] if captions else "", "number": i}
            for i, image in enumerate(images)
        ]
    )
    page: dict[str, Any] = {
        "results": results,
        "tables": tables_of(results),
        "facts": facts(results),
        "samples": shown,
        "pixels": images is not None and max(images.shape[1:3]) <= SMALL,
        "duplicates": _duplicates(results),
        "files": [name for name in (PER_IMAGE, DUPLICATES) if (folder / name).is_file()],
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("eval"),
        autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    for template, name in (("eval.html", PAGE), ("eval.md", REPORT)):
        text = environment.get_template(template).render(page)
        write_atomically(folder / name, (text.rstrip() + "\n").encode())


def _duplicates(results: Results) -> str:
    """What the search for duplicates found, in a sentence."""
    found = results.details.get("duplicates")
    if found is None:
        return ""
    return (
        f"{found['flagged']:,} of {found['n']:,} images lie as close to one of {found['training_n']:,} training "
        f"images as the closest {100 * found['quantile']:.3g} % of {found['heldout_n']:,} unseen real ones do; of "
        f"images as new as those, about {found['expected']:.1f} would, and more than {found['expected_high']} in "
        "one case out of twenty."
    )


def _uri(picture: np.ndarray) -> str:
    image = Image.fromarray(picture)
    image.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
