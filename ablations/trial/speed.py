"""Speed and memory of a grid's models: after all training, alone on the machine, interleaved, in fresh processes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ablations.question.grid import Trial
from ablations.trial.stages import locked
from eval.speed.latency import SpeedAndMemory, measure_models
from eval.speed.workers import Loader
from iris.io.files import read_json, write_json
from iris.io.hashing import digest

TOGETHER = 8  # models loaded at once


def measure_speed(trials: Sequence[Trial], runs: Path, threads: int, machine: str) -> dict[str, dict[str, Any]]:
    """Latency and memory of each trial's saved model: {trial key: metrics and "contended"}.

    The first trial is the one that ratios are taken to. One seed of an arm stands for all: speed does not depend on the
    weights' values. Results are kept by models, machine and settings, so that an unchanged grid is not measured again.

    Raises:
        WorkerError: a model could not be loaded or run.
    """
    measure = trials[0].settings["measure"]
    rounds, warmup = measure["latency_rounds"], measure["latency_warmup"]
    kept = runs / "speed" / f"{digest([[t.key for t in trials], rounds, warmup, threads, machine])}.json"
    cached = read_json(kept)
    if cached is not None:
        return cached
    with locked(kept.parent):  # two grids that measure at once would disturb each other
        cached = read_json(kept)
        if cached is None:
            cached = measure_loaders(loaders_of(trials, runs), rounds, warmup, threads)
            write_json(kept, cached)
    return cached


def measure_loaders(
    loaders: Mapping[str, Mapping[str, Any]], rounds: int, warmup: int, threads: int
) -> dict[str, dict[str, Any]]:
    """Latency and memory by key, of models given as ``loaders_of`` gives them, a few at a time beside the first.

    Models that are compared stay loaded together, so many are measured in groups, each with the first model in it.
    """
    first, *others = loaders
    result: dict[str, dict[str, Any]] = {}
    for start in range(0, max(1, len(others)), TOGETHER - 1):
        group = [first, *others[start : start + TOGETHER - 1]]
        measured = measure_models({key: Loader(**loaders[key]) for key in group}, rounds, warmup, threads)
        result = {key: _figures(value) for key, value in measured.items()} | result
    return result


def loaders_of(trials: Sequence[Trial], runs: Path) -> dict[str, dict[str, Any]]:
    """How a process gets each trial's saved model: {key: the arguments of a ``Loader``}."""
    return {
        trial.key: {
            "function": "eval.models.loading:load_for_measuring",
            "argument": {"folder": os.path.abspath(runs / "trials" / trial.key / "model"), **trial.settings["sample"]},
        }
        for trial in trials
    }


def _figures(value: SpeedAndMemory) -> dict[str, Any]:
    latency, memory = value.latency, value.memory
    return {
        "latency_ms": latency.median_ms,
        "latency_q1_ms": latency.q1_ms,
        "latency_q3_ms": latency.q3_ms,
        "latency_ratio": latency.ratio_to_first,
        **{
            k: v
            for k, v in asdict(memory).items()
            if k in ("peak_memory_mb", "weights_mb", "activations_mb") and v is not None
        },
        "import_mb": memory.import_mb,
        "contended": "; ".join(latency.reasons) if latency.contended else "",
    }
