"""The files that ``benchmarks.mobile`` measures, and how far what they compute is from PyTorch."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.mobile import DTYPES, STEPS, Plan, Setup
from eval.export.parts import ExportPart, parts_of
from eval.export.passes import generator_in_passes
from eval.models.sources import Drawn
from iris.io.files import write_json
from iris.nn.mixers import MIXERS, build_mixer
from iris.pipeline import IrisPipeline
from iris.randomness import addressed, initialise

SHARED = ("text", "decoder")  # the same in every preset
CAPTION = "a large red circle in the centre on a white background"
MIXER_DIM, MIXER_HEADS = 64, 4
MIXER_CASES = ((16, "fp32"), (32, "fp32"), (16, "fp16"), (16, "int8"))  # side of the grid, precision

Writer = Callable[[Mapping[str, ExportPart], Path, str], Any]


def rows_folder(plan: Plan) -> Path:
    """Where each measurement is one JSON file."""
    folder = plan.work / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def once(plan: Plan, name: str, make: Callable[[], Any]) -> None:
    """Write what ``make`` gives as row ``name``, unless it is there."""
    path = rows_folder(plan) / f"{name}.json"
    if path.exists():
        return
    started = time.perf_counter()
    write_json(path, make())
    print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


def drawn(preset: str) -> IrisPipeline:
    """A preset behind a text encoder of CLIP's shape, every weight drawn.

    Generators start with an output of zero, which would agree with anything: all weights are moved off their start.
    """
    torch.manual_seed(0)  # transformers draws the text encoder's weights with it
    pipeline = Drawn(preset, {}, torch.float32, torch.device("cpu")).pipeline()
    redraw(pipeline.model.generator)
    redraw(pipeline.latent, 0.1)  # more, and most pixels would be clipped: equal, whatever was computed
    return pipeline


@torch.no_grad()
def redraw(module: nn.Module, size: float = 0.5) -> nn.Module:
    """Add noise to every weight: ``size`` times what keeps a product's variance; to vectors a fifth of ``size``."""
    for name, parameter in module.named_parameters():
        sums = parameter.shape[-1] if parameter.dim() == 3 else parameter.shape[1:].numel()  # terms of a product's sum
        scale = size * (sums**-0.5 if parameter.dim() > 1 else 0.2)
        parameter.add_(scale * torch.randn(parameter.shape, generator=addressed("redrawn", name)))
    return module.eval()


def export(plan: Plan) -> None:
    """Write every preset in each runtime and precision that is missing, then compare images."""
    for preset in plan.presets:
        pipeline = drawn(preset)
        for iterations in plan.iterations:
            parts = parts_of(pipeline, iterations=iterations)
            for runtime in plan.runtimes:
                if runtime != "pytorch":
                    export_preset(plan, parts, Setup(plan.work, preset, runtime, "fp32", iterations))
            for setup in plan.setups():
                if (setup.preset, setup.iterations) == (preset, iterations) and setup.runtime != "pytorch":
                    once(plan, f"agreement-{setup}", lambda setup=setup, parts=parts: agreement_row(setup, parts))


def export_preset(plan: Plan, parts: Mapping[str, ExportPart], setup: Setup) -> None:
    """All files of a preset in one runtime; text encoder and decoder are written once and linked to."""
    shared = plan.work / "shared" / setup.runtime
    write = write_onnx if setup.runtime == "onnxruntime" else write_executorch
    ensure({name: parts[name] for name in SHARED}, shared, DTYPES[setup.runtime], write)
    link(shared, setup.folder)
    ensure({"generator": parts["generator"]}, setup.folder, DTYPES[setup.runtime], write)
    if setup.runtime == "onnxruntime":
        encoder = parts["text"].module.encoder
        text = encoder.to_dict() | {"length": encoder.length, "vocab_size": encoder.shape["vocab_size"]}
        write_json(
            setup.folder / "pipeline.json",
            {
                "text": text,
                "latent": list(parts["decoder"].inputs[0].shape[1:]),
                "batch": 1,
                "iterations": setup.iterations,
            },
        )


def write_onnx(parts: Mapping[str, ExportPart], folder: Path, dtype: str) -> None:
    """Files for ONNX Runtime."""
    from eval.export.onnx import export_onnx

    export_onnx(parts, folder, dtype)


def write_executorch(parts: Mapping[str, ExportPart], folder: Path, dtype: str) -> None:
    """Files for ExecuTorch."""
    from eval.export.executorch import export_executorch

    export_executorch(parts, folder, dtype)


def ensure(parts: Mapping[str, ExportPart], folder: Path, dtypes: Sequence[str], write: Writer) -> None:
    """Write the files that the folder's manifest does not name."""
    for part in parts.values():
        for dtype in dtypes:
            if (part.name, dtype) in {(one["part"], one["dtype"]) for one in manifest(folder)["files"]}:
                continue
            started = time.perf_counter()
            write({part.name: part}, folder, dtype)
            print(f"{folder / part.name}, {dtype}: {time.perf_counter() - started:.0f} s", flush=True)


def manifest(folder: Path) -> dict[str, Any]:
    """What an exporter wrote of a folder; no files where it wrote nothing yet."""
    path = folder / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else {"files": []}


def link(source: Path, folder: Path) -> None:
    """Hard links to all files of ``source``, and its entries in the folder's manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    theirs, ours = manifest(source), manifest(folder)
    for file in source.iterdir():
        if file.name != "manifest.json" and not (folder / file.name).exists():
            os.link(file, folder / file.name)
    named = {(one["part"], one["dtype"]) for one in ours["files"]}
    added = [one for one in theirs["files"] if (one["part"], one["dtype"]) not in named]
    write_json(folder / "manifest.json", theirs | {"files": ours["files"] + added})


def agreement_row(setup: Setup, parts: Mapping[str, ExportPart]) -> dict[str, Any]:
    """How far a whole image, from the same numbers and noise, is from PyTorch's in float32."""
    numbers, noise = parts["text"].module.encoder.tokenise([CAPTION]), parts["decoder"].inputs[0]
    expected = image_in_pytorch(parts, numbers, noise).double().numpy()
    run = image_in_onnxruntime if setup.runtime == "onnxruntime" else image_in_executorch
    difference = run(setup, numbers.numpy(), noise.numpy()) - expected
    return about(setup) | {
        "rms": float(np.sqrt(np.square(difference).mean() / np.square(expected).mean())),
        "max": float(np.abs(difference).max() / np.abs(expected).max()),
    }


def about(setup: Setup) -> dict[str, Any]:
    """The setup's names as values."""
    return {"preset": setup.preset, "runtime": setup.runtime, "dtype": setup.dtype, "iterations": setup.iterations}


@torch.no_grad()
def image_in_pytorch(parts: Mapping[str, ExportPart], numbers: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Image [1, 3, H, W] by Euler's method without guidance."""
    text, z = parts["text"].module(numbers), noise
    times = torch.linspace(1, 0, STEPS + 1)
    for t, following in itertools.pairwise(times):
        z = z + (following - t) * parts["generator"].module(z, t.expand(len(z)), *text)
    return parts["decoder"].module(z)


def image_in_onnxruntime(setup: Setup, numbers: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The same in ONNX Runtime."""
    from eval.export.ort import OrtPipeline, time_grid

    pipeline = OrtPipeline(setup.folder, setup.dtype, keep=())
    text, z = tuple(pipeline.run("text", numbers)), noise
    times = time_grid(STEPS)
    for t, following in itertools.pairwise(times):
        z = z + (following - t) * pipeline.velocity(z, t, text)
    return pipeline.run("decoder", z)[0]


def image_in_executorch(setup: Setup, numbers: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The same in ExecuTorch's C++ runtime."""
    from eval.export.executorch_measuring import ExecutorchPipeline

    return ExecutorchPipeline(setup.folder, setup.dtype, keep=())(numbers, noise, STEPS, setup.iterations)


def mixers(plan: Plan) -> None:
    """Every mixer alone in ExecuTorch: does it lower, load, run and agree?"""
    if "executorch" in plan.runtimes:
        for name in MIXERS:
            for side, dtype in MIXER_CASES:
                once(
                    plan,
                    f"mixer-{name}-{side}-{dtype}",
                    lambda name=name, side=side, dtype=dtype: mixer_row(plan.work, name, side, dtype),
                )


def mixer_part(name: str, side: int) -> ExportPart:
    """A mixer alone on a square grid of tokens, every weight drawn and none zero."""
    mixer = redraw(initialise(build_mixer(name, MIXER_DIM, heads=MIXER_HEADS), 0))
    x = torch.randn(1, side, side, MIXER_DIM, generator=addressed("mixer", side))
    return ExportPart(name, mixer, (x,), ("x",), ("y",))


def mixer_row(work: Path, name: str, side: int, dtype: str) -> dict[str, Any]:
    """Agreement of one mixer, or what failed, in the words of what raised it."""
    from eval.export.executorch import agreement, lower, operators_of, run_file

    part, path = mixer_part(name, side), work / "mixer.pte"
    row = {"mixer": name, "side": side, "dtype": dtype, "failed": ""}
    try:
        edge = lower({"forward": part}, dtype)
        row |= operators_of(edge.exported_program("forward"))
        path.write_bytes(edge.to_executorch().buffer)
        row |= agreement(run_file(path, part), part.outputs())
    except Exception as error:  # whatever a runtime cannot do is a result here
        row["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    finally:
        path.unlink(missing_ok=True)
    return row


def coreml(plan: Plan) -> None:
    """Convert every mixer, and the parts of the smallest preset, the generator in its three passes."""
    try:
        from eval.export.coreml import convert_coreml
    except ImportError:
        print("coreml: coremltools is not installed, so nothing is converted")
        return
    for name in MIXERS:
        once(plan, f"coreml-mixer-{name}", lambda name=name: convert_coreml(mixer_part(name, 16)).as_dict())
    wanted = [f"coreml-{plan.presets[0]}-{name}" for name in ("text", "start", "pass", "read", "decoder")]
    if all((rows_folder(plan) / f"{name}.json").exists() for name in wanted):
        return
    parts = parts_of(drawn(plan.presets[0]))
    for part in [parts["text"], *generator_in_passes(parts["generator"]), parts["decoder"]]:
        once(
            plan,
            f"coreml-{plan.presets[0]}-{part.name}",
            lambda part=part: {"preset": plan.presets[0]} | convert_coreml(part).as_dict(),
        )
