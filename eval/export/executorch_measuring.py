"""A whole model of .pte files, and what measuring processes load of it, as functions of no arguments. No PyTorch."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eval.export.executorch_host import Host, progress_of, run_in_passes
from iris.errors import SettingError, require_choice

PARTS = ("text", "generator", "decoder")
GIVEN = ("folder", "dtype", "steps", "iterations", "part", "keep")


class ExecutorchPipeline:
    """Text encoder, generator in passes and decoder of a folder that ``export_executorch`` wrote; one image at a time.

    Raises:
        SettingError: an unknown part, a manifest or file that is missing, or a generator that was exported whole.
        HostError: ExecuTorch refuses a file.
    """

    def __init__(self, folder: Path | str, dtype: str = "fp32", threads: int = 1, keep: Sequence[str] = PARTS) -> None:
        """``keep``: parts to load now and to keep; of the others one at a time is in memory, loaded for its turn."""
        for name in keep:
            require_choice("keep", name, PARTS)
        self.folder, self.threads, self.keep = Path(folder), threads, tuple(keep)
        self.files = read_manifest(self.folder, dtype)
        if "pass" not in self.files["generator"]["methods"]:
            raise SettingError(f"model={folder}: the generator must be exported with passes=True")
        self._hosts: dict[str, Host] = {}
        for name in self.keep:
            self.host(name)

    def __call__(self, numbers: np.ndarray, noise: np.ndarray, steps: int = 4, iterations: int = 4) -> np.ndarray:
        """Images float32 [B, 3, H, W] in [-1, 1], by Euler's method, without guidance.

        Args:
            numbers: of the text's tokens, int64 [B, N], B as exported.
            noise: unit noise [B, C, h, w] to start from.
            steps: even ones from t = 1 to 0.
            iterations: passes through the core at each.
        """
        text, z = self.encode(numbers), noise
        times = np.linspace(1, 0, steps + 1, dtype=np.float32)
        for t, following in itertools.pairwise(times):
            z = z + (following - t) * self.velocity(z, t, text, iterations)
        return self.run("decoder", {"latents": z})["images"]

    def encode(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The text as the generator reads it: tokens, mask, pooled."""
        return self.run("text", {"numbers": numbers})

    def velocity(self, z: np.ndarray, t: float, text: Mapping[str, np.ndarray], iterations: int) -> np.ndarray:
        """One evaluation of the generator."""
        progress = progress_of(iterations, self.files["generator"]["least_passes"])
        progress = [np.array([done], np.float32) for done in progress]
        return run_in_passes(self.host("generator").run, {"z": z, "t": np.full(len(z), t), **text}, progress)

    def run(self, part: str, known: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of text encoder or decoder."""
        return self.host(part).run("forward", known)

    def host(self, part: str) -> Host:
        """A part ready to run; one that is not kept takes the place of the last such."""
        if part not in self._hosts:
            for other in [name for name in self._hosts if name not in self.keep]:
                self._hosts.pop(other).close()
            entry = self.files[part]
            self._hosts[part] = Host(self.folder / entry["file"], entry["methods"], self.threads)
            for method in entry["methods"]:
                self._hosts[part].load(method)
        return self._hosts[part]

    def example(self, part: str, method: str = "forward") -> dict[str, np.ndarray]:
        """Drawn inputs of a method; token numbers are all 1, masks hide nothing."""
        draws = np.random.default_rng(0)
        return {
            name: draws.random(given["shape"], np.float32)
            if given["dtype"] == "float32"
            else np.ones(given["shape"], given["dtype"])
            for name, given in self.files[part]["methods"][method]["inputs"].items()
        }


def read_manifest(folder: Path, dtype: str) -> dict[str, Any]:
    """The entries of the files of one dtype by part. Raises SettingError where one is missing."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        return {part: next(one for one in files if (one["part"], one["dtype"]) == (part, dtype)) for part in PARTS}
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise SettingError(
            f"model={folder}: manifest.json does not name text, generator and decoder in {dtype} ({error!r})"
        ) from error


def load_for_measuring(given: dict[str, Any]) -> Callable[[], Any]:
    """A function that makes one image, or runs one part: what speed and memory are measured on.

    Threads are those of OMP_NUM_THREADS, which measuring workers set.

    Args:
        given: {"folder"} and optionally "dtype", "keep" (of ``ExecutorchPipeline``), "steps", "iterations" (of its call)
            and "part" (load this one alone). The generator's part is one evaluation.

    Returns:
        the function, with the attributes ``weights_bytes`` and ``parts`` that ``eval.speed.workers.Loader`` describes.

    Raises:
        SettingError: an unknown name; what ``ExecutorchPipeline`` refuses.
    """
    for name in given:
        require_choice("the loader's argument", name, GIVEN)
    part, steps, iterations = given.get("part"), given.get("steps", 4), given.get("iterations", 4)
    keep = given.get("keep", PARTS)
    if part is not None:
        require_choice("part", part, PARTS)
        keep = (part,)
    threads = int(os.environ.get("OMP_NUM_THREADS", 1))
    pipeline = ExecutorchPipeline(given["folder"], given.get("dtype", "fp32"), threads, keep)
    parts = {name: _part(pipeline, name, steps, iterations) for name in PARTS if part in (None, name)}
    if part is not None:
        return parts[part]
    numbers, noise = pipeline.example("text")["numbers"], pipeline.example("decoder")["latents"]
    generate = _function(
        partial(pipeline, numbers, noise, steps, iterations), sum(pipeline.files[name]["bytes"] for name in PARTS), 1
    )
    generate.parts = parts
    return generate


def _part(pipeline: ExecutorchPipeline, name: str, steps: int, iterations: int) -> Callable[[], Any]:
    size = pipeline.files[name]["bytes"]
    if name != "generator":
        return _function(partial(pipeline.run, name, pipeline.example(name)), size, 1)
    inputs = pipeline.example(name, "start")
    z, t = inputs.pop("z"), float(inputs.pop("t")[0])
    return _function(partial(pipeline.velocity, z, t, inputs, iterations), size, steps)


def _function(run: Callable[[], Any], weights_bytes: int, count: int) -> Callable[[], Any]:
    """``run`` with what measuring asks of it."""

    def measured() -> Any:
        return run()

    measured.weights_bytes, measured.count, measured.device = weights_bytes, count, "cpu"
    return measured
