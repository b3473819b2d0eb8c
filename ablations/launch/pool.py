"""Local workers: a process a slot that imports everything once and runs each job in a copy of itself.

Workers are submitit jobs. They choose among the jobs of a list by locks, which die with their holders: so the driver may
go, several drivers may share the slots of one runs folder, and no job runs twice at once. A slot is
``runs/pool/slot-HOST-N``: its lock is held by the worker, and by a job of a worker that was killed, for as long as it
computes. Machines that share the folder have slots of their own, and their processes are not ours to signal.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ablations.launch.gpus import VISIBLE, slots
from ablations.launch.job import Job, failure, needs_failed, no_room, tail, write_error
from iris.io.files import read_json, write_json
from iris.io.hashing import digest

if TYPE_CHECKING:
    from ablations.question.settings import Launcher

YEAR = 60 * 24 * 365  # minutes: a worker ends with its list; time limits are a job's
HOST = socket.gethostname().partition(".")[0]
IDLE_STARTS = 3  # workers of a slot in a row that ended without any job having ended meanwhile


def try_lock(path: Path) -> IO[str] | None:
    """The lock of a file, or None while another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def is_locked(path: Path) -> bool:
    """Whether a living process holds the file's lock; on a disk that is only read nobody does."""
    try:
        file = try_lock(path)
    except OSError:
        return False
    if file is None:
        return True
    file.close()
    return False


def slot_file(pool: Path, slot: int, suffix: str) -> Path:
    """A file of this machine's slot."""
    return pool / f"slot-{HOST}-{slot}{suffix}"


def local_slots(pool: Path) -> list[dict[str, Any]]:
    """What the living workers of this machine say they do."""
    return [read_json(path) or {} for path in pool.glob(f"slot-{HOST}-*.json") if is_locked(path.with_suffix(".lock"))]


class Pool:
    """The driver's side: keeps a worker in each slot that is free while its jobs are open."""

    poll_seconds = 0.5

    def __init__(self, launcher: Launcher, runs: Path, threads: int, device: str = "cpu") -> None:
        self.launcher, self.threads, self.folder, self.logs = launcher, threads, runs / "pool", runs / "logs"
        self.device, self.gpus = device, list[list[str]]()
        self.listing: Path | None = None
        self.listed: dict[str, Any] = {}
        self.workers: dict[int, Any] = {}
        self.left: dict[int, int] = {}  # slot -> jobs that were open when its worker was started
        self.starts = 0
        self.idle: dict[int, int] = {}

    def begin(self, jobs: Sequence[Job]) -> None:
        """Write the list that workers read, and start them.

        Raises:
            SettingError: GPUs are asked for that are not on this machine.
        """
        self.gpus = slots(self.launcher, self.device)  # now: a report needs none
        listed = [
            {
                "key": job.key,
                "function": f"{job.function.__module__}:{job.function.__name__}",
                "plan": job.plan,
                "folder": str(job.folder),
                "needs": [str(place) for place in job.needs],
            }
            for job in jobs
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.listing = self.folder / f"{digest([os.getpid(), time.time(), [job.key for job in jobs]])}.json"
        self.listed = {"jobs": listed, "timeout_s": 60 * self.launcher.timeout_min, "logs": str(self.logs)}
        self._fill(len(jobs))

    def running(self) -> set[str]:
        """Keys of the jobs that workers say they compute, whoever started them."""
        return {slot["job"] for slot in self._slots() if slot.get("job")}

    def places(self) -> dict[str, str]:
        """Nothing: all is on this machine."""
        return {}

    def ended(self, waiting: Mapping[str, Job]) -> dict[str, dict[str, str]]:
        """What went wrong with jobs that ended without a result."""
        errors = {
            key: failure(job, "error", "", str(self.logs / f"{key}.log")) for key, job in waiting.items() if job.failed
        }
        left = len(waiting) - len(errors)
        if left and not self._fill(left):
            log = next((str(worker.paths.stderr) for worker in self.workers.values()), "")
            full = no_room(self.folder)
            reason = full or f"no worker could be started that finishes a job, {IDLE_STARTS} were tried"
            errors |= {
                key: failure(job, "disk" if full else "killed", reason, log)
                for key, job in waiting.items()
                if key not in errors
            }
        return errors

    def cancel(self) -> None:
        """Stop the workers of this list and what they compute, each after a checkpoint."""
        if self.listing is None:
            return
        self.listing.with_suffix(".cancel").touch()
        stop(slot for slot in self._slots() if slot.get("listing") == str(self.listing))

    def _slots(self) -> list[dict[str, Any]]:
        return local_slots(self.folder)

    def _fill(self, wanted: int) -> bool:
        """Start a worker in each free slot, not more than there are jobs; False when all end without finishing any."""
        alive = False
        for slot in range(min(len(self.gpus), wanted)):
            worker = self.workers.get(slot)
            if is_locked(slot_file(self.folder, slot, ".lock")) or (worker and not worker.done(force_check=True)):
                alive = True  # at work, or importing
                continue
            if worker is not None:
                self.idle[slot] = 0 if wanted < self.left[slot] else self.idle.get(slot, 0) + 1
            if self.idle.get(slot, 0) < IDLE_STARTS:
                self.left[slot], self.workers[slot], alive = wanted, self._start(slot), True
        return alive

    def _start(self, slot: int) -> Any:
        import submitit

        from ablations.launch.processes import deaf_to_interrupts, environment, thread_environment

        if not self.listing.exists():  # the first, or a worker thought that all was done
            write_json(self.listing, self.listed, durable=False)
        self.starts += 1
        # Not "%j": submitit 1.5.4 starts the process that writes to such a folder before it makes it.
        executor = submitit.LocalExecutor(self.logs / f"{self.listing.stem}-{self.starts}", max_num_timeout=0)
        # submitit hides all GPUs and takes numbers only; a shell's line gives a slot its own, whatever they are called.
        gpus = ",".join(self.gpus[slot])
        own = (f"export {VISIBLE}={shlex.quote(gpus)}",) if gpus else ()
        executor.update_parameters(timeout_min=YEAR, setup=(*own, *self.launcher.setup))
        with environment(thread_environment(self.threads)), deaf_to_interrupts():
            return executor.submit(serve, str(self.listing), slot)


def stop(slots: Iterable[dict[str, Any]]) -> None:
    """End workers and what they compute, which writes a checkpoint first and may have outlived its worker."""
    for slot in slots:
        for pid in filter(None, (slot.get("pid"), slot.get("child"))):  # the worker first: it is to take no other job
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def serve(listing: str, slot: int) -> None:
    """A worker: run the jobs of a list until none is open, one after another, each in a fork of this process."""
    path = Path(listing)
    for _ in range(20):  # a driver that looks holds the lock for a moment
        lock = try_lock(slot_file(path.parent, slot, ".lock"))
        if lock is not None:
            break
        time.sleep(0.05)
    given = read_json(path)
    if lock is None or given is None:  # another worker was quicker, or all is done
        return
    worker = Worker(path, slot, given)
    signal.signal(signal.SIGTERM, worker.terminate)
    for module in {sys.modules[job.function.__module__] for job in worker.jobs}:
        getattr(module, "preload", int)()  # paid once: every job's process has it already
    worker.run()


class Worker:
    """One worker's loop over its list."""

    def __init__(self, listing: Path, slot: int, given: dict[str, Any]) -> None:
        self.listing, self.path, self.given = listing, slot_file(listing.parent, slot, ".json"), given
        self.jobs = [
            Job(j["key"], _function(j["function"]), j["plan"], Path(j["folder"]), tuple(map(Path, j["needs"])))
            for j in given["jobs"]
        ]
        self.child: int | None = None
        self.stopped = False

    def run(self) -> None:
        """Until no job is open that this worker could run or wait for."""
        self._say(None)
        while not self.stopped:
            left = [job for job in self.jobs if not (job.succeeded or job.failed)]
            if not left:
                break
            ran = False
            for job in left:
                if self.stopped or self.listing.with_suffix(".cancel").exists():
                    return
                if job.succeeded or job.failed:
                    continue
                if job.needed == "failed":
                    write_error(job.folder, **needs_failed(job))
                elif job.needed == "ready":
                    ran |= self._run(job)
            if not ran:
                time.sleep(0.2)  # the others are computed elsewhere, or wait for shared work
        self.listing.unlink(missing_ok=True)

    def terminate(self, number: int, frame: object) -> None:
        """Pass SIGTERM on and take no further job."""
        self.stopped = True
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.child, signal.SIGTERM)

    def _run(self, job: Job) -> bool:
        """Run a job in a fork of this process; False when another process computes it already."""
        job.folder.mkdir(parents=True, exist_ok=True)
        claim = try_lock(job.folder / "claim")
        if claim is None:
            return False
        log = Path(self.given["logs"]) / f"{job.key}.log"
        try:
            if job.succeeded or job.failed:
                return False
            self.child = os.fork()
            if self.child == 0:
                _in_child(job, log)
            self._say(job.key)
            with contextlib.suppress(OSError):
                print(f"{job.key}: process {self.child}", flush=True)
            code, late = _wait(self.child, self.given["timeout_s"])
        finally:
            claim.close()  # the child has its own copy of the lock
        self.child = None
        self._say(None)
        if late:
            write_error(job.folder, "timeout", "over launcher.timeout_min", tail(log), str(log))
        elif code < 0 and not self.stopped:
            write_error(
                job.folder,
                "killed",
                f"ended without a result: killed from outside by {signal.Signals(-code).name}, perhaps for memory",
                tail(log),
                str(log),
            )
        elif code != 0 and not self.stopped:
            write_error(job.folder, "error", f"exit status {code} without an error", tail(log), str(log))
        return True

    def _say(self, key: str | None) -> None:
        write_json(
            self.path,
            {"pid": os.getpid(), "listing": str(self.listing), "job": key, "child": self.child},
            durable=False,
        )


def _function(name: str) -> Any:
    import importlib

    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _in_child(job: Job, log: Path) -> None:
    """The job's own process; does not return."""
    code = 1
    try:
        code = _code_of(job, log)
    except BaseException:  # a full disk takes neither a log nor error.json; the worker must not go on twice
        pass
    finally:
        os._exit(code)


def _code_of(job: Job, log: Path) -> int:
    """Run a job with its output in ``log``; its exit code."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 0
    try:
        job.function(str(job.folder), job.plan)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        code = 1
        with contextlib.suppress(OSError):
            traceback.print_exc()
        write_error(job.folder, "error", str(error) or type(error).__name__, traceback.format_exc(), str(log))
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _wait(child: int, seconds: float, grace: float = 30.0) -> tuple[int, bool]:
    """Exit code of a process (minus a signal's number) and whether it was ended for its time."""
    deadline, late = time.monotonic() + seconds, False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), late
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL if late else signal.SIGTERM)
            late, deadline = True, time.monotonic() + grace
        time.sleep(0.05)
