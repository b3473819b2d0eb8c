"""What goes into MLflow, worked out without MLflow: params, curves, inputs, summary and pictures as plain values."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ablations.records import GridOutcome

if TYPE_CHECKING:
    from PIL import Image

DIGEST_LENGTH = 36                  # MLflow's limit for a dataset digest
SUMMARY = ("fid", "clip_score", "accuracy_caption", "latency_ratio", "peak_memory_mb", "params_m")


class MetricPoint(NamedTuple):
    """One value of one curve."""

    name: str
    value: float
    time_ms: int
    step: int


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names to text: ``{"model": {"dim": 64}}`` -> ``{"model.dim": "64"}``."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{path}.")
        elif isinstance(value, (list, tuple, Mapping)):
            flat[path] = json.dumps(value, default=str)
        else:
            flat[path] = str(value)
    return flat


def metric_name(text: str) -> str:
    """``text`` with what MLflow does not allow in a name (it allows letters, digits, ``_ - . / :`` and space) as _."""
    return re.sub(r"[^\w\-./: ]", "_", text)


def metric_points(file: Path) -> Iterator[MetricPoint]:
    """The curves of a metrics.jsonl in file order; a half-written last line and values that are no numbers left out.

    Lines whose step does not increase are skipped: they are the trace of two writers meeting for a moment when a
    requeued trial starts before its first process is dead.
    """
    last = -1
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            step, time_ms = int(line.pop("step")), int(float(line.pop("time")) * 1000)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if step <= last:
            continue
        last = step
        line.pop("steps", None)             # how many there will be: a setting, not a curve
        for name, value in line.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield MetricPoint(metric_name(name), float(value), time_ms, step)


def dataset_fields(record: Mapping[str, Any], digest: str) -> dict[str, str]:
    """Arguments of mlflow.entities.Dataset for a data set or a judge; ``digest`` names the field with its hash."""
    path = record.get("path")
    source = {"uri": str(path)} if path else {"tags": {key: str(value)[:200] for key, value in record.items()}}
    return {
        "name": str(record["name"]),
        "digest": str(record.get(digest) or "unknown")[:DIGEST_LENGTH],
        "source_type": "local" if path else "code",
        "source": json.dumps(source),
        "profile": json.dumps(dict(record), default=str),
    }


def arm_means(outcome: GridOutcome) -> dict[str, float]:
    """Mean over seeds of the main measures of each arm, as ``summary/<measure> <arm>``, over the trials that have it.

    One prefix for all, since MLflow draws a section of charts for every prefix.
    """
    values: dict[str, list[float]] = {}
    for record in outcome.records:
        for measure in dict.fromkeys((outcome.decide.get("metric", "fid"), *SUMMARY)):
            value = record.metrics.get(measure)
            if value is not None and math.isfinite(value):
                values.setdefault(metric_name(f"summary/{measure} {record.arm}"), []).append(float(value))
    return {name: sum(some) / len(some) for name, some in values.items()}


def parent_note(outcome: GridOutcome, verdict: str | None = None) -> str:
    """The parent run's description in MLflow, in Markdown."""
    lines = [f"**{outcome.question}**", "", f"Claim: {outcome.claim}"]
    if verdict:
        lines += ["", f"Verdict: {verdict}"]
    if outcome.records:
        lines += ["", "The report is under Artifacts, `report/index.html`."]
    return "\n".join([*lines, "", f"`{outcome.command}`"])


def read_samples(file: Path) -> dict[str, np.ndarray]:
    """The uint8 arrays [n, H, W, 3] of a samples.npz: "images" and, where stored, "real"; none without a whole file."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in ("images", "real") if name in archive.files}
    except (FileNotFoundError, zipfile.BadZipFile, EOFError, ValueError):     # not there, or cut off by a kill
        return {}


def contact_sheet(images: np.ndarray, columns: int = 8, limit: int = 64) -> Image.Image:
    """Up to ``limit`` uint8 images [n, H, W, 3] as one picture, small ones enlarged by whole pixels to about 96."""
    from PIL import Image

    count, height, width = min(len(images), limit), images.shape[1], images.shape[2]
    scale, gap, columns = max(1, 96 // max(height, width)), 4, min(columns, count)
    step_y, step_x = height * scale + gap, width * scale + gap
    sheet = np.full((gap + step_y * math.ceil(count / columns), gap + step_x * columns, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images[:count]):
        top, left = gap + step_y * (index // columns), gap + step_x * (index % columns)
        sheet[top:top + height * scale, left:left + width * scale] = image.repeat(scale, axis=0).repeat(scale, axis=1)
    return Image.fromarray(sheet)
