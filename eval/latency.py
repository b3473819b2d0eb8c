"""How long one image takes, several models against each other.

Models run in processes of their own and in turn, A B C C B A ..., so that a drift of the machine meets all of them
alike. What counts is the ratio to the first model inside one round; milliseconds belong to this machine alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from eval.memory import MemoryResult, worker_memory
from eval.probes import machine_seconds, processor_seconds
from eval.workers import Loader, Worker

# A measurement is called contended above these: processors kept busy by other processes, share of processor time taken
# by the hypervisor, and the spread (IQR / median) that torch.utils.benchmark also warns at.
OTHER_PROCESSORS = 0.2
STOLEN = 0.02
SPREAD = 0.10


@dataclass(frozen=True)
class LatencyResult:
    """One image's time over the measured rounds.

    ``ratio_to_first`` is the median over rounds of this model's time over the first model's in the same round, with its
    quartiles. ``contended`` tells that the figures should not be quoted, ``reasons`` why; ratios suffer less.
    """

    median_ms: float
    q1_ms: float
    q3_ms: float
    n: int
    ratio_to_first: float
    ratio_q1: float
    ratio_q3: float
    processor_ms: float     # median processor time, all threads; on one thread untouched by other processes
    threads: int
    device: str
    contended: bool
    reasons: tuple[str, ...]
    times_ms: tuple[float, ...]


@dataclass(frozen=True)
class SpeedAndMemory:
    """Both figures of one model, from one process."""

    latency: LatencyResult
    memory: MemoryResult


def measure_models(loaders: dict[str, Loader], rounds: int = 30, warmup: int = 3, threads: int = 1,
                   timeout: float = 600.0) -> dict[str, SpeedAndMemory]:
    """Memory of each model in its fresh process, then the latency of all of them, interleaved.

    Only one model runs at any time; all of them stay loaded.

    Args:
        loaders: name -> where the model comes from; the first is the one that ratios are taken to.
        rounds: measured rounds, one image of every model each; 30 or more for figures that are quoted.
        warmup: rounds before that, not counted; 10 or more on CUDA.
        threads: processor threads of each process.
        timeout: seconds that one image or the loading of one model may take.

    Raises:
        ValueError: no loaders, rounds below 2, warmup below 0, threads below 1.
        WorkerError: a model failed; the message names it.
    """
    if not loaders or rounds < 2 or warmup < 0:
        raise ValueError(f"loaders must not be empty, rounds >= 2 and warmup >= 0, "
                         f"got {len(loaders)} loaders, {rounds} and {warmup}")
    with ExitStack() as stack:
        workers: list[Worker] = []
        memory: dict[str, MemoryResult] = {}
        for name, loader in loaders.items():
            workers.append(stack.enter_context(Worker(name, loader, threads, timeout)))
            memory[name] = worker_memory(workers[-1])
        latency = _interleave(workers, rounds, warmup, threads)
    return {name: SpeedAndMemory(latency[name], memory[name]) for name in loaders}


def measure_latency(loaders: dict[str, Loader], rounds: int = 30, warmup: int = 3, threads: int = 1,
                    timeout: float = 600.0) -> dict[str, LatencyResult]:
    """The latency part of ``measure_models``."""
    return {name: result.latency for name, result in
            measure_models(loaders, rounds, warmup, threads, timeout).items()}


def visiting_order(count: int, rounds: int) -> list[list[int]]:
    """Indices of the models in each round: forwards in even rounds, backwards in odd ones."""
    return [list(range(count))[::1 if i % 2 == 0 else -1] for i in range(rounds)]


def _interleave(workers: Sequence[Worker], rounds: int, warmup: int, threads: int) -> dict[str, LatencyResult]:
    wall, processor = np.zeros((2, len(workers), rounds))
    for order in visiting_order(len(workers), warmup):
        for i in order:
            workers[i].ask("time")
    watch = Contention([worker.pid for worker in workers] + [os.getpid()])
    for k, order in enumerate(visiting_order(len(workers), rounds)):
        for i in order:
            answer = workers[i].ask("time")
            wall[i, k], processor[i, k] = answer["wall_ms"], answer["processor_ms"]
    machine = watch.reasons()
    return {worker.name: _summary(wall[i], wall[0], processor[i], threads, worker.loaded["device"], machine)
            for i, worker in enumerate(workers)}


def _summary(times: np.ndarray, first: np.ndarray, processor: np.ndarray, threads: int, device: str,
             machine: list[str]) -> LatencyResult:
    q1, median, q3 = np.percentile(times, [25, 50, 75])
    ratio_q1, ratio, ratio_q3 = np.percentile(times / first, [25, 50, 75])
    reasons = list(machine)
    if q3 - q1 > SPREAD * median:
        reasons.append(f"the interquartile range is {(q3 - q1) / median:.0%} of the median (limit {SPREAD:.0%})")
    return LatencyResult(
        median_ms=float(median), q1_ms=float(q1), q3_ms=float(q3), n=len(times), ratio_to_first=float(ratio),
        ratio_q1=float(ratio_q1), ratio_q3=float(ratio_q3), processor_ms=float(np.median(processor)), threads=threads,
        device=device, contended=bool(reasons), reasons=tuple(reasons), times_ms=tuple(float(t) for t in times))


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
