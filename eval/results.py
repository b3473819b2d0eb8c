"""Results of a measured model: numbers that say how they were made, in a folder that a comparison can read.

A folder holds results.json, per_image.csv (a row an image: caption, CLIP cosine, which skills are right, nearest
training image), report.md, index.html and, if training images were searched, duplicates.html.
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from iris.errors import SettingError
from iris.io.files import write_atomically, write_json
from iris.io.machine import processor_name

FORMAT = 1
RESULTS, PER_IMAGE, REPORT, PAGE, DUPLICATES = (
    "results.json",
    "per_image.csv",
    "report.md",
    "index.html",
    "duplicates.html",
)
FILES = (RESULTS, PER_IMAGE, REPORT, PAGE, DUPLICATES)


@dataclass(frozen=True)
class Number:
    """One number with its uncertainty and its making.

    Attributes:
        value: in ``unit``.
        better: lower, higher, or none, where neither is.
        low, high: of the interval; None where there is none, for the reason that ``uncertainty`` gives.
        standard_error: None where the interval is not made from one.
        confidence: of the interval; None for quartiles.
        uncertainty: how interval and error were made.
        n: images, or timed rounds, that it is of.
        reference_n: real images it was compared with.
        seed: of random choices in the method; None: none were made. ``made_with`` has the seed of the images.
        made_with: judge and its sha256, data, seed of the images, dtype, device, threads, hardware, as far as they bear
            on it.
        flags: why it should not be quoted as it stands.
        replicates: of a jackknife, for paired differences.
    """

    value: float
    unit: str
    better: str
    low: float | None
    high: float | None
    standard_error: float | None
    confidence: float | None
    uncertainty: str
    n: int
    reference_n: int | None = None
    seed: int | None = None
    made_with: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    replicates: tuple[float, ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Number:
        """From plain values, as JSON gives them."""
        given = {"flags": tuple(values["flags"]), "replicates": tuple(values["replicates"])}
        return cls(**{**values, **given})

    def with_facts(self, facts: Mapping[str, Any]) -> Number:
        """The same, made with more."""
        return replace(self, made_with={**self.made_with, **facts})


@dataclass
class Results:
    """All that was measured of one model.

    Attributes:
        name: of the model, for headings.
        model: kind, path, fingerprint, size, parameters, nfe, sampling, dtype, device.
        data: name, split, size, fingerprint.
        judge: name, sha256 and what else its record says.
        numbers: by metric; those from a judge end in its name ("fid/shapes").
        details: by measure, what is no number: tables of skills, parts, caps, targets.
        per_image: rows of per_image.csv: column -> value.
        not_measured: measure -> why it could not be.
        settings: flattened, as composed.
        hardware: what it was measured on.
        seconds: by phase.
        command: that makes it again.
        notes: what a reader should know.
    """

    name: str
    model: dict[str, Any]
    data: dict[str, Any]
    judge: dict[str, Any]
    numbers: dict[str, Number] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    per_image: list[dict[str, Any]] = field(default_factory=list)
    not_measured: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    command: str = ""
    created: str = ""
    notes: list[str] = field(default_factory=list)


def write_results(results: Results, folder: Path) -> None:
    """Write results.json and, if there are rows, per_image.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    if results.per_image:
        write_atomically(folder / PER_IMAGE, _csv(results.per_image).encode())
    values = asdict(results)
    del values["per_image"]
    write_json(folder / RESULTS, _finite({"format": FORMAT, **values}))


def read_results(place: str | os.PathLike[str]) -> Results:
    """What ``write_results`` wrote: a folder, or its results.json.

    Raises:
        SettingError: no results there, or of another format.
    """
    path = Path(place).expanduser()
    path = path / RESULTS if path.is_dir() else path
    if not path.is_file():
        raise SettingError(f"{place}: no results there; expected a folder with {RESULTS}, or that file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError("another format")
        numbers = {name: Number.of(number) for name, number in values.pop("numbers").items()}
        results = Results(numbers=numbers, **values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingError(f"{path}: not the results of python -m eval ({error!r})") from error
    rows = path.with_name(PER_IMAGE)
    if rows.is_file():
        with open(rows, newline="", encoding="utf-8") as file:
            results.per_image = list(csv.DictReader(file))
    return results


def hardware() -> dict[str, Any]:
    """What this process computes on."""
    gpu = {"gpu": torch.cuda.get_device_name(0)} if torch.cuda.is_available() else {}
    memory = round(psutil.virtual_memory().total / 1e9, 1)
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "memory_gb": memory,
        **gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _csv(rows: list[dict[str, Any]]) -> str:
    import io

    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _finite(value: Any) -> Any:
    """Infinite and undefined numbers as None: JSON has none."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
