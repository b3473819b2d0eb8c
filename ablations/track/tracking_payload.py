"""What goes into MLflow, worked out without MLflow: params, curves, inputs, summary and pictures as plain values."""

from __future__ import annotations

import getpass
import json
import math
import os
import socket
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ablations.answer.records import GridOutcome
from ablations.track.curves import metric_name

if TYPE_CHECKING:
    from PIL import Image

    from ablations.track.journal import PlannedTrial

DIGEST_LENGTH = 36  # MLflow's limit for a dataset digest
SUMMARY = ("fid", "clip_score", "accuracy_caption", "latency_ratio", "peak_memory_mb", "params_m")


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


def data_inputs(outcome: GridOutcome) -> list[tuple[str, dict[str, str]]]:
    """What a grid's trials read, as (context, arguments of mlflow.entities.Dataset): the data's splits, and the judge.

    A split has a name of its own: MLflow takes one input of a name and digest to a run.
    """
    found = []
    for context in ("train", "validation", *(["heldout"] if outcome.data.get("heldout") else [])):
        if outcome.data.get("name"):
            fields = dataset_fields(outcome.data, "fingerprint")
            found.append((context, fields | {"name": f"{fields['name']}/{context}"}))
    if outcome.judge.get("name"):
        found.append(("judge", dataset_fields(outcome.judge, "sha256")))
    return found


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


def common_tags(header: GridOutcome) -> dict[str, str]:
    """Tags of a grid's run and of its trials': what it is about, and who runs it."""
    return {
        "grid": header.name,
        "judge": str(header.judge.get("name", "none")),
        "judge_sha256": str(header.judge.get("sha256", "")),
        "data": str(header.data.get("name", "")),
        "data_fingerprint": str(header.data.get("fingerprint", "")),
        "git_commit": header.commit,
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "mlflow.user": _user(),
        "mlflow.source.name": "ablations.run",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": header.commit.removesuffix("+changes"),
    }


def grid_tags(header: GridOutcome, key: str) -> dict[str, str]:
    """Tags of a grid's run, by which it is found again."""
    tags = {
        "kind": "grid",
        "grid_key": key,
        "question": header.question,
        "claim": header.claim,
        "command": header.command,
        "mlflow.note.content": parent_note(header),
    }
    return common_tags(header) | tags | {f"hardware.{name}": str(value) for name, value in header.hardware.items()}


def trial_tags(header: GridOutcome, trial: PlannedTrial, parent_id: str) -> dict[str, str]:
    """Tags of a trial's run, by which it is found again."""
    return common_tags(header) | {
        "kind": "trial",
        "key": trial.key,
        "arm": trial.arm,
        "seed": str(trial.seed),
        "baseline": str(trial.baseline).lower(),
        "mlflow.parentRunId": parent_id,
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
    except (FileNotFoundError, zipfile.BadZipFile, EOFError, ValueError):  # not there, or cut off by a kill
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
        sheet[top : top + height * scale, left : left + width * scale] = image.repeat(scale, axis=0).repeat(
            scale, axis=1
        )
    return Image.fromarray(sheet)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
