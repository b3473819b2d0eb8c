"""What of the measures is possible for a model, data and a judge, told before any image is made."""

from __future__ import annotations

import math
from collections.abc import Sequence

from eval.metrics.quality import FEWEST, usable_blocks
from eval.settings import RUNS
from eval.stages.data import RealData, attributes_of
from eval.stages.evaluation import Evaluation
from eval.stages.images import Stored
from iris.errors import SettingError

PAIRS = 2  # images from which a mean has an error


def possible(run: Evaluation, usual: Sequence[str], allowed: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Which measures to take, in order, and why others cannot be taken.

    Args:
        usual: those to take where measure.what says nothing, as far as they are possible.
        allowed: those that the command takes, in order.

    Raises:
        SettingError: one that was asked for by name is not possible, or none is.
    """
    wanted = run.measure.what
    for name in wanted or ():
        if name not in allowed:
            raise SettingError(f"measure.what: {name} is not taken here; allowed: {', '.join(allowed)}")
    why = {name: _why_not(name, run) for name in wanted or usual}
    refused = {name: reason for name, reason in why.items() if reason}
    if refused and (wanted is not None or len(refused) == len(why)):
        name, reason = next(iter(refused.items()))
        raise SettingError(f"measure.what: {name} is not possible: {reason}")
    return [name for name in allowed if name in why and name not in refused], refused


def _why_not(name: str, run: Evaluation) -> str | None:
    stored, data = isinstance(run.made, Stored), run.data
    if name in RUNS:
        if name == "latency" and run.measure.latency.rounds == 0:
            return "measure.latency.rounds=0 times nothing"
        return "stored images are no model that runs" if stored else None
    fewest = FEWEST if name == "quality" else PAIRS
    if (count := _images(run, fewest)) < fewest:
        return f"at least {fewest} images are needed, {_whose(run)} gives {count}"
    if name in ("quality", "duplicates"):
        reason = _why_not_compared(run)
        if reason or name == "quality":
            return reason or _why_too_few(run)
        drawn = stored and data.world is not None
        return (_why_not_drawn(run) if drawn else None) or _why_none_unseen(run)
    if stored and run.made.captions is None:
        return f"the images of model={run.made.subject.model} have no captions"
    judge = run.judging.about
    if name == "alignment":
        if not judge["has_text"]:
            return f"judge {judge['name']} reads no captions"
        return _why_not_read(run) if judge["worlds"] else None
    if data.name not in judge["worlds"]:
        worlds = ", ".join(judge["worlds"]) or "no drawn world"
        return f"judge {judge['name']} reads the attributes of {worlds}, not of data {data.name}"
    return _why_not_drawn(run)


def _why_not_compared(run: Evaluation) -> str | None:
    (height, width), size = run.made.size, run.data.size
    if (height, width) != (size, size):
        return (
            f"the images are {width}x{height} pixels and the real ones {size}x{size} (data.size); only images of one "
            "size are compared"
        )
    return None


def _why_too_few(run: Evaluation) -> str | None:
    """Quality on so many images, and on as many real ones as there are; more than all could need are not counted."""
    chosen, data, asked = run.measure.quality, run.data, run.measure.reference
    enough = max(FEWEST, 2 * chosen.blocks, 1 + max(chosen.neighbours, chosen.density_neighbours))
    real = _there(data, data.split, min(enough, asked or data.default_count(data.split) or enough))
    made = _images(run, enough)
    try:
        usable_blocks(made, real, chosen.metrics, chosen.blocks, chosen.neighbours, chosen.density_neighbours)
    except ValueError as error:
        given = f"measure.samples={run.count}, measure.reference={asked}, split {data.split} of data {data.name}"
        return f"{error} ({given})"
    return None


def _why_none_unseen(run: Evaluation) -> str | None:
    """Duplicates need real images that were not trained on, as many as can tell the quantile."""
    chosen, data = run.measure.duplicates, run.data
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


def _images(run: Evaluation, enough: int) -> int:
    """Images of the main set; ``enough`` of a model's where there are captions for as many."""
    return run.count if isinstance(run.made, Stored) else _there(run.data, run.data.split, min(enough, run.count))


def _whose(run: Evaluation) -> str:
    """Whose images they are, for a message."""
    if isinstance(run.made, Stored):
        return f"model={run.made.subject.model} with measure.samples"
    return f"measure.samples={run.count} with split {run.data.split} of data {run.data.name}"


def _there(data: RealData, split: str, count: int) -> int:
    """How many of ``count`` rows a split has."""
    return count if data.world is not None else len(data.captions(split, count))


def _why_not_read(run: Evaluation) -> str | None:
    data, worlds = run.data, run.judging.about["worlds"]
    if data.name not in worlds:
        return f"judge {run.judging.name} reads captions of {', '.join(worlds)}, not of data {data.name}"
    return _why_not_drawn(run)


def _why_not_drawn(run: Evaluation) -> str | None:
    """Of stored images: whether their captions are the drawn world's."""
    if not isinstance(run.made, Stored):
        return None
    captions = run.made.captions
    if captions is None or attributes_of(run.data.world, captions) is None:
        return f"the images have no captions of the drawn world {run.data.name}"
    return None
