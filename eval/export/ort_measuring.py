"""What measuring processes load of an exported pipeline, without PyTorch: all or a part, as functions of no arguments."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from eval.export.ort import PARTS, OrtPipeline
from iris.errors import require_choice

CAPTION = "a large red circle in the centre on a white background"
OPTIONS, SAMPLING = ("dtype", "keep", "prepack"), ("steps", "guidance", "shift")


def load_for_measuring(given: dict[str, Any]) -> Callable[[], Any]:
    """A function that makes images with an exported pipeline: what speed and memory are measured on.

    Threads are those of OMP_NUM_THREADS, which measuring workers set.

    Args:
        given: {"folder"} and optionally "caption", "batch" (images at once), "part" (load this one alone), "dtype",
            "keep" and "prepack" (of ``OrtPipeline``), "steps", "guidance" and "shift" (of its call).

    Returns:
        the function, with the attributes ``weights_bytes`` and ``parts`` that ``eval.speed.workers.Loader`` describes. A part
        of the generator is one evaluation of the whole batch.

    Raises:
        SettingError: an unknown name; what ``OrtPipeline`` refuses.
    """
    for name in given:
        require_choice("the loader's argument", name, ("folder", "caption", "batch", "part", *OPTIONS, *SAMPLING))
    options = {name: given[name] for name in OPTIONS if name in given}
    part = given.get("part")
    if part is not None:
        require_choice("part", part, PARTS)
        options["keep"] = (part,)
    pipeline = OrtPipeline(given["folder"], threads=int(os.environ.get("OMP_NUM_THREADS", 1)), **options)
    captions = [given.get("caption", CAPTION)] * given.get("batch", 1)
    sampling = {name: given[name] for name in SAMPLING if name in given}
    parts = {name: _part(pipeline, name, captions, sampling) for name in PARTS if part in (None, name)}
    if part is not None:
        return parts[part]
    generate = _function(partial(pipeline, captions, **sampling), sum(map(pipeline.weights_bytes, PARTS)), 1)
    generate.parts = parts
    return generate


def _part(pipeline: OrtPipeline, name: str, captions: list[str], sampling: dict[str, Any]) -> Callable[[], Any]:
    """One part on inputs that it would have."""
    guided = sampling.get("guidance", 3.0) != 1
    evaluations = sampling.get("steps", 4) * (2 if guided else 1)
    if name == "text":
        return _function(partial(pipeline.encode, captions + [""] * guided), pipeline.weights_bytes(name), 1)

    def run() -> Any:
        return pipeline.run(name, *_inputs(pipeline, name, len(captions)))

    return _function(run, pipeline.weights_bytes(name), evaluations if name == "generator" else 1)


def _inputs(pipeline: OrtPipeline, name: str, count: int) -> list[np.ndarray]:
    """Drawn inputs of a part for ``count`` images; a mask that hides nothing."""
    draws = np.random.default_rng(0)
    given = [(each.type, (count, *each.shape[1:])) for each in pipeline.session(name).get_inputs()]
    return [
        np.ones(shape, bool) if kind == "tensor(bool)" else draws.random(shape, np.float32) for kind, shape in given
    ]


def _function(run: Callable[[], Any], weights_bytes: int, count: int) -> Callable[[], Any]:
    """``run`` with what measuring asks of it."""

    def measured() -> Any:
        return run()

    measured.weights_bytes, measured.count, measured.device = weights_bytes, count, "cpu"
    return measured
