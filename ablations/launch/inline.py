"""Jobs in this process, one after another: for a debugger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ablations.launch.job import Job, failure, needs_failed


class Inline:
    """submitit's debug executor, which opens pdb where a job raises."""

    poll_seconds = 0.0

    def __init__(self, logs: Path) -> None:
        self.logs, self.open = logs, dict[str, Job]()

    def begin(self, jobs: Sequence[Job]) -> None:
        """Take the jobs; none runs yet."""
        self.open = {job.key: job for job in jobs}

    def running(self) -> set[str]:
        """The job that is next."""
        return set(list(self.open)[:1])

    def places(self) -> dict[str, str]:
        """Nothing: all is on this machine."""
        return {}

    def ended(self, waiting: Mapping[str, Job]) -> dict[str, dict[str, str]]:
        """Run the next job; says what went wrong with it, if anything did."""
        import submitit

        key, job = next(iter(self.open.items()))
        del self.open[key]
        if job.needed == "failed":
            return {key: needs_failed(job)}
        error = submitit.DebugExecutor(self.logs / "%j").submit(job.function, str(job.folder), job.plan).exception()
        if job.succeeded:
            return {}
        return {key: failure(job, "error", (str(error).strip().splitlines() or ["no result"])[-1], "")}

    def cancel(self) -> None:
        """Nothing runs but this process."""
        self.open.clear()
