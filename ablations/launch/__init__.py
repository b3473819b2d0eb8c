"""Where jobs run: this process, local workers or Slurm, all through submitit, with slots of our own on top.

submitit's local executor starts everything at once, shows every job the same GPU and calls a failed job FINISHED. Here a
job waits for a slot, a slot owns its GPUs, and a job has succeeded when its result.json is there.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablations.progress import read_json
from ablations.settings import Launcher

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """Something to run: ``function(folder, plan)``, which leaves result.json or error.json in ``folder``."""

    key: str
    function: Callable[[str, dict[str, Any]], None]
    plan: dict[str, Any]
    folder: Path

    @property
    def succeeded(self) -> bool:
        """Whether the result is there."""
        return (self.folder / "result.json").exists()


def thread_environment(threads: int) -> dict[str, str]:
    """Environment of a process that computes on ``threads`` threads.

    Waiting threads sleep instead of spinning: with spinning, two threads under contention are slower than one.
    """
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false"}


def run_jobs(jobs: Sequence[Job], launcher: Launcher, logs: Path, threads: int, *, started: Callable[[Job], None],
             ended: Callable[[Job, dict[str, str] | None], None], tick: Callable[[], None]) -> None:
    """Run all jobs, at most ``launcher.workers`` at a time, and return when the last has ended.

    Args:
        started: called when a job is submitted.
        ended: called with the job and None, or what went wrong: {"cause", "message", "traceback", "log"}.
        tick: called about twice a second.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, running = list(jobs), {}
    free = list(range(launcher.workers))
    while waiting or running:
        while waiting and free:
            job, slot = waiting.pop(0), free.pop(0)
            (job.folder / "error.json").unlink(missing_ok=True)
            with _environment(thread_environment(threads)):
                submitted = _executor(launcher, logs, threads, slot).submit(job.function, str(job.folder), job.plan)
            started(job)
            running[slot] = (job, submitted)
        tick()
        for slot, (job, submitted) in list(running.items()):
            if launcher.name == "inline":
                error = submitted.exception()           # runs the job; asked once, or it would run again
                ended(job, None if job.succeeded else _failure(job, "", str(error)))
            elif job.succeeded or submitted.done(force_check=True):
                _wait_for_exit(submitted)
                ended(job, None if job.succeeded else _failure(job, str(submitted.paths.stderr), _reason(submitted)))
            else:
                continue
            del running[slot]
            free.append(slot)
        if running:
            time.sleep(POLL_SECONDS)


def _executor(launcher: Launcher, logs: Path, threads: int, slot: int) -> Any:
    import submitit

    folder = logs / "%j"
    if launcher.name == "inline":
        return submitit.DebugExecutor(folder)
    if launcher.name == "local":
        executor = submitit.LocalExecutor(folder, max_num_timeout=0)
        gpus = list(range(slot * launcher.gpus_per_trial, (slot + 1) * launcher.gpus_per_trial))
        executor.update_parameters(timeout_min=launcher.timeout_min, gpus_per_node=len(gpus), visible_gpus=gpus,
                                   setup=tuple(launcher.setup))
        return executor
    executor = submitit.AutoExecutor(folder, cluster="slurm")
    options = {"slurm_partition": launcher.partition, "slurm_account": launcher.account, "slurm_qos": launcher.qos,
               "mem_gb": launcher.memory_gb, "slurm_setup": launcher.setup or None,
               "gpus_per_node": launcher.gpus_per_trial or None}
    executor.update_parameters(timeout_min=launcher.timeout_min, cpus_per_task=threads, name="iris",
                               **{key: value for key, value in options.items() if value is not None})
    return executor


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Any:
    """Environment variables for what is started inside: they must be set before a process loads torch."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def _wait_for_exit(submitted: Any, seconds: float = 10.0) -> None:
    """Let a job that has its result end, so that the next one finds the processor free."""
    deadline = time.monotonic() + seconds
    while not submitted.done(force_check=True) and time.monotonic() < deadline:
        time.sleep(0.1)


def _failure(job: Job, log: str, reason: str) -> dict[str, str]:
    """What went wrong: as the job wrote it, or, when it could not, as its end shows (``reason``; empty if it says nothing)."""
    written = read_json(job.folder / "error.json")
    if written is not None:
        return written | {"log": log or str(job.folder / "error.json")}
    cause = "timeout" if "timed-out" in reason or "timed out" in reason else "error" if reason else "killed"
    message = {"timeout": "over launcher.timeout_min", "error": (reason.strip().splitlines() or [""])[-1],
               "killed": "ended without a result: killed from outside, perhaps for memory"}[cause]
    return {"cause": cause, "kind": cause, "message": message, "traceback": _tail(log), "log": log}


def _reason(submitted: Any) -> str:
    """The error that submitit kept of a job, or nothing when the job could not leave one (it was killed)."""
    if not submitted.paths.result_pickle.exists():
        return ""                                       # asking submitit would wait 15 s for a file that never comes
    return str(submitted.exception() or "")


def _tail(log: str, lines: int = 20) -> str:
    try:
        return "\n".join(Path(log).read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
