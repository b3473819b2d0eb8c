"""What of the measures is possible for a model, data and a judge, told before any image is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from eval.metrics.quality import FEWEST, usable_blocks
from eval.settings import IMAGES, RUNS, Settings
from eval.stages.data import RealData, attributes_of
from eval.subjects import Subject
from iris.errors import SettingError

PAIRS = 2  # images from which a mean has an error


def measures(
    settings: Settings,
    subject: Subject,
    data: RealData,
    judge: dict[str, Any] | None,
    count: int,
    captions: Sequence[str] | None,
) -> tuple[list[str], dict[str, str]]:
    """Which measures to make, in order, and why others cannot be made.

    Args:
        judge: as ``eval.judges.describe`` gives it; None: none is needed.
        count, captions: of the main set of images.

    Raises:
        SettingError: one that was asked for by name is not possible, or none is.
    """
    wanted = settings.measure.what
    why = {name: _why_not(name, settings, subject, data, judge or {}, count, captions) for name in wanted or IMAGES}
    refused = {name: reason for name, reason in why.items() if reason}
    if refused and (wanted is not None or len(refused) == len(why)):
        name, reason = next(iter(refused.items()))
        raise SettingError(f"measure.what: {name} is not possible: {reason}")
    return [name for name in (*IMAGES, *RUNS) if name in why and name not in refused], refused


def _why_not(
    name: str,
    settings: Settings,
    subject: Subject,
    data: RealData,
    judge: dict[str, Any],
    count: int,
    captions: Sequence[str] | None,
) -> str | None:
    if name in RUNS:
        return f"kind={subject.kind} is no model that runs" if subject.count is not None else None
    fewest = FEWEST if name == "quality" else PAIRS
    if count < fewest:
        return f"at least {fewest} images are needed, model={subject.model} with measure.samples has {count}"
    if name in ("quality", "duplicates"):
        reason = _why_not_compared(subject, data)
        if reason or name == "quality":
            return reason or _why_too_few(settings, data, count)
        stored = subject.count is not None and data.world is not None
        return (_why_not_drawn(data, captions) if stored else None) or _why_none_unseen(settings, data)
    if captions is None:
        return f"the images of model={subject.model} have no captions"
    if name == "alignment":
        if not judge["has_text"]:
            return f"judge {judge['name']} reads no captions"
        return _why_not_read(data, judge, captions) if judge["worlds"] else None
    if data.name not in judge["worlds"]:
        worlds = ", ".join(judge["worlds"]) or "no drawn world"
        return f"judge {judge['name']} reads the attributes of {worlds}, not of data {data.name}"
    return _why_not_drawn(data, captions)


def _why_not_compared(subject: Subject, data: RealData) -> str | None:
    height, width = subject.size
    if (height, width) != (data.size, data.size):
        return (
            f"the images are {width}x{height} pixels and the real ones {data.size}x{data.size} (data.size); only "
            "images of one size are compared"
        )
    return None


def _why_too_few(settings: Settings, data: RealData, count: int) -> str | None:
    """Quality on so many images, and on as many real ones as there are; more than all could need are not counted."""
    chosen = settings.measure.quality
    enough = max(FEWEST, 2 * chosen.blocks, 1 + max(chosen.neighbours, chosen.density_neighbours))
    real = _there(data, data.split, min(enough, settings.measure.reference or data.default_count or enough))
    try:
        usable_blocks(count, real, chosen.metrics, chosen.blocks, chosen.neighbours, chosen.density_neighbours)
    except ValueError as error:
        return (
            f"{error} (measure.samples={count}, measure.reference={settings.measure.reference}, split {data.split} "
            f"of data {data.name})"
        )
    return None


def _why_none_unseen(settings: Settings, data: RealData) -> str | None:
    """Duplicates need real images that were not trained on, as many as can tell the quantile."""
    chosen = settings.measure.duplicates
    enough = PAIRS if chosen.quantile is None else math.ceil(1 / chosen.quantile)
    wanted = min(enough, chosen.heldout)
    try:
        real = wanted if data.world is not None else _there(data, "validation", wanted)
    except SettingError as error:  # no such split
        return str(error)
    if real < enough:
        return (
            f"at least {enough} unseen real images are needed, measure.duplicates.heldout={chosen.heldout} of split "
            f"validation of data {data.name} gives {real}"
        )
    return None


def _there(data: RealData, split: str, count: int) -> int:
    """How many of ``count`` rows a split has."""
    return len(data.captions(split, count))


def _why_not_read(data: RealData, judge: dict[str, Any], captions: Sequence[str]) -> str | None:
    if data.name not in judge["worlds"]:
        return f"judge {judge['name']} reads captions of {', '.join(judge['worlds'])}, not of data {data.name}"
    return _why_not_drawn(data, captions)


def _why_not_drawn(data: RealData, captions: Sequence[str] | None) -> str | None:
    if captions is None or attributes_of(data.world, captions) is None:
        return f"the images have no captions of the drawn world {data.name}"
    return None
