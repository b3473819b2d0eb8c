"""The rows that ``benchmarks.mobile`` measured, read back, and as results.csv."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.mobile.plan import PRESETS, RESIDENT, STEPS, Setup
from eval.export import PIPELINE
from eval.speed.latency import SPREAD

HOLDS, FAILS, NOT_MEASURED = "holds", "fails", "not measured"


@dataclass
class Rows:
    """Everything measured; what was not is absent.

    Attributes:
        memory: of each key: {"image": {resident: figures}, "parts": {part: figures}}.
        caps: of each (key, resident): runs under caps, as ``eval.speed.caps.CapResult``'s fields.
        latency: of each (key, part), "image" among the parts: ``eval.speed.latency.LatencyResult``'s fields; of several
            measurements the one of most rounds.
        agreement: of each key: how far an image is from PyTorch's.
        files: entries of the parts in the pipeline.json of each folder, with "preset", "runtime", "dtype", "part" and
            "iterations" (None: it serves any number).
        mixers, coreml: of each case, a row.
        quality: of the shipped model.
        machine: what all was made on.
    """

    memory: dict[Setup, dict[str, Any]] = field(default_factory=dict)
    caps: dict[tuple[Setup, str], list[dict[str, Any]]] = field(default_factory=dict)
    latency: dict[tuple[Setup, str], dict[str, Any]] = field(default_factory=dict)
    agreement: dict[Setup, dict[str, Any]] = field(default_factory=dict)
    files: list[dict[str, Any]] = field(default_factory=list)
    mixers: list[dict[str, Any]] = field(default_factory=list)
    coreml: list[dict[str, Any]] = field(default_factory=list)
    quality: dict[str, Any] | None = None
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> list[Setup]:
        """All that anything was measured of."""
        return sorted({*self.memory, *(key for key, _ in self.caps), *(key for key, _ in self.latency)})


def read_rows(work: Path) -> Rows:
    """What lies in a work folder.

    Raises:
        FileNotFoundError: there are no rows in it.
    """
    rows = Rows()
    paths = sorted((work / "rows").glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"{work / 'rows'} has no rows: run the other phases first")
    for path in paths:
        kind, value = path.stem.partition("-")[0], json.loads(path.read_text())
        if kind == "memory":
            rows.memory[Setup.of(value)] = value
        elif kind == "caps":
            rows.caps[Setup.of(value), value["resident"]] = value["caps"]
        elif kind == "latency":
            for one in value:
                known = rows.latency.get((Setup.of(one), one["part"]), one)
                rows.latency[Setup.of(one), one["part"]] = max(one, known, key=lambda row: row["n"])
        elif kind == "agreement":
            rows.agreement[Setup.of(value)] = value
        elif kind in ("mixer", "coreml"):
            (rows.mixers if kind == "mixer" else rows.coreml).append(value)
        elif kind == "quality":
            rows.quality = max(value, rows.quality or value, key=lambda row: row["samples"])
        elif kind == "machine":
            rows.machine = value
    rows.files = list(_files(work))
    return rows


def _files(work: Path) -> Iterator[dict[str, Any]]:
    """Of every preset; other models in the folder are none."""
    for path in sorted(path for preset in PRESETS for path in (work / preset).glob(f"*/{PIPELINE}")):
        about = json.loads(path.read_text())
        setup = {"preset": path.parent.parent.name, "runtime": about["runtime"], "dtype": about["dtype"]}
        for part, entry in about["parts"].items():
            fixed = about["runtime"] == "onnx" and part == "generator"
            yield entry | setup | {"part": part, "iterations": about["iterations"] if fixed else None}


def result_rows(rows: Rows) -> list[dict[str, Any]]:
    """A row for each run under a cap, and one for each part."""
    table = []
    for key in rows.keys:
        for resident in RESIDENT:
            runs = [one for one in rows.caps.get((key, resident), []) if one["scope"] != "control"]
            for run in runs or ([None] if key in rows.memory or (key, "image") in rows.latency else []):
                table.append(_row(rows, key, "image", resident, run))
        table += [_row(rows, key, part, "alone", None) for part in rows.memory.get(key, {}).get("parts", {})]
    return table


def _row(rows: Rows, key: Setup, part: str, resident: str, run: dict[str, Any] | None) -> dict[str, Any]:
    measured = rows.memory.get(key, {})
    memory = measured.get("image", {}).get(resident, {}) if part == "image" else measured.get("parts", {}).get(part, {})
    # what is loaded for its turn would be timed with its loading
    latency = rows.latency.get((key, part), {}) if resident != "one part" else {}
    verdict = "" if part != "image" else NOT_MEASURED if run is None else HOLDS if run["held"] else FAILS
    agreement = rows.agreement.get(key, {}) if part == "image" else {}
    return {
        "preset": key.preset,
        "runtime": key.runtime,
        "dtype": key.dtype,
        "steps": STEPS,
        "iterations": key.iterations,
        "latency_ms": latency.get("median_ms"),
        "peak_memory_mb": memory.get("peak_memory_mb"),
        "cap": run and run["cap_mb"],
        "verdict": verdict,
        "part": part,
        "resident": resident,
        "scope": run and run["scope"],
        "n": latency.get("n"),
        "q1_ms": latency.get("q1_ms"),
        "q3_ms": latency.get("q3_ms"),
        "ratio_to_pytorch": ratio_to_pytorch(latency),
        "threads": latency.get("threads", measured.get("threads")),
        "contended": latency.get("contended"),
        "import_mb": memory.get("import_mb"),
        "weights_mb": memory.get("weights_mb"),
        "activations_mb": memory.get("activations_mb"),
        "agreement_rms": agreement.get("rms"),
    }


def ratio_to_pytorch(latency: dict[str, Any]) -> float | None:
    """A latency over PyTorch's in the same rounds; None where PyTorch was not timed beside it."""
    return latency["ratio_to_first"] if latency.get("ratio_to", "").startswith("pytorch") else None


def write_csv(rows: Rows, path: Path) -> None:
    """results.csv: five significant digits, nothing where nothing was measured."""
    table = result_rows(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]) if table else [], lineterminator="\n")
        writer.writeheader()
        for row in table:
            writer.writerow({name: _text(value) for name, value in row.items()})


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def smallest_cap(rows: Rows, key: Setup, resident: str, scope: str = "process") -> float | None:
    """The smallest cap in MB under which an image was made, None where none was or none was tried."""
    held = [one["cap_mb"] for one in rows.caps.get((key, resident), []) if one["scope"] == scope and one["held"]]
    return min(held) if held else None


def quiet(rows: Rows) -> str:
    """What else the machine did while latencies were taken, and how many of them spread; nothing without latencies."""
    loads = sorted({why for one in rows.latency.values() for why in one["reasons"] if "interquartile" not in why})
    spread = sum(any("interquartile" in why for why in one["reasons"]) for one in rows.latency.values())
    words = ["; ".join(loads) or "no other load seen"]
    words += [f"{spread} of {len(rows.latency)} rows spread by more than {100 * SPREAD:g} % (*)"] if spread else []
    return "; ".join(words) if rows.latency else ""


def without_iterations(rows: Rows) -> list[Setup]:
    """One key for each preset, runtime and precision."""
    found = {(key.preset, key.runtime, key.dtype): key for key in reversed(rows.keys)}
    return sorted(found.values())
