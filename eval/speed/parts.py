"""How long the parts of one model take, beside the whole: text encoder, an evaluation, the decoder, or what it names.

A fresh process for each batch size holds the model; whole and parts are timed in turn, there and back. The model names
its parts (``eval.speed.workers.Loader``); nothing here knows what they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from eval.speed.latency import LatencyResult, Timed, interleave
from eval.speed.workers import Loader, Worker

BLOCK_MS = 20.0  # runs of a short part are timed together until they take as long: a request's own cost is 0.1 ms
MOST = 1000


@dataclass(frozen=True)
class PartLatency:
    """Time of one part.

    Attributes:
        count: runs in one call of the whole.
        within: the part that contains it, None at the top.
        repeat: runs that were timed together.
        latency: of one run; its ratio is to the whole's time at this batch size.
        graph_ms: of one replay as a CUDA graph; None on another device, or where it cannot be captured, which
            ``graph_why`` says.
    """

    count: int
    within: str | None
    repeat: int
    latency: LatencyResult
    graph_ms: float | None
    graph_why: str


@dataclass(frozen=True)
class PartsLatency:
    """The whole of one batch size, and its parts by name."""

    batch: int
    whole: LatencyResult
    parts: dict[str, PartLatency]

    @property
    def sum_ms(self) -> float:
        """What the parts take in one call: count times median over those that are not within another."""
        return sum(part.count * part.latency.median_ms for part in self.parts.values() if part.within is None)

    @property
    def covered(self) -> float:
        """``sum_ms`` over the whole's median. What is missing to 1 is the sampler's arithmetic, noise, pixels; what is
        above it, caches that a part finds warm or cold when it runs alone."""
        return self.sum_ms / self.whole.median_ms


def measure_parts(
    loader: Loader,
    batches: Sequence[int] = (1, 4),
    rounds: int = 30,
    warmup: int = 3,
    threads: int = 1,
    timeout: float = 600.0,
) -> dict[int, PartsLatency]:
    """Latency of a model and its parts at each batch size.

    Args:
        loader: of a model with parts; its argument is an object that takes "batch".
        rounds, warmup, threads, timeout: as ``eval.speed.latency.measure_models``.

    Raises:
        ValueError: no batch sizes or one below 1, rounds below 2, warmup below 0; the model names no parts.
        WorkerError: the model failed.
    """
    if not batches or min(batches) < 1 or rounds < 2 or warmup < 0:
        raise ValueError(
            f"batches must be sizes of at least 1, rounds >= 2 and warmup >= 0, "
            f"got {list(batches)}, {rounds} and {warmup}"
        )
    with ExitStack() as stack:
        workers = {
            batch: stack.enter_context(Worker(f"batch {batch}", loader.given(batch=batch), threads, timeout))
            for batch in batches
        }
        timed, first = [], []
        for worker in workers.values():
            if not worker.loaded["parts"]:
                raise ValueError(f"{loader.function}: the model names no parts")
            whole = len(timed)
            for part in (None, *worker.loaded["parts"]):
                timed.append(Timed(worker, part, repeat_for(worker, part)))
                first.append(whole)
        latency = dict(
            zip(
                ((one.worker, one.part) for one in timed),
                interleave(timed, rounds, warmup, threads, first),
                strict=True,
            )
        )
        return {
            batch: PartsLatency(batch, latency[worker, None], _parts(worker, timed, latency))
            for batch, worker in workers.items()
        }


def repeat_for(worker: Worker, part: str | None) -> int:
    """Runs that take ``BLOCK_MS`` together, judged by the second one: the first is longer."""
    for _ in range(2):
        took, _ = Timed(worker, part).run()
    return min(MOST, max(1, math.ceil(BLOCK_MS / took))) if took > 0 else MOST


def _parts(
    worker: Worker, timed: Sequence[Timed], latency: dict[tuple[Worker, str | None], LatencyResult]
) -> dict[str, PartLatency]:
    """After all rounds, because a capture that fails can leave the device unusable.

    Parts are captured from the last to the first: what comes first reads text, copies it to the device and fails.
    """
    chosen = [one for one in timed if one.worker is worker and one.part is not None]
    graphs = {one.part: worker.ask("graph", part=one.part, repeat=one.repeat) for one in reversed(chosen)}
    results = {}
    for one in chosen:
        about, graph = worker.loaded["parts"][one.part], graphs[one.part]
        results[one.part] = PartLatency(
            about["count"], about["within"], one.repeat, latency[worker, one.part], graph["graph_ms"], graph["why"]
        )
    return results


def part_table(results: Sequence[PartsLatency]) -> list[str]:
    """Markdown: milliseconds of the whole and of each part, what they sum to, and which rows are contended."""
    lines = [
        "| batch | part | ms (quartiles) | runs | share of the whole | CUDA graph, ms | |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        lines.append(_row(result.batch, "end to end", result.whole, 1, None, None))
        for name, part in result.parts.items():
            label = name if part.within is None else f"{name} (within {part.within})"
            lines.append(_row(result.batch, label, part.latency, part.count, part.count, part.graph_ms))
        lines.append(f"| {result.batch} | parts together | {result.sum_ms:.1f} | | {result.covered:.0%} | | |")
    return lines


def _row(batch: int, label: str, one: LatencyResult, runs: int, share: int | None, graph: float | None) -> str:
    part = "" if share is None else f"{share * one.ratio_to_first:.0%}"
    replay = "-" if graph is None else f"{graph:.2f}"
    return (
        f"| {batch} | {label} | {one.median_ms:.2f} ({one.q1_ms:.2f} to {one.q3_ms:.2f}) | {runs} | {part} "
        f"| {replay} | {'contended' if one.contended else ''} |"
    )
