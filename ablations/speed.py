"""Speed and memory of a grid's models: after all training, alone on the machine, interleaved, in fresh processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ablations.grid import Trial, digest
from ablations.progress import read_json
from eval.latency import measure_models
from eval.workers import Loader
from iris.training.files import write_json


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
    measured = measure_models({t.key: _loader(t, runs) for t in trials}, rounds, warmup, threads)
    result = {}
    for key, value in measured.items():
        latency, memory = value.latency, value.memory
        result[key] = {
            "latency_ms": latency.median_ms, "latency_q1_ms": latency.q1_ms, "latency_q3_ms": latency.q3_ms,
            "latency_ratio": latency.ratio_to_first,
            **{k: v for k, v in asdict(memory).items() if k in ("peak_memory_mb", "weights_mb", "activations_mb") and v is not None},
            "import_mb": memory.import_mb,
            "contended": "; ".join(latency.reasons) if latency.contended else "",
        }
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, result)
    return result


def _loader(trial: Trial, runs: Path) -> Loader:
    return Loader("iris.pipeline:load_for_measuring", {
        "folder": os.path.abspath(runs / "trials" / trial.key / "model"), **trial.settings["sample"]})
