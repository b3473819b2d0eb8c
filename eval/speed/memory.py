"""Memory of a model in a fresh process, whole and by part: what it takes, and the weights and activations it must."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eval.speed.workers import STEADY_HEAP, Loader, Worker

RUNS = 2  # the second image takes more resident memory than the first: kernels keep scratch


@dataclass(frozen=True)
class MemoryResult:
    """MB (10^6 bytes); None where a figure cannot be had, never 0 for "not measured".

    ``peak_memory_mb``: peak resident memory (VmHWM) of a process that only imports, loads and generates; on CUDA the
        allocator's peak instead.
    ``import_mb``: resident memory after the imports, before the model exists. With torch it is the larger part, so the
        peak is no figure for a phone.
    ``loaded_mb``: resident memory with the model loaded.
    ``weights_mb``: bytes of the weights, as the loader states them.
    ``activations_mb``: peak of the tensors alive while one image is made, exact and the same on every machine; PyTorch's
        alone.
    """

    peak_memory_mb: float | None
    import_mb: float | None
    loaded_mb: float | None
    weights_mb: float | None
    activations_mb: float | None
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
    loaded = {name: worker.loaded[name] for name in ("import_mb", "loaded_mb", "weights_mb", "device")}
    return MemoryResult(**peak, **activations, **loaded)


@dataclass(frozen=True)
class PartMemory:
    """Memory of one part alone in a fresh process, beside what is predicted.

    Weights: bytes of a number times their count, against the growth of resident memory while loading. Activations:
    what the part's architecture predicts for the peak of the live tensors (None: it has no formula), against the peak
    counted on a run.
    """

    memory: MemoryResult
    predicted_mb: float | None

    @property
    def weights_ratio(self) -> float | None:
        """Resident growth while loading over the bytes of the weights; None where one of them is not known or 0."""
        m = self.memory
        if not m.weights_mb or m.loaded_mb is None or m.import_mb is None:
            return None
        return (m.loaded_mb - m.import_mb) / m.weights_mb

    @property
    def activations_ratio(self) -> float | None:
        """Counted peak of live tensors over the predicted one; None without a prediction."""
        counted = self.memory.activations_mb
        return counted / self.predicted_mb if self.predicted_mb and counted is not None else None


def measure_memory_by_part(
    loader: Loader, threads: int = 1, timeout: float = 600.0, parts: Sequence[str] | None = None
) -> dict[str, PartMemory]:
    """Memory of the whole model and of each of its parts, every one alone in a process of its own.

    The processes' heap gives freed memory back (``eval.speed.workers.STEADY_HEAP``), so that resident memory is what is held.

    Args:
        loader: of a model with parts; its argument is an object that takes "part".
        parts: names of those to load alone; None: all that are not part of another.

    Returns:
        {"whole": …, part: …}.

    Raises:
        ValueError: the model names no parts, or not those that are asked for.
        WorkerError: the model failed; the message names the part.
    """
    with Worker("whole", loader, threads, timeout, STEADY_HEAP) as worker:
        known = worker.loaded["parts"]
        chosen = [name for name, part in known.items() if part["within"] is None] if parts is None else list(parts)
        if not chosen or not set(chosen) <= set(known):
            raise ValueError(f"parts={chosen} must be some of {', '.join(known) or 'none: the model names no parts'}")
        results = {"whole": PartMemory(worker_memory(worker), worker.loaded["predicted_mb"])}
    for name in chosen:
        with Worker(name, loader.given(part=name), threads, timeout, STEADY_HEAP) as worker:
            results[name] = PartMemory(worker_memory(worker), worker.loaded["predicted_mb"])
    return results
