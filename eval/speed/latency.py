"""How long one image takes, several models against each other.

Models run in processes of their own and in turn, A B C C B A ..., so that a drift of the machine meets all of them
alike. What counts is the ratio to the first model inside one round; milliseconds belong to this machine alone.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from eval.speed.memory import MemoryResult, worker_memory
from eval.speed.probes import machine_seconds, processor_seconds
from eval.speed.workers import Loader, Worker

# A measurement is called contended above these: processors kept busy by other processes, share of processor time taken
# by the hypervisor, and the spread (IQR / median) that torch.utils.benchmark also warns at.
OTHER_PROCESSORS = 0.2
STOLEN = 0.02
SPREAD = 0.10
SURE = 0.99  # level of a ratio's interval
QUOTED = 30  # rounds from which figures are quoted without saying how many they were


@dataclass(frozen=True)
class LatencyResult:
    """One image's time over the measured rounds.

    ``ratio_to_first`` is the median over rounds of this model's time over the first model's in the same round, with its
    quartiles and, where there are rounds enough for one, its 99 % interval. ``contended`` tells that the figures should not
    be quoted, ``reasons`` why; ratios suffer less.
    """

    median_ms: float
    q1_ms: float
    q3_ms: float
    n: int
    ratio_to_first: float
    ratio_q1: float
    ratio_q3: float
    processor_ms: float  # median processor time, all threads; on one thread untouched by other processes
    threads: int
    device: str
    contended: bool
    reasons: tuple[str, ...]
    times_ms: tuple[float, ...]
    processor_ratio: float | None = None  # median over rounds of processor time over the first's; None: it used none
    ratio_low: float | None = None
    ratio_high: float | None = None


@dataclass(frozen=True)
class SpeedAndMemory:
    """Both figures of one model, from one process."""

    latency: LatencyResult
    memory: MemoryResult


def measure_models(
    loaders: dict[str, Loader], rounds: int = 30, warmup: int = 3, threads: int = 1, timeout: float = 600.0
) -> dict[str, SpeedAndMemory]:
    """Memory of each model in its fresh process, then the latency of all of them, interleaved.

    Only one model runs at any time; all of them stay loaded.

    Args:
        loaders: name -> where the model comes from; the first is the one that ratios are taken to.
        rounds: measured rounds, one image of every model each; ``QUOTED`` or more for figures that are quoted.
        warmup: rounds before that, not counted; 10 or more on CUDA.
        threads: processor threads of each process; their number is fixed, the processors they run on are not.
        timeout: seconds that one image or the loading of one model may take.

    Raises:
        ValueError: no loaders, rounds below 2, warmup below 0, threads below 1.
        WorkerError: a model failed; the message names it.
    """
    if not loaders or rounds < 2 or warmup < 0:
        raise ValueError(
            f"loaders must not be empty, rounds >= 2 and warmup >= 0, got {len(loaders)} loaders, {rounds} and {warmup}"
        )
    with ExitStack() as stack:
        workers: list[Worker] = []
        memory: dict[str, MemoryResult] = {}
        for name, loader in loaders.items():
            workers.append(stack.enter_context(Worker(name, loader, threads, timeout)))
            memory[name] = worker_memory(workers[-1])
        latency = interleave([Timed(worker) for worker in workers], rounds, warmup, threads)
    return {name: SpeedAndMemory(one, memory[name]) for name, one in zip(loaders, latency, strict=True)}


def few_rounds(rounds: int) -> str:
    """A sentence on what quartiles come from, where there were few rounds; else nothing."""
    return f"Quartiles are of {rounds} rounds; figures to be quoted want {QUOTED}." if rounds < QUOTED else ""


def visiting_order(count: int, rounds: int) -> list[list[int]]:
    """Indices of the models in each round: forwards in even rounds, backwards in odd ones."""
    return [list(range(count))[:: 1 if i % 2 == 0 else -1] for i in range(rounds)]


@dataclass(frozen=True)
class Timed:
    """What is timed: a worker's model or a part of it, ``repeat`` runs in a row, the mean of which is one time."""

    worker: Worker
    part: str | None = None
    repeat: int = 1

    def run(self) -> tuple[float, float]:
        """Wall and processor milliseconds of one run."""
        named = {} if self.part is None else {"part": self.part}
        answer = self.worker.ask("time", repeat=self.repeat, **named)
        return answer["wall_ms"], answer["processor_ms"]


def interleave(
    timed: Sequence[Timed], rounds: int, warmup: int, threads: int, first: Sequence[int] | None = None
) -> list[LatencyResult]:
    """Times of each, measured in turn there and back.

    Args:
        first: index of the one that each one's ratios are taken to; None: 0 for all.

    Raises:
        WorkerError: a model failed.
    """
    for order in visiting_order(len(timed), warmup):
        for i in order:
            timed[i].run()
    watch = Contention([*{one.worker.pid for one in timed}, os.getpid()])
    wall, processor = np.zeros((2, len(timed), rounds))
    for k, order in enumerate(visiting_order(len(timed), rounds)):
        for i in order:
            wall[i, k], processor[i, k] = timed[i].run()
    machine = watch.reasons()
    reference = [0] * len(timed) if first is None else first
    return [
        _summary(
            wall[i],
            wall[reference[i]],
            processor[i],
            threads,
            one.worker.loaded["device"],
            machine,
            processor[reference[i]],
        )
        for i, one in enumerate(timed)
    ]


def _summary(
    times: np.ndarray,
    first: np.ndarray,
    processor: np.ndarray,
    threads: int,
    device: str,
    machine: list[str],
    first_processor: np.ndarray | None = None,
) -> LatencyResult:
    q1, median, q3 = np.percentile(times, [25, 50, 75])
    ratio_q1, ratio, ratio_q3 = np.percentile(times / first, [25, 50, 75])
    ratio_low, ratio_high = median_interval(times / first) or (None, None)
    reasons = list(machine)
    if q3 - q1 > SPREAD * median:
        reasons.append(f"the interquartile range is {(q3 - q1) / median:.0%} of the median (limit {SPREAD:.0%})")
    used = first_processor is not None and (first_processor > 0).all()
    return LatencyResult(
        median_ms=float(median),
        q1_ms=float(q1),
        q3_ms=float(q3),
        n=len(times),
        ratio_to_first=float(ratio),
        ratio_q1=float(ratio_q1),
        ratio_q3=float(ratio_q3),
        processor_ms=float(np.median(processor)),
        threads=threads,
        device=device,
        contended=bool(reasons),
        reasons=tuple(reasons),
        times_ms=tuple(float(t) for t in times),
        processor_ratio=float(np.median(processor / first_processor)) if used else None,
        ratio_low=ratio_low,
        ratio_high=ratio_high,
    )


def median_interval(values: np.ndarray, level: float = SURE) -> tuple[float, float] | None:
    """Of a median, by order statistics alone (David & Nagaraja 2003, 7.1); None where there are too few values."""
    order, count = np.sort(values), len(values)
    # The k-th value lies above the median when fewer than k fall below it.
    below = [sum(math.comb(count, i) for i in range(k)) / 2**count for k in range(1, count // 2 + 1)]
    least = sum(2 * chance <= 1 - level for chance in below)
    return (float(order[least - 1]), float(order[count - least])) if least else None


class Contention:
    """What else the machine did between the making of this object and the call of ``reasons``."""

    def __init__(self, own: Sequence[int]) -> None:
        """``own``: process ids whose processor time is not another's."""
        self.own = list(own)
        self.start, self.machine, self.used = time.perf_counter(), machine_seconds(), self._used()

    def _used(self) -> float:
        return sum(processor_seconds(pid) for pid in self.own)

    def reasons(self) -> list[str]:
        """Why a measurement in that time is contended, in words; empty when the machine was quiet."""
        cores, load, found = os.cpu_count() or 1, os.getloadavg()[0], []
        if load > cores:
            found.append(f"the load average is {load:.1f} on {cores} cores")
        after = machine_seconds()
        seconds = time.perf_counter() - self.start
        if self.machine is None or after is None or seconds <= 0:
            return found
        # both counters step by 1/100 s a processor, so that a short watch can see others that are not there
        rounding = (cores + len(self.own)) / os.sysconf("SC_CLK_TCK")
        other = (after[0] - self.machine[0] - (self._used() - self.used) - rounding) / seconds
        stolen = (after[1] - self.machine[1] - cores / os.sysconf("SC_CLK_TCK")) / (seconds * cores)
        if other > OTHER_PROCESSORS:
            found.append(f"other processes kept {other:.1f} of {cores} processors busy")
        if stolen > STOLEN:
            found.append(f"the hypervisor took {stolen:.0%} of the processor time")
        return found
