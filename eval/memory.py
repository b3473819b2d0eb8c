"""Memory of one model in a fresh process: what it takes as a whole, and the weights and activations it must take."""

from __future__ import annotations

from dataclasses import dataclass

from eval.workers import Loader, Worker

RUNS = 2    # the second image takes more resident memory than the first: kernels keep scratch


@dataclass(frozen=True)
class MemoryResult:
    """MB (10^6 bytes); None where a figure cannot be had, never 0 for "not measured".

    ``peak_memory_mb``: peak resident memory (VmHWM) of a process that only imports, loads and generates; on CUDA the
        allocator's peak instead.
    ``import_mb``: resident memory after the imports, before the model exists. With torch it is the larger part, so the
        peak is no figure for a phone.
    ``loaded_mb``: resident memory with the model loaded.
    ``weights_mb``: bytes of the weights, as the loader states them.
    ``activations_mb``: peak of the tensors alive while one image is made, exact and the same on every machine.
    """

    peak_memory_mb: float | None
    import_mb: float | None
    loaded_mb: float | None
    weights_mb: float | None
    activations_mb: float
    device: str = "cpu"


def measure_memory(loader: Loader, name: str = "model", threads: int = 1, timeout: float = 600.0) -> MemoryResult:
    """Memory of one model, in a process of its own.

    Raises:
        WorkerError: the model failed, died or took longer than ``timeout`` seconds over one request.
    """
    with Worker(name, loader, threads, timeout) as worker:
        return worker_memory(worker)


def worker_memory(worker: Worker) -> MemoryResult:
    """Memory of the model in a worker that has done nothing but load it."""
    peak = worker.ask("memory", runs=RUNS)
    activations = worker.ask("activations")
    return MemoryResult(**peak, **activations, **worker.loaded)
