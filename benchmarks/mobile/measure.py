"""What ``benchmarks.mobile`` measures: memory, caps, latency, and quality after 8-bit weights. Each row is one file."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil

from benchmarks.mobile.plan import RESIDENT, Plan, Setup
from eval.export import PARTS, RUNTIMES
from eval.speed.caps import CAPS_MB, caps_held
from eval.speed.latency import LatencyResult, Timed, interleave
from eval.speed.memory import RUNS
from eval.speed.parts import repeat_for
from eval.speed.workers import STEADY_HEAP, Loader, Worker
from iris.io.machine import processor_name

TIMEOUT = 1200.0  # seconds of one request
WARMUP = 1  # rounds
QUALITY = {"steps": 6, "guidance": 2.5}  # of the shipped model, iterations as trained
BATCH, BLOCKS, SEED = 50, 20, 321
LIBRARIES = ("torch", "onnxruntime", "executorch", "numpy")


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were made on."""
    return {
        "processor": processor_name(),
        "processors": os.cpu_count(),
        "memory_gb": psutil.virtual_memory().total / 1e9,
        "threads": threads,
        "versions": {name: version(name) for name in LIBRARIES},
    }


def memory(plan: Plan) -> None:
    """Peak memory of every setup, whole and by part, and the caps that hold; not affected by other processes."""
    plan.once("machine", lambda: machine(plan.threads))
    for setup in plan.setups():
        plan.once(f"memory-{setup}", lambda setup=setup: memory_row(setup, plan))
        for resident in RESIDENT:
            plan.once(
                f"caps-{resident.replace(' ', '_')}-{setup}",
                lambda setup=setup, resident=resident: caps_row(setup, resident, plan),
            )


def memory_row(setup: Setup, plan: Plan) -> dict[str, Any]:
    """Peaks of fresh processes: everything loaded, one part at a time, and each part alone."""
    threads = plan.threads
    whole = {one: peak(f"{setup} {one}", setup.loader(plan.work, one), threads) for one in RESIDENT}
    parts = {one: peak(f"{setup} {one}", setup.loader(plan.work).given(part=one), threads) for one in PARTS}
    return setup.about() | {"threads": threads, "image": whole, "parts": parts}


def peak(name: str, loader: Loader, threads: int) -> dict[str, float | None]:
    """Resident memory in MB of a process that loads and generates, in whose heap what is freed goes back at once."""
    with Worker(name, loader, threads, TIMEOUT, STEADY_HEAP) as worker:
        found = worker.ask("memory", runs=RUNS) | worker.ask("activations")
        return found | {name: worker.loaded[name] for name in ("import_mb", "loaded_mb", "weights_mb")}


def caps_row(setup: Setup, resident: str, plan: Plan) -> dict[str, Any]:
    """Runs under each cap."""
    found = caps_held(setup.loader(plan.work, resident), CAPS_MB, threads=plan.threads, timeout=TIMEOUT)
    return setup.about() | {"resident": resident, "threads": plan.threads, "caps": [asdict(one) for one in found]}


def latency(plan: Plan) -> None:
    """Time of every setup and of its parts; those of one preset and number of iterations in turn."""
    plan.once("machine", lambda: machine(plan.threads))
    for preset in plan.presets:
        for iterations in plan.iterations:
            setups = [one for one in plan.setups() if (one.preset, one.iterations) == (preset, iterations)]
            name = (
                f"latency-{preset}-{iterations}-{'+'.join(plan.runtimes)}-rounds={plan.rounds}-threads={plan.threads}"
            )
            plan.once(name, lambda setups=setups: latency_rows(setups, plan))


def latency_rows(setups: list[Setup], plan: Plan) -> list[dict[str, Any]]:
    """Each setup's image and parts, there and back; ratios are to the first setup's image or same part."""
    with ExitStack() as stack:
        timed, owner, first = [], [], []
        for setup in setups:
            worker = stack.enter_context(Worker(str(setup), setup.loader(plan.work), plan.threads, TIMEOUT))
            for part in (None, *PARTS):
                first.append(len(timed) % (1 + len(PARTS)))
                timed.append(Timed(worker, part, repeat_for(worker, part)))
                owner.append(setup)
        found = interleave(timed, plan.rounds, WARMUP, plan.threads, first)
    return [
        setup.about() | {"part": one.part or "image"} | timing(result, setups[0])
        for setup, one, result in zip(owner, timed, found, strict=True)
    ]


def timing(result: LatencyResult, first: Setup) -> dict[str, Any]:
    """A result without its single times, and what its ratio is to."""
    return {name: value for name, value in asdict(result).items() if name != "times_ms"} | {
        "ratio_to": f"{first.runtime} {first.dtype}"
    }


def quality(plan: Plan) -> None:
    """Fréchet distance of the shipped model's pictures in ONNX Runtime, in each precision, from equal noise."""
    if "onnx" in plan.runtimes:
        plan.once(f"quality-shapes-{plan.samples}", lambda: quality_rows(plan.work / "shapes", plan.samples))


def quality_rows(folder: Path, samples: int) -> dict[str, Any]:
    """Distance to held-out pictures, and its difference from float32's, each with a jackknife error."""
    from eval.export.host.pipeline import ExportedPipeline, size_of
    from eval.export.host.sampling import Sampling
    from eval.export.model import export_model
    from eval.judges import load_judge
    from eval.metrics.fid import frechet_replicates, jackknife_error
    from eval.stages.features import extract_features

    model = Path(str(files("iris").joinpath("weights/shapes")))
    captions, real = held_out(samples)
    judge = load_judge("shapes")
    reference = extract_features(judge, real)
    pictures, distance, sizes = {}, {}, {}
    for dtype in RUNTIMES["onnx"]:
        about = export_model(model, folder / dtype, "onnx", dtype, batch=BATCH)
        pictures[dtype] = ExportedPipeline(folder / dtype)(captions, Sampling(**QUALITY))
        features = extract_features(judge, pictures[dtype])
        distance[dtype] = frechet_replicates(features.values, reference.statistics, BLOCKS)
        sizes[dtype] = sum(map(size_of, about["parts"].values()))
    whole, without = distance["fp32"]
    rows = [
        {
            "dtype": dtype,
            "fd": value,
            "fd_se": jackknife_error(replicates),
            "change": value - whole,
            "change_se": jackknife_error([one - other for one, other in zip(replicates, without, strict=True)]),
            "pixel_rms": float(((pictures[dtype].astype(float) - pictures["fp32"]) ** 2).mean() ** 0.5),
            "bytes": sizes[dtype],
        }
        for dtype, (value, replicates) in distance.items()
    ]
    return {"model": "shapes", "judge": "shapes", "samples": samples, "blocks": BLOCKS, **QUALITY, "rows": rows}


def held_out(count: int) -> tuple[list[str], Any]:
    """Captions and pictures, uint8 [count, 32, 32, 3], that no training saw."""
    from iris.data import WORLDS

    drawn = WORLDS["shapes"].draw("validation", count, SEED, 0, 32)
    return drawn.captions, drawn.images
