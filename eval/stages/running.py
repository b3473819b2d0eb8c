"""The measures that are taken on a model that runs: latency and memory by part, hard caps, phone targets.

They are of this machine now, so no result is taken from an earlier command.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.results import Number
from eval.settings import Measure
from eval.speed.caps import CapResult, caps_held, proven
from eval.speed.latency import LatencyResult
from eval.speed.memory import PartMemory, measure_memory, measure_memory_by_part
from eval.speed.parts import PartsLatency, measure_parts
from eval.stages.scores import Scores
from eval.subjects import Subject
from eval.targets import check

QUARTILES = "quartiles of {n} rounds, whole and parts in turn, in a process of its own"
RESIDENT = "one fresh process; it holds torch and the other libraries too"
EXACT = "exact: bytes of live tensors, the same on every machine"


def latency(subject: Subject, measure: Measure, caption: str) -> Scores:
    """Milliseconds of an image and of each part, at each batch size."""
    chosen, scores = measure.latency, Scores()
    found = measure_parts(
        subject.loader(caption, True), chosen.batches, chosen.rounds, chosen.warmup, measure.threads, measure.timeout
    )
    for batch, result in found.items():
        name, facts = f"latency_ms/batch_{batch}", {"threads": measure.threads, "batch": batch}
        scores.numbers[name] = _milliseconds(result.whole).with_facts(facts)
        for part, one in result.parts.items():
            known = facts | {"runs": one.count, "within": one.within}
            scores.numbers[f"{name}/{part}"] = _milliseconds(one.latency).with_facts(known)
    scores.details["latency"] = {str(batch): _parts(result) for batch, result in found.items()}
    return scores


def _milliseconds(one: LatencyResult) -> Number:
    how = QUARTILES.format(n=one.n)
    return Number(one.median_ms, "ms", "lower", one.q1_ms, one.q3_ms, None, None, how, one.n, flags=one.reasons)


def _parts(result: PartsLatency) -> dict[str, Any]:
    values = asdict(result) | {"sum_ms": result.sum_ms, "covered": result.covered}
    for one in (values["whole"], *(part["latency"] for part in values["parts"].values())):
        del one["times_ms"]
    return values


def memory(subject: Subject, measure: Measure, caption: str) -> Scores:
    """Megabytes of the whole and of each part, in fresh processes."""
    scores, loader = Scores(), subject.loader(caption)
    if subject.loads_parts:
        found = measure_memory_by_part(loader, measure.threads, measure.timeout)
    else:
        found = {"whole": PartMemory(measure_memory(loader, subject.name, measure.threads, measure.timeout), None)}
    for part, one in found.items():
        suffix = "" if part == "whole" else f"/{part}"
        for name, how in (("peak_memory_mb", RESIDENT), ("weights_mb", EXACT), ("activations_mb", EXACT)):
            value = getattr(one.memory, name)
            if value is not None:
                number = Number(value, "MB", "lower", None, None, None, None, how, 1)
                scores.numbers[f"{name}{suffix}"] = number.with_facts({"threads": measure.threads, "batch": 1})
    scores.details["memory"] = {
        part: asdict(one) | {"weights_ratio": one.weights_ratio, "activations_ratio": one.activations_ratio}
        for part, one in found.items()
    }
    return scores


def caps(subject: Subject, measure: Measure, caption: str) -> Scores:
    """Which hard caps on memory an image can be made under."""
    chosen = measure.caps
    found = caps_held(
        subject.loader(caption),
        chosen.megabytes,
        chosen.method,
        measure.threads,
        measure.timeout,
        group=None if chosen.group is None else Path(chosen.group),
    )
    return Scores(details={"caps": {"proven": proven(found), "runs": [asdict(one) for one in found]}})


RUNNING = {"latency": latency, "memory": memory, "caps": caps}


def targets(numbers: Mapping[str, Number], details: dict[str, Any], nfe: float | None, dtype: str | None) -> None:
    """Hold what was measured against the phone targets, in ``details``; nothing if none of it was."""
    if not RUNNING.keys() & details.keys():
        return
    wanted = {"weights_mb": "weights_mb", "activations_mb": "activations_mb", "latency_ms": "latency_ms/batch_1"}
    values = {name: numbers[key].value if key in numbers else None for name, key in wanted.items()}
    held = [CapResult(**one) for one in details.get("caps", {}).get("runs", [])]
    details["targets"] = [asdict(one) for one in check(values | {"nfe": nfe}, dtype, held)]
