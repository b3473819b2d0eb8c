"""Where jobs run: this process, local workers or Slurm, all through submitit.

submitit's local executor starts everything at once, shows every job the same GPU and calls a failed job FINISHED. Here a
job waits for a slot, a slot owns its GPUs, and a job has succeeded when its result.json is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ablations.launch.job import Job, forget_error

if TYPE_CHECKING:
    from ablations.question.settings import Launcher


class Backend(Protocol):
    """A place where jobs run."""

    poll_seconds: float  # between two looks

    def begin(self, jobs: Sequence[Job]) -> None:
        """Make sure that each job is under way or queued, here or by whoever came before."""
        ...

    def running(self) -> set[str]:
        """Keys of the jobs that are being computed."""
        ...

    def places(self) -> dict[str, str]:
        """Job key -> the node that it is on, or why it waits; nothing where all is on this machine."""
        ...

    def ended(self, waiting: Mapping[str, Job]) -> dict[str, dict[str, str]]:
        """Of the jobs that have no result: what went wrong with those that will not get one."""
        ...

    def cancel(self) -> None:
        """Stop what ``begin`` started."""
        ...


def make_backend(launcher: Launcher, runs: Path, threads: int, device: str = "cpu") -> Backend:
    """The place that ``launcher.name`` says; ``runs`` is the runs folder, ``threads`` those of a job on ``device``."""
    if launcher.name == "inline":
        from ablations.launch.inline import Inline

        return Inline(runs / "logs")
    if launcher.name == "local":
        from ablations.launch.pool import Pool

        return Pool(launcher, runs, threads, device)
    from ablations.launch.slurm import Slurm

    return Slurm(launcher, runs, threads)


class JobRun:
    """Jobs under way at a backend.

    Args:
        started: called when a job is first seen at work.
        ended: called with the job and None, or what went wrong: {"cause", "message", "traceback", "log"}.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        backend: Backend,
        started: Callable[[Job], None],
        ended: Callable[[Job, dict[str, str] | None], None],
    ) -> None:
        self.backend, self.started, self.ended = backend, started, ended
        self.waiting = {job.key: job for job in jobs}
        self._told: set[str] = set()
        for job in jobs:
            forget_error(job)
        backend.begin(jobs)

    def look(self) -> None:
        """See what began and what ended since the last look."""
        for key in self.backend.running() & self.waiting.keys() - self._told:
            self._told.add(key)
            self.started(self.waiting[key])
        errors = self.backend.ended(self.waiting)
        for key, job in list(self.waiting.items()):
            if job.succeeded or key in errors:
                if key not in self._told:  # quicker than two looks
                    self.started(job)
                self.ended(job, None if job.succeeded else errors[key])
                del self.waiting[key]  # after it: an interrupt must not lose the news


def run_jobs(run: JobRun, tick: Callable[[], None]) -> None:
    """Follow a run to its end; ``tick`` is called at each look. Called again after an interrupt it goes on."""
    while run.waiting:
        tick()
        run.look()
        if run.waiting:
            time.sleep(run.backend.poll_seconds)
