"""What measuring processes load of an exported model, without PyTorch: all or a part, as functions of no arguments."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eval.export import PARTS
from eval.export.host.pipeline import ExportedPipeline, opener, read_folder, size_of
from eval.export.host.sampling import Sampling
from iris.errors import require_choice

CAPTION = "a large red circle in the centre on a white background"
OWN = ("folder", "caption", "batch", "part", "resident")
SAMPLING = tuple(field.name for field in fields(Sampling))


def load_for_measuring(given: dict[str, Any]) -> Callable[[], Any]:
    """A function that makes images with an exported model: what speed and memory are measured on.

    Threads are those of OMP_NUM_THREADS, which measuring workers set.

    Args:
        given: {"folder"} and optionally "caption", "batch" (images at once), "part" (load this one alone), "resident" (of
            ``ExportedPipeline``) and fields of ``Sampling`` (the others as the model was saved with).

    Returns:
        the function, with the attributes that ``eval.speed.workers.Loader`` describes. A part is one run of its file, on
        as many images as the file takes.

    Raises:
        SettingError: an unknown name; what ``ExportedPipeline`` refuses.
    """
    for name in given:
        require_choice("the loader's argument", name, (*OWN, *SAMPLING))
    part = given.get("part")
    if part is not None:
        require_choice("part", part, PARTS)
    threads = int(os.environ.get("OMP_NUM_THREADS", 1))
    pipeline = ExportedPipeline(given["folder"], threads, given.get("resident", "all"))
    sampling = pipeline.sampling(**{name: given[name] for name in SAMPLING if name in given})
    captions = [given.get("caption", CAPTION)] * given.get("batch", 1)
    if part is not None or pipeline.resident == "all":
        pipeline.load(*([part] if part else PARTS))
    if part is not None:
        return _part(pipeline, part, captions, sampling)
    size = sum(map(size_of, pipeline.about["parts"].values()))
    generate = _measured(partial(pipeline, captions, sampling), size, 1)
    generate.parts = {name: _part(pipeline, name, captions, sampling) for name in PARTS}
    return generate


def _imports(given: dict[str, Any]) -> None:
    """Import what loading will need, so that it is counted with the runtime and not with the weights."""
    opener(read_folder(Path(given["folder"]))["runtime"])


load_for_measuring.imports = _imports


def _part(pipeline: ExportedPipeline, name: str, captions: list[str], sampling: Sampling) -> Callable[[], Any]:
    """One part on inputs that it would have."""
    batches = -(-len(captions) // pipeline.batch)
    counts = {"text": batches + sampling.guided, "generator": batches * sampling.evaluations, "decoder": batches}
    if name == "text":
        run = partial(pipeline.encode, captions[: pipeline.batch])
    elif name == "decoder":
        run = partial(pipeline.decode, _drawn(pipeline, name)["latents"])
    else:
        text = _drawn(pipeline, name)
        run = partial(pipeline.velocity, text.pop("z"), float(text.pop("t")[0]), text, sampling.iterations)
    return _measured(run, size_of(pipeline.about["parts"][name]), counts[name])


def _drawn(pipeline: ExportedPipeline, name: str) -> dict[str, np.ndarray]:
    """Drawn inputs of a part; masks hide nothing."""
    methods, draws = pipeline.about["parts"][name]["methods"], np.random.default_rng(0)
    return {
        given: draws.random(made["shape"], np.float32)
        if made["dtype"] == "float32"
        else np.ones(made["shape"], made["dtype"])
        for given, made in methods.get("start", methods.get("forward"))["inputs"].items()
    }


def _measured(run: Callable[[], Any], weights_bytes: int, count: int) -> Callable[[], Any]:
    """``run`` with what measuring asks of it."""

    def measured() -> Any:
        return run()

    measured.weights_bytes, measured.count, measured.device = weights_bytes, count, "cpu"
    return measured
