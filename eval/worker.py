"""The process that holds one model while it is measured: ``python -m eval.worker``, JSON lines in, JSON lines out.

Requests, one line each:
    {"do": "load", "function": "module:name", "argument": any JSON, "threads": n}   first
    {"do": "memory", "runs": n}                                                     straight after it
    {"do": "activations"}, {"do": "time"}                                           any number of times
    {"do": "quit"}
Every request is answered by one line; a failure by {"error": message}, after the traceback went to stderr.
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

import torch

from eval.probes import MB, ActivationTracker, reset_peak, resident_mb


class Session:
    """One model and the requests about it."""

    def __init__(self) -> None:
        self.generate: Callable[[], Any] | None = None
        self.device = "cpu"
        self.peaks: list[float | None] = []

    def load(self, function: str, argument: Any, threads: int) -> dict[str, Any]:
        """Import the loader, then call it; the two stages' memory is told apart."""
        torch.set_num_threads(threads)
        module, _, name = function.partition(":")
        loader = getattr(importlib.import_module(module), name)
        self.peaks.append(resident_mb("VmHWM"))
        imported = resident_mb("VmRSS")
        reset_peak()
        self.generate = loader(argument)
        if not callable(self.generate):
            raise TypeError(f"{function} must return a function of no arguments, got {type(self.generate).__name__}")
        self.device = str(getattr(self.generate, "device", "cpu"))
        if self.on_cuda:
            torch.cuda.set_device(torch.device(self.device).index or 0)
        weights = getattr(self.generate, "weights_bytes", None)
        return {"import_mb": imported, "loaded_mb": resident_mb("VmRSS"), "device": self.device,
                "weights_mb": None if weights is None else weights / MB}

    def memory(self, runs: int) -> dict[str, Any]:
        """Peak of this process so far, which must not have done anything but load; on CUDA the allocator's peak."""
        self.peaks.append(resident_mb("VmHWM"))
        reset_peak()
        for _ in range(runs):
            self._generate()
        if self.on_cuda:
            torch.cuda.synchronize()
            return {"peak_memory_mb": torch.cuda.max_memory_allocated() / MB}
        self.peaks.append(resident_mb("VmHWM"))
        known = [peak for peak in self.peaks if peak is not None]
        return {"peak_memory_mb": max(known) if known else None}

    def activations(self) -> dict[str, Any]:
        """Peak of the tensors alive while one image is made."""
        gc.collect()
        tracker = ActivationTracker()
        with tracker:
            self._generate()
        return {"activations_mb": tracker.peak / MB}

    def time(self) -> dict[str, Any]:
        """Milliseconds of one image: wall, and the processor time of all threads of this process."""
        events = None
        if self.on_cuda:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            torch.cuda.synchronize()
        gc.disable()
        try:
            processor, start = time.process_time(), time.perf_counter()
            if events:
                events[0].record()
            self._generate()
            if events:
                events[1].record()
                torch.cuda.synchronize()
            wall = time.perf_counter() - start
        finally:
            gc.enable()
        milliseconds = events[0].elapsed_time(events[1]) if events else 1000 * wall
        return {"wall_ms": milliseconds, "processor_ms": 1000 * (time.process_time() - processor)}

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def _generate(self) -> Any:
        if self.generate is None:
            raise RuntimeError("no model is loaded")
        return self.generate()


def main() -> None:
    """Answer requests until "quit" or the end of stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)   # what a model prints must not be taken for an answer
    session = Session()
    for line in sys.stdin:
        request = json.loads(line)
        action = request.pop("do")
        if action == "quit":
            break
        try:
            answer = {"load": session.load, "memory": session.memory, "activations": session.activations,
                      "time": session.time}[action](**request)
        except Exception as error:
            traceback.print_exc()
            sys.stderr.flush()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
