"""A grid's outcome with folders as its trials and trainings leave them, made up from a seed: for tests of what reads them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ablations.answer.records import GridOutcome, TrialRecord

COLOURS = {
    "red": (214, 52, 50),
    "green": (52, 158, 84),
    "blue": (48, 96, 206),
    "yellow": (238, 200, 60),
    "purple": (136, 74, 176),
    "orange": (236, 134, 46),
}
SHAPES = ("circle", "square", "triangle", "diamond", "ring")
PLACES = {
    "top left": (0.3, 0.3),
    "top right": (0.3, 0.7),
    "bottom left": (0.7, 0.3),
    "bottom right": (0.7, 0.7),
    "centre": (0.5, 0.5),
}
GROUNDS = {"grey": (128, 128, 128), "white": (240, 240, 240), "black": (24, 24, 24)}
# arm -> (fid, clip score, accuracy level, latency ratio, parameters in M): made up, near what such networks give
ARMS = {
    "grfm": (21.4, 31.9, 0.93, 1.0, 1.31),
    "attention": (20.1, 32.2, 0.95, 1.42, 1.30),
    "fourier": (28.7, 30.6, 0.86, 0.63, 1.31),
    "recurrence": (25.2, 31.1, 0.89, 0.81, 1.30),
    "spatial": (31.8, 29.8, 0.81, 0.55, 1.31),
}
ATTRIBUTES = {"colour": 1.03, "shape": 0.88, "size": 0.97, "position": 1.01, "background": 1.05, "all": 0.74}


def draw(count: int, size: int = 32, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Pictures [count, size, size, 3] uint8 of one object, and their captions."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / (size - 1)
    pictures, captions = np.empty((count, size, size, 3), np.uint8), []
    for i in range(count):
        colour, shape, place, ground = (
            str(generator.choice(list(names))) for names in (COLOURS, SHAPES, PLACES, GROUNDS)
        )
        large = bool(generator.integers(2))
        radius = 0.24 if large else 0.14
        dy, dx = y - PLACES[place][0], x - PLACES[place][1]
        distance = np.hypot(dy, dx)
        mask = {
            "circle": distance < radius,
            "square": np.maximum(abs(dx), abs(dy)) < 0.85 * radius,
            "triangle": (dy < 0.8 * radius) & (abs(dx) < (dy + radius) / 1.8),
            "diamond": abs(dx) + abs(dy) < radius,
            "ring": (distance < radius) & (distance > 0.55 * radius),
        }[shape]
        pictures[i] = np.where(mask[..., None], COLOURS[colour], GROUNDS[ground])
        captions.append(f"a {'large' if large else 'small'} {colour} {shape} at the {place} on a {ground} background")
    return pictures, captions


def curve(steps: int, floor: float, generator: np.random.Generator, last: int | None = None) -> list[dict[str, float]]:
    """Lines of a metrics.jsonl, every tenth step."""
    lines = []
    for step in range(10, (last or steps) + 1, 10):
        loss = floor + 1.6 * math.exp(-step / 60) + 0.35 * math.exp(-step / (0.45 * steps)) + generator.normal(0, 0.03)
        lines.append(
            {
                "step": step,
                "time": 1.7e9 + step / 9,
                "loss": round(loss, 5),
                "lr": 1e-3,
                "grad_norm": 0.8,
                "images_per_s": 610.0,
                "system/cpu_percent": 180.0,
                "system/rss_mb": 820.0,
            }
        )
    return lines


def gates(iterations: int, layers: int = 2) -> dict[str, Any]:
    """What a gated mixer leaves in gates.json."""
    return {
        "layers": [
            {
                "layer": layer,
                "iterations": [
                    {
                        "iteration": i,
                        "fourier": 0.62 - 0.07 * i + 0.05 * layer,
                        "recurrence": 0.31 + 0.06 * i,
                        "spatial": 0.4 - 0.02 * i * layer,
                        "std": 0.08,
                    }
                    for i in range(1, iterations + 1)
                ],
            }
            for layer in range(layers)
        ]
    }


def measures(
    arm: tuple[float, float, float, float, float], seed: int, index: int, generator: np.random.Generator
) -> dict[str, float]:
    """All metrics of one trial; other seeds move FID by 2 %, as retraining does."""
    fid, clip, level, ratio, params = arm
    fid *= math.exp(generator.normal(0, 0.02))
    level = float(np.clip(level + generator.normal(0, 0.006), 0, 1))
    values = {
        "fid": fid,
        "fid_se": 0.018 * fid,
        "fid_reference": 2.31,
        "kid": 0.9 * fid - 12,
        "kid_se": 0.6,
        "clip_score": clip + generator.normal(0, 0.1),
        "clip_score_se": 0.09,
        "samples": 2048.0,
        "params_m": params,
        "gflops": 0.21 * ratio**0.5,
        "latency_ms": 38.2 * ratio,
        "latency_q1_ms": 37.1 * ratio,
        "latency_q3_ms": 40.3 * ratio,
        "latency_ratio": ratio,
        "latency_ratio_low": 0.97 * ratio,
        "latency_ratio_high": 1.04 * ratio,
        "peak_memory_mb": 548.0 + 9 * index,
        "weights_mb": 4 * params,
        "activations_mb": 6.2 * ratio,
        "nfe": 8.0,
        "validation_loss": 0.12 + fid / 400,
        "train_seconds": 150 * ratio,
    }
    for name, factor in ATTRIBUTES.items():
        values[f"accuracy_{name}"] = min(0.995, level * factor)
        values[f"heldout_accuracy_{name}"] = min(0.99, level * factor * 0.86)
    return values


def _samples(
    folder: Path, pictures: np.ndarray, captions: list[str], blur: float, generator: np.random.Generator
) -> None:
    soft = pictures.astype(float)
    for _ in range(round(4 * blur)):
        soft = (soft + np.roll(soft, 1, 1) + np.roll(soft, -1, 1) + np.roll(soft, 1, 2) + np.roll(soft, -1, 2)) / 5
    noisy = np.clip(soft + generator.normal(0, 30 * blur, soft.shape), 0, 255).astype(np.uint8)
    np.savez_compressed(folder / "samples.npz", images=noisy, captions=np.array(captions), real=pictures)


def _error(cause: str) -> dict[str, str]:
    message = {"oom": "the trial used more than 2,000 MB and was ended", "nan": "loss is not finite at step 240"}.get(
        cause, "it broke"
    )
    trace = "\n".join(
        [
            "Traceback (most recent call last):",
            f'  File "{Path.cwd()}/ablations/session/work.py", line 88, in run_trial',
            "    stage.make()",
            f'  File "{Path.cwd()}/iris/training/loop.py", line 131, in train',
            "    raise TrainingError(message)",
            f"iris.errors.TrainingError: {message}",
        ]
    )
    return {"cause": cause, "message": message, "traceback": trace, "log": "runs/logs/0.log"}


def _trial(
    folder: Path,
    arm: str,
    values: dict[str, Any],
    seed: int,
    index: int,
    baseline: str,
    cause: str | None,
    steps: int,
    size: int,
) -> TrialRecord:
    generator = np.random.default_rng([index, seed])
    key = f"{0x51F3A9B1C * (index + 1) + 7919 * seed:012x}"[-12:]
    trial = folder / "trials" / key
    trial.mkdir(parents=True)
    mixer = re.sub(r".*mixer=(\w+).*", r"\1", arm)
    numbers = ARMS.get(mixer, (24.0 + index, 31.0, 0.88, 0.6 + 0.05 * index, 1.3))
    depth = int(values.get("model.iterations", 4))
    numbers = (numbers[0] * (1 + 0.3 / depth), *numbers[1:3], numbers[3] * depth / 4, numbers[4])
    settings = {
        "seed": seed,
        "model": {"mixer": mixer, "dim": 128, "iterations": depth},
        "train": {"steps": steps, "batch": 64},
        "sample": {"steps": 4, "guidance": 2.0},
        "data": {"name": "shapes"},
        "judge": {"name": "shapes"},
    }
    lines = curve(steps, 0.3 + numbers[0] / 300, generator, 240 if cause else None)
    (trial / "settings.json").write_text(json.dumps(settings))
    flow = f"stages/text-{key}"
    (folder / flow).mkdir(parents=True)
    (folder / flow / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common: dict[str, Any] = {
        "key": key,
        "arm": arm,
        "values": values,
        "seed": seed,
        "baseline": arm == baseline,
        "settings": settings,
        "folder": trial,
        "curves": (f"{flow}/metrics.jsonl",),
        "model": f"{flow}/weights",
        "matched": None
        if arm == baseline
        else f"model.width {128 + 8 * index} (params {numbers[4]:.2f} M, {0.1 * index:.1f}% off)",
    }
    if cause:
        error = _error(cause)
        (trial / "error.json").write_text(json.dumps(error))
        return TrialRecord(state="failed", cached=False, metrics={}, error=error, **common)
    pictures, captions = draw(64, size)
    _samples(trial, pictures, captions, (numbers[0] - 16) / 22, generator)
    if mixer == "grfm":
        (trial / "gates.json").write_text(json.dumps(gates(depth)))
    metrics = measures(numbers, seed, index, generator)
    seconds = {"train": metrics["train_seconds"], "images": 11.0, "measures": 6.0}
    environment = {"torch": "2.11.0", "threads": 2, "cpu": "a processor", "host": "here"}
    (trial / "result.json").write_text(
        json.dumps({"key": key, "metrics": metrics, "seconds": seconds, "environment": environment, "steps": steps})
    )
    return TrialRecord(
        state="done", cached=seed == 1, metrics=metrics, seconds=seconds, environment=environment, **common
    )


def build_outcome(
    folder: Path,
    seeds: Sequence[int] = (0,),
    axes: dict[str, list[Any]] | None = None,
    failed: dict[str, str] | None = None,
    missing: Sequence[str] = (),
    steps: int = 1500,
    size: int = 32,
) -> GridOutcome:
    """Writes trial folders under ``folder``/trials, their curves under ``folder``/stages, and returns their outcome.

    ``axes``: as in a grid file, default the five mixers (two axes: arms named like "mixer=grfm iterations=8", the first
    one the baseline); ``failed``: arm -> cause; ``missing``: metrics that no trial but the baseline has.
    """
    axes = axes or {"model.mixer": list(ARMS)}
    cells: list[dict[str, Any]] = [{}]
    for axis, choices in axes.items():
        cells = [cell | {axis: choice} for cell in cells for choice in choices]
    single = len(axes) == 1
    names = [
        str(next(iter(c.values()))) if single else " ".join(f"{a.split('.')[-1]}={v}" for a, v in c.items())
        for c in cells
    ]
    records = [
        _trial(folder, arm, cell, seed, index, names[0], (failed or {}).get(arm), steps, size)
        for index, (arm, cell) in enumerate(zip(names, cells, strict=True))
        for seed in seeds
    ]
    for record in records:
        for name in missing:
            if not record.baseline:
                record.metrics.pop(name, None)
    return GridOutcome(
        name="mixers",
        question="Does GRFM earn its three pathways?",
        claim="GRFM matches attention's quality at lower cost; each pathway contributes",
        match="params",
        decide={"metric": "fid", "better": "lower", "practical": 0.05},
        axes=axes,
        records=records,
        judge={"name": "shapes", "sha256": "9f2c" * 16, "retrieval_at_1": 0.981},
        data={"name": "shapes", "fingerprint": "c41d7e90ab12", "train": 50000, "validation": 4096},
        command="python -m ablations.run grid=mixers",
        commit="3f9a1c2d8b7e",
        wall_seconds=1043.0,
        hardware={"cpu": "a processor", "cores": 2, "threads": 2, "memory_gb": 8, "device": "cpu", "torch": "2.11.0"},
        notes=["latency of spatial was measured while another process used 12% of a core"],
    )
