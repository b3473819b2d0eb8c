"""A page that shows the generated images closest to training images: one HTML file that needs no other."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
import numpy as np
from PIL import Image
from scipy import stats

from eval.judges.images import check_images, to_pixels
from eval.metrics.duplicates import Duplicates

PAIRS = 24
SMALL = 96  # pixels of a side up to which the page shows single pixels sharply
CHANCE = 0.95


class Pictures(Protocol):
    """Anything that gives image i: an array uint8 [N, H, W, 3], a data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def write_page(
    found: Duplicates,
    generated: Pictures,
    training: Pictures,
    path: Path,
    judge: str,
    captions: Sequence[str] | None = None,
    pairs: int = PAIRS,
    title: str = "Does the model copy?",
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write the closest pairs of ``found`` to ``path`` and return it.

    Args:
        found: of the same images in the same order.
        generated: N images, each uint8 [H, W, 3], floats [3, H, W] in [-1, 1] or PIL.
        training: the training images, of any size of their own.
        path: of the HTML file.
        judge: in whose features the neighbours were sought, as the page should name it.
        captions: [N] of the generated images.
        pairs: how many to show, at least 1.
        title: the page's heading.
        facts: more lines for "How it was found", such as the model and the seed.

    Raises:
        ValueError: other numbers of images than ``found`` has, or of captions; an image that cannot be shown.
    """
    for name, given, wanted in (
        ("generated", generated, found.n),
        ("training", training, found.training_n),
        ("captions", captions, found.n),
    ):
        if given is not None and len(given) != wanted:
            raise ValueError(f"{name}: {wanted:,} are needed, as many as were compared, got {len(given):,}")
    if pairs < 1:
        raise ValueError(f"pairs: must be at least 1, got {pairs}")
    shown = [_pair(found, i, generated, training, captions) for i in found.closest(pairs)]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("eval"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.get_template("duplicates.html").render(
        title=title,
        found=found,
        pairs=shown,
        flagged=int(found.flagged.sum()),
        expected_high=expected_high(found),
        small=max(pair["side"] for pair in shown) <= SMALL,
        facts=_facts(found, judge) | dict(facts or {}),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def expected_high(found: Duplicates) -> int:
    """Flagged images that a model as new as the held-out images exceeds in one case out of twenty.

    The share on held-out images is itself an estimate from few: its posterior (Jeffreys' prior) is averaged over.
    """
    hits, misses = found.heldout_flagged, found.heldout_n - found.heldout_flagged
    return int(stats.betabinom.ppf(CHANCE, found.n, hits + 0.5, misses + 0.5))


def _facts(found: Duplicates, judge: str) -> dict[str, str]:
    return {
        "Judge": judge,
        "Images": f"{found.n:,} generated, {found.training_n:,} of training, {found.heldout_n:,} real held-out ones",
        "By cosine": f"{int(found.cosine.flagged.sum()):,} flagged up to {found.cosine.threshold:.4g}",
        "By L2": f"{int(found.euclidean.flagged.sum()):,} flagged up to {found.euclidean.threshold:.4g}",
        "Held-out images": f"{found.heldout_flagged:,} of {found.heldout_n:,} flagged by the same rule",
    }


def _pair(
    found: Duplicates, i: int, generated: Pictures, training: Pictures, captions: Sequence[str] | None
) -> dict[str, Any]:
    j = found.neighbour(i)
    mine, theirs = _pixels(generated[i], f"generated[{i}]"), _pixels(training[j], f"training[{j}]")
    return {
        "generated": _png_uri(mine),
        "training": _png_uri(theirs),
        "number": i,
        "training_number": j,
        "cosine": float(found.cosine.distance[i]),
        "euclidean": float(found.euclidean.distance[i]),
        "flagged": bool(found.flagged[i]),
        "caption": captions[i] if captions is not None else "",
        "side": max(*mine.shape[:2], *theirs.shape[:2]),
    }


def _pixels(image: Any, name: str) -> np.ndarray:
    return to_pixels(check_images([image], minimum=1, name=name))[0].numpy()


def _png_uri(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
