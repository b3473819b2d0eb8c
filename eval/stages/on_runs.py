"""The measures that are taken on a model that runs: latency and memory by part, hard caps, phone targets."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.stages.results import Number
from eval.speed.caps import CapResult, caps_held, proven
from eval.speed.latency import LatencyResult
from eval.speed.memory import PartMemory, measure_memory, measure_memory_by_part
from eval.speed.parts import PartsLatency, measure_parts
from eval.speed.workers import Loader
from eval.stages.evaluation import Evaluation, waiting
from eval.targets import check

QUARTILES = "quartiles of {n} rounds, whole and parts in turn, in a process of its own"
RESIDENT = "one fresh process; it holds torch and the other libraries too"
EXACT = "exact: bytes of live tensors, the same on every machine"


def latency(run: Evaluation) -> None:
    """Milliseconds of an image and of each part, at each batch size."""
    chosen = run.settings.measure
    with waiting(run.progress, "latency"):
        found = measure_parts(
            _loader(run, parts=True),
            chosen.latency.batches,
            chosen.latency.rounds,
            chosen.latency.warmup,
            chosen.threads,
            chosen.timeout,
        )
    for batch, result in found.items():
        name, facts = f"latency_ms/batch_{batch}", {"threads": chosen.threads, "batch": batch}
        run.add(name, _milliseconds(result.whole), **facts)
        for part, one in result.parts.items():
            run.add(f"{name}/{part}", _milliseconds(one.latency), **facts, runs=one.count, within=one.within)
    run.results.details["latency"] = {str(batch): _parts(result) for batch, result in found.items()}


def _milliseconds(one: LatencyResult) -> Number:
    return Number(
        one.median_ms,
        "ms",
        "lower",
        one.q1_ms,
        one.q3_ms,
        None,
        None,
        QUARTILES.format(n=one.n),
        one.n,
        flags=one.reasons,
    )


def _parts(result: PartsLatency) -> dict[str, Any]:
    values = asdict(result) | {"sum_ms": result.sum_ms, "covered": result.covered}
    for one in (values["whole"], *(part["latency"] for part in values["parts"].values())):
        del one["times_ms"]
    return values


def memory(run: Evaluation) -> None:
    """Megabytes of the whole and of each part, in fresh processes."""
    chosen, loader = run.settings.measure, _loader(run)
    with waiting(run.progress, "memory"):
        if run.subject.loads_parts:
            found = measure_memory_by_part(loader, chosen.threads, chosen.timeout)
        else:
            whole = measure_memory(loader, run.results.name, chosen.threads, chosen.timeout)
            found = {"whole": PartMemory(whole, None)}
    for part, one in found.items():
        suffix = "" if part == "whole" else f"/{part}"
        for name, how in (("peak_memory_mb", RESIDENT), ("weights_mb", EXACT), ("activations_mb", EXACT)):
            value = getattr(one.memory, name)
            if value is not None:
                run.add(
                    f"{name}{suffix}",
                    Number(value, "MB", "lower", None, None, None, None, how, 1),
                    threads=chosen.threads,
                    batch=1,
                )
    run.results.details["memory"] = {
        part: asdict(one) | {"weights_ratio": one.weights_ratio, "activations_ratio": one.activations_ratio}
        for part, one in found.items()
    }


def caps(run: Evaluation) -> None:
    """Which hard caps on memory an image can be made under."""
    chosen = run.settings.measure
    with waiting(run.progress, "hard caps"):
        found = caps_held(
            _loader(run),
            chosen.caps.megabytes,
            chosen.caps.method,
            chosen.threads,
            chosen.timeout,
            group=None if chosen.caps.group is None else Path(chosen.caps.group),
        )
    run.results.details["caps"] = {"proven": proven(found), "runs": [asdict(one) for one in found]}


def targets(run: Evaluation) -> None:
    """What was measured, held against the phone targets; nothing if none of it was."""
    numbers, details = run.results.numbers, run.results.details
    if not {"latency", "memory", "caps"} & set(details):
        return
    wanted = {"weights_mb": "weights_mb", "activations_mb": "activations_mb", "latency_ms": "latency_ms/batch_1"}
    values = {name: numbers[key].value if key in numbers else None for name, key in wanted.items()}
    held = [CapResult(**one) for one in details.get("caps", {}).get("runs", [])]
    nfe = run.results.model.get("nfe") or run.subject.facts().get("nfe")
    found = check(values | {"nfe": nfe}, run.subject.dtype, held)
    details["targets"] = [asdict(one) for one in found]


def _loader(run: Evaluation, parts: bool = False) -> Loader:
    caption = (run.captions or [""])[0]
    return run.subject.loader(caption, parts)
