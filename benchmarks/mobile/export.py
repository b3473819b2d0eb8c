"""The files that ``benchmarks.mobile`` measures, and how far what they compute is from PyTorch."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.mobile.plan import STEPS, Plan, Setup
from eval.export import PIPELINE
from eval.export.host.pipeline import ExportedPipeline
from eval.export.host.sampling import Sampling
from eval.export.measuring import CAPTION
from eval.export.model import check_part, export_model
from eval.export.parts import ExportPart, agreement, parts_of
from eval.export.passes import generator_in_passes
from eval.models.sources import Drawn
from iris.io.files import read_json, write_json
from iris.nn.mixers import MIXERS, build_mixer
from iris.pipeline import IrisPipeline
from iris.randomness import addressed, initialise

SHARED = ("text", "decoder")  # the same in every preset
MIXER_DIM, MIXER_HEADS = 64, 4
MIXER_CASES = ((16, "fp32"), (32, "fp32"), (16, "fp16"), (16, "int8"))  # side of the grid, precision


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
    """Write every setup in a phone's runtime that is missing, then compare images."""
    for preset in plan.presets:
        pipeline = drawn(preset)
        for setup in plan.setups():
            if setup.preset == preset and setup.runtime != "pytorch":
                plan.once(f"agreement-{setup}", partial(agreement_row, setup, pipeline, plan.work))


def agreement_row(setup: Setup, pipeline: IrisPipeline, work: Path) -> dict[str, Any]:
    """How far a whole image of the exported model, from the same noise, is from PyTorch's in float32."""
    folder = setup.folder(work)
    share(setup, work)
    # a program of ExecuTorch serves any number of iterations, so that it is exported once
    fixed = setup.iterations if setup.runtime == "onnx" else None
    about = export_model(pipeline, folder, setup.runtime, setup.dtype, batch=1, iterations=fixed)
    noise = torch.randn(1, *about["latent"], generator=addressed("noise"))
    images = pipeline(CAPTION, STEPS, setup.iterations, 1.0, latents=noise, output_type="pt").images
    sampling = Sampling(STEPS, guidance=1.0, iterations=setup.iterations)
    host = ExportedPipeline(folder, resident="one part")
    found = host.images([CAPTION], sampling, noise=lambda rows, step: noise.numpy())
    return setup.about() | agreement([found], [images * 2 - 1], "images")


def share(setup: Setup, work: Path) -> None:
    """Begin a new folder with hard links to the parts that another one has and that are the same in every preset."""
    folder = setup.folder(work)
    if (folder / PIPELINE).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for other in sorted(work.glob(f"*/{setup.runtime}-{setup.dtype}*/{PIPELINE}")):
        about = read_json(other)
        shared = {name: about["parts"][name] for name in SHARED if name in about["parts"]}
        for name in [name for entry in shared.values() for name in entry["files"]]:
            (folder / name).unlink(missing_ok=True)
            os.link(other.with_name(name), folder / name)
        write_json(folder / PIPELINE, {"parts": shared})
        return


def mixers(plan: Plan) -> None:
    """Every mixer alone in ExecuTorch: does it lower, load, run and agree?"""
    if "executorch" in plan.runtimes:
        for name in MIXERS:
            for side, dtype in MIXER_CASES:
                plan.once(f"mixer-{name}-{side}-{dtype}", partial(mixer_row, name, side, dtype))


def mixer_part(name: str, side: int) -> ExportPart:
    """A mixer alone on a square grid of tokens, every weight drawn and none zero."""
    mixer = redraw(initialise(build_mixer(name, MIXER_DIM, heads=MIXER_HEADS), 0))
    x = torch.randn(1, side, side, MIXER_DIM, generator=addressed("mixer", side))
    return ExportPart(name, mixer, (x,), ("x",), ("y",))


def mixer_row(name: str, side: int, dtype: str) -> dict[str, Any]:
    """Agreement of one mixer, or what failed, in the words of what raised it."""
    from eval.export.executorch import write_part

    part, row = mixer_part(name, side), {"mixer": name, "side": side, "dtype": dtype, "failed": ""}
    with tempfile.TemporaryDirectory() as folder:
        try:
            entry = write_part(part, dtype, Path(folder))
            row |= {name: entry["methods"]["forward"][name] for name in ("delegates", "undelegated")}
            row |= check_part(Path(folder) / entry["file"], entry, part, "executorch")
        except Exception as error:  # whatever a runtime cannot do is a result here
            row["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return row


def coreml(plan: Plan) -> None:
    """Convert every mixer, and the parts of the smallest preset, the generator in its three passes."""
    try:
        from eval.export.coreml import convert_coreml
    except ImportError:
        print("coreml: coremltools is not installed, so nothing is converted")
        return
    for name in MIXERS:
        plan.once(f"coreml-mixer-{name}", lambda name=name: convert_coreml(mixer_part(name, 16)).as_dict())
    wanted = [f"coreml-{plan.presets[0]}-{name}" for name in ("text", "start", "pass", "read", "decoder")]
    if all(plan.row(name).exists() for name in wanted):
        return
    parts = parts_of(drawn(plan.presets[0]))
    for part in [parts["text"], *generator_in_passes(parts["generator"]), parts["decoder"]]:
        plan.once(
            f"coreml-{plan.presets[0]}-{part.name}",
            lambda part=part: {"preset": plan.presets[0]} | convert_coreml(part).as_dict(),
        )
