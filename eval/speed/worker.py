"""The process that holds one model while it is measured: ``python -m eval.speed.worker``, JSON lines in, JSON lines out.

``python -m eval.speed.worker JSON`` instead loads as the request "load" does, makes one image, prints one line and ends.

Requests, one line each:
    {"do": "load", "function": "module:name", "argument": any JSON, "threads": n}   first
    {"do": "memory", "runs": n}                                                     straight after it
    {"do": "activations"}, {"do": "time", "repeat": n}                              any number of times
    {"do": "graph", "repeat": n}                                                    CUDA alone, and last
    {"do": "quit"}
All but "load" may name one of the model's parts, {"part": name}. Every request is answered by one line; a failure by
{"error": message}, after the traceback went to stderr.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from eval.speed.process import MB, reset_peak, resident_mb

# PyTorch is imported where it is needed: half a gigabyte must not be part of the memory of a model that runs without it.


class Session:
    """One model and the requests about it."""

    def __init__(self) -> None:
        self.generate: Callable[[], Any] | None = None
        self.device = "cpu"
        self.peaks: list[float | None] = []

    def load(self, function: str, argument: Any, threads: int) -> dict[str, Any]:
        """Import the loader and what it asks for, then call it; the two stages' memory is told apart."""
        module, _, name = function.partition(":")
        loader = getattr(importlib.import_module(module), name)
        if hasattr(loader, "imports"):
            loader.imports(argument)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
        self.peaks.append(resident_mb("VmHWM"))
        imported = {
            "import_mb": resident_mb("VmRSS"),
            "import_data_mb": resident_mb("VmData"),
            "import_size_mb": resident_mb("VmSize"),
        }
        reset_peak()
        self.generate = loader(argument)
        if not callable(self.generate):
            raise TypeError(f"{function} must return a function of no arguments, got {type(self.generate).__name__}")
        self.device = str(getattr(self.generate, "device", "cpu"))
        if self.on_cuda:
            import torch

            torch.cuda.set_device(torch.device(self.device).index or 0)
        parts = {name: about(part) for name, part in getattr(self.generate, "parts", {}).items()}
        return {
            **imported,
            "loaded_mb": resident_mb("VmRSS"),
            "device": self.device,
            **about(self.generate),
            "parts": parts,
        }

    def memory(self, runs: int, part: str | None = None) -> dict[str, Any]:
        """Peak of this process so far, which must not have done anything but load; on CUDA the allocator's peak."""
        self.peaks.append(resident_mb("VmHWM"))
        reset_peak()
        function = self._function(part)
        for _ in range(runs):
            function()
        if self.on_cuda:
            import torch

            torch.cuda.synchronize()
            return {"peak_memory_mb": torch.cuda.max_memory_allocated() / MB}
        self.peaks.append(resident_mb("VmHWM"))
        known = [peak for peak in self.peaks if peak is not None]
        return {"peak_memory_mb": max(known) if known else None}

    def activations(self, part: str | None = None) -> dict[str, Any]:
        """Peak of the tensors alive while one image, or one run of the part, is made; None without PyTorch."""
        function = self._function(part)
        if "torch" not in sys.modules:
            return {"activations_mb": None}
        from eval.speed.probes import ActivationTracker

        gc.collect()
        tracker = ActivationTracker()
        with tracker:
            function()
        return {"activations_mb": tracker.peak / MB}

    def time(self, repeat: int = 1, part: str | None = None) -> dict[str, Any]:
        """Milliseconds of one run, the mean of ``repeat`` in a row: wall, and processor time of all threads."""
        return self._time(self._function(part), repeat)

    def graph(self, repeat: int = 1, part: str | None = None) -> dict[str, Any]:
        """Milliseconds of one replay of the function as a CUDA graph, or None and why it cannot be one."""
        if not self.on_cuda:
            return {"graph_ms": None, "why": f"the model is on {self.device}; graphs are CUDA's"}
        try:
            replay = capture(self._function(part))
        except RuntimeError as error:
            return {"graph_ms": None, "why": f"it cannot be captured: {error}"}
        replay()
        return {"graph_ms": self._time(replay, repeat)["wall_ms"], "why": ""}

    def _time(self, function: Callable[[], Any], repeat: int) -> dict[str, float]:
        events = None
        if self.on_cuda:
            import torch

            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            torch.cuda.synchronize()
        gc.disable()
        try:
            processor, start = time.process_time(), time.perf_counter()
            if events:
                events[0].record()
            for _ in range(repeat):
                function()
            if events:
                events[1].record()
                torch.cuda.synchronize()
            wall, processor = time.perf_counter() - start, time.process_time() - processor
        finally:
            gc.enable()
        milliseconds = events[0].elapsed_time(events[1]) if events else 1000 * wall
        return {"wall_ms": milliseconds / repeat, "processor_ms": 1000 * processor / repeat}

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def _function(self, part: str | None) -> Callable[[], Any]:
        if self.generate is None:
            raise RuntimeError("no model is loaded")
        if part is None:
            return self.generate
        parts = getattr(self.generate, "parts", {})
        if part not in parts:
            raise ValueError(f"part={part!r} is unknown; the model has {', '.join(parts) or 'no parts'}")
        return parts[part]


def about(function: Callable[[], Any]) -> dict[str, Any]:
    """What a function that is measured says of itself, in MB; see ``eval.speed.workers.Loader``."""
    sizes = {
        "weights_mb": getattr(function, "weights_bytes", None),
        "predicted_mb": getattr(function, "activations_bytes", None),
    }
    return {
        **{name: None if size is None else size / MB for name, size in sizes.items()},
        "count": getattr(function, "count", 1),
        "within": getattr(function, "within", None),
    }


def capture(function: Callable[[], Any]) -> Callable[[], None]:
    """The work of ``function`` as a CUDA graph: what replays it, free of Python and of launching kernels one by one.

    The function must work on tensors that stay where they are, without waiting for the device. It is run three times on
    a side stream first, as libraries allocate and choose algorithms then, which a capture must not contain.

    Raises:
        RuntimeError: it cannot be captured.
    """
    import torch

    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    current.wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def main() -> None:
    """Make one image with what the command line names, or answer requests until "quit" or the end of stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a model prints must not be taken for an answer
    session = Session()
    if len(sys.argv) > 1:
        loaded = session.load(**json.loads(sys.argv[1]))
        session.memory(runs=1)
        print(json.dumps(loaded), file=answers, flush=True)
        return
    for line in sys.stdin:
        request = json.loads(line)
        action = request.pop("do")
        if action == "quit":
            break
        try:
            answer = {
                "load": session.load,
                "memory": session.memory,
                "activations": session.activations,
                "time": session.time,
                "graph": session.graph,
            }[action](**request)
        except Exception as error:
            traceback.print_exc()
            sys.stderr.flush()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
