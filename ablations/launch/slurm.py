"""Jobs on a Slurm cluster: arrays with a limit, dependencies on shared work, requeues that continue.

What runs where is asked of ``squeue``, one call for all jobs, which clusters without accounting have as well; whether a job
that squeue does not know is alive is told by its heartbeat. submitit alone would wait for ever for a job that was killed
where ``sacct`` is off. Each job's id is kept in its folder, so that a second driver takes over instead of submitting again.
"""

from __future__ import annotations

import getpass
import pwd
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from submitit.helpers import DelayedSubmission

from ablations.launch.heartbeat import Listener, heartbeat
from ablations.launch.job import Job, failure, needs_failed, no_room, tail
from ablations.launch.trial_state import state_of
from iris.errors import SettingError
from iris.io.files import read_json, write_json

if TYPE_CHECKING:  # it knows the model, and with it torch, which a job imports only if it needs it
    from ablations.question.settings import Launcher

RECORD = "job.json"  # {"id", "log", "time", "user"} of the job that was last submitted for a folder
SETTLE_SECONDS = 15.0  # from a job's end to its files being seen on every node
SILENT_SECONDS = 600.0  # without squeue, a job whose heart has not beaten this long is dead
ASK_SECONDS = 15.0  # what ended well is seen by its files at once
ASK_AGAIN = (1.0, 2.0, 4.0, 8.0)  # seconds between tries before anything is submitted
ALIVE = (
    "PENDING",
    "RUNNING",
    "CONFIGURING",
    "COMPLETING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
    "SIGNALING",
    "STOPPED",
    "SUSPENDED",
    "SPECIAL_EXIT",
)
# submitit handles USR2, once it is imported; before, the signal would end a job that Slurm means to queue again.
DEAF = """sh -c 'trap "" USR2; exec "$@"' sh """
# What Slurm writes to a job's log when it ends it, and our word for it.
ENDINGS = {
    "timeout": ("DUE TO TIME LIMIT", "timed-out"),
    "oom": ("exceeded memory limit", "oom_kill", "oom-kill", "Out Of Memory"),
    "killed": ("DUE TO NODE FAILURE", "CANCELLED AT", "Killed"),
}
MESSAGES = {
    "timeout": "over launcher.timeout_min, {requeues} requeues included",
    "oom": "over launcher.memory_gb",
    "killed": "ended without a result: cancelled or killed from outside",
}


class Resumable:
    """What submitit runs: a job that, told to stop, is queued again and continues from its files."""

    def __call__(self, function: Callable[[str, dict[str, Any]], None], folder: str, plan: dict[str, Any]) -> None:
        """Run ``function(folder, plan)`` with a beating heart."""
        with heartbeat(Path(folder)):
            function(folder, plan)

    def checkpoint(self, *given: Any) -> DelayedSubmission:
        """The same again: what was reached is in the folder, not here."""
        return DelayedSubmission(self, *given)


@dataclass(frozen=True)
class Listed:
    """A job as squeue lists it."""

    state: str
    node: str
    reason: str


class Slurm:
    """The driver's side of a cluster."""

    poll_seconds = 0.5

    def __init__(self, launcher: Launcher, runs: Path, threads: int) -> None:
        self.launcher, self.threads, self.runs, self.logs = launcher, threads, runs, runs / "logs"
        self.ids: dict[str, str] = {}  # job key -> Slurm id
        self.paths: dict[str, str] = {}  # job key -> log
        self.gone: dict[str, float] = {}  # job key -> when squeue first did not list it
        self.listener = Listener()
        self.users = set[str]()  # others whose jobs these may be
        self._asked, self._listed = -1e9, dict[str, Listed]()
        self._answered = False

    def begin(self, jobs: Sequence[Job]) -> None:
        """Submit what no living job has been submitted for; the jobs that others need first."""
        from ablations.launch.processes import deaf_to_interrupts

        self.logs.mkdir(parents=True, exist_ok=True)
        with FileLock(self.runs / "slurm.lock"):  # two drivers that start at once must not both submit
            self.users = {record["user"] for job in jobs if not job.succeeded and (record := _record(job)).get("user")}
            self._ask_first()
            fresh = [job for job in jobs if not job.succeeded and not self._adopt(job)]
            by_folder = {job.folder: job for job in jobs}
            for group in _grouped(fresh):
                before = [
                    self.ids[by_folder[place].key]
                    for place in group[0].needs
                    if place in by_folder and by_folder[place].key in self.ids
                ]
                for part in _parts(group, self.launcher.array_size):
                    with deaf_to_interrupts():  # what is submitted must be written down
                        self._submit(part, before)
            self._ask(force=True)

    def running(self) -> set[str]:
        """Keys of the jobs that squeue calls running."""
        self._ask()
        return {
            key for key, number in self.ids.items() if (found := self._listed.get(number)) and found.state == "RUNNING"
        }

    def places(self) -> dict[str, str]:
        """Job key -> the node that it is on, or why it waits, as squeue says."""
        return {
            key: found.node or found.reason for key, number in self.ids.items() if (found := self._listed.get(number))
        }

    def ended(self, waiting: Mapping[str, Job]) -> dict[str, dict[str, str]]:
        """What went wrong with the jobs that are over without a result."""
        self._ask()
        errors = {}
        for key, job in waiting.items():
            if job.failed:
                errors[key] = failure(job, "error", "", self.paths.get(key, ""))
            elif not job.succeeded and self._over(job):
                errors[key] = needs_failed(job) if job.needed == "failed" else self._ending(job)
        return errors

    def cancel(self) -> None:
        """Cancel the jobs, queued and running."""
        cancel_jobs(self.ids.values())

    def _over(self, job: Job) -> bool:
        """Whether a job will give no result any more."""
        number, now = self.ids.get(job.key), time.monotonic()
        if self._answered and number in self._listed:
            self.gone.pop(job.key, None)
            return False
        silent = self.listener.silence(job.folder)
        if not self._answered:
            return silent is not None and silent > SILENT_SECONDS
        since = self.gone.setdefault(job.key, now)
        return now - since > SETTLE_SECONDS and (silent is None or silent > SETTLE_SECONDS)

    def _ending(self, job: Job) -> dict[str, str]:
        """How a job ended that could not say so itself: by the logs of its processes, then by accounting."""
        log = Path(self.paths.get(job.key, ""))
        logs = sorted(log.parent.glob(log.name.replace("_0_log", "_*_log"))) if log.name else []
        raised = next(
            (path for path in logs if path.with_name(path.name.replace("_log.err", "_result.pkl")).exists()), None
        )
        text = "".join(tail(path, 50) for path in logs)
        cause = next((cause for cause, marks in ENDINGS.items() if any(mark in text for mark in marks)), None)
        if raised and cause not in ("timeout", "oom"):  # submitit kept what this process raised
            return failure(job, "error", _last_words(raised), str(raised))
        if full := no_room(self.runs):
            return failure(job, "disk", full, str(log))
        cause = _accounted(self.ids.get(job.key, "")) or cause or "killed"
        return failure(job, cause, MESSAGES[cause].format(requeues=self.launcher.requeues), str(log))

    # -- submitting -----------------------------------------------------------------------------------------------

    def _adopt(self, job: Job) -> bool:
        """Take over a job that an earlier driver submitted and that is still there."""
        record = _record(job)
        others = record.get("user", getpass.getuser()) != getpass.getuser() and state_of(job.folder).state == "running"
        if record.get("id") not in self._listed and not others:  # some clusters show nobody the jobs of others
            return False
        self.ids[job.key], self.paths[job.key] = record["id"], record["log"]
        return True

    def _submit(self, jobs: Sequence[Job], before: Sequence[str]) -> None:
        executor = self._executor(jobs[0], before)
        try:
            handles = executor.map_array(
                Resumable(),
                [job.function for job in jobs],
                [str(job.folder) for job in jobs],
                [job.plan for job in jobs],
            )
        except Exception as error:  # submitit's own kinds of failed command
            said = str(error).strip().splitlines() or ["sbatch failed"]
            raise SettingError(
                f"launcher=slurm: sbatch refused the jobs: {said[-1]} (launcher.partition, .account, .qos, "
                ".constraint, .gpus_per_trial, .nodes, .memory_gb, .timeout_min say what is asked for)"
            ) from error
        for job, handle in zip(jobs, handles, strict=True):
            self.ids[job.key], self.paths[job.key] = handle.job_id, str(handle.paths.stderr)
            job.folder.mkdir(parents=True, exist_ok=True)
            write_json(
                job.folder / RECORD,
                {"id": handle.job_id, "log": self.paths[job.key], "time": time.time(), "user": getpass.getuser()},
                durable=False,
            )

    def _executor(self, job: Job, before: Sequence[str]) -> Any:
        import submitit

        from ablations.launch.processes import thread_environment

        chosen, threads = self.launcher, job.plan.get("threads", self.threads)
        try:
            executor = submitit.SlurmExecutor(
                self.logs / "%j",
                max_num_timeout=chosen.requeues,
                python=DEAF + (chosen.python or shlex.quote(sys.executable)),
            )
        except RuntimeError as error:
            raise SettingError(
                "launcher=slurm: there is no srun on this machine; allowed here: local, inline"
            ) from error
        exports = [f"export {name}={value}" for name, value in thread_environment(threads).items()]
        memory = (
            "0" if job.exclusive else _memory(chosen.memory_gb)
        )  # 0: all that the node has, for as many models as are compared
        options = {
            "partition": chosen.partition,
            "account": chosen.account,
            "qos": chosen.qos,
            "mem": memory,
            "constraint": (job.exclusive and chosen.speed_constraint) or chosen.constraint,
            "exclusive": job.exclusive or None,
            "gpus_per_node": chosen.gpus_per_trial or None,
            "setup": [*exports, *chosen.setup],
            "dependency": f"afterany:{':'.join(before)}" if before else None,
        }
        executor.update_parameters(
            job_name="iris",
            time=chosen.timeout_min,
            cpus_per_task=threads,
            nodes=chosen.nodes if job.spread else 1,
            ntasks_per_node=max(1, chosen.gpus_per_trial) if job.spread else 1,
            array_parallelism=chosen.workers,
            signal_delay_s=chosen.signal_s,
            srun_args=["--kill-on-bad-exit=1"],
            additional_parameters={"requeue": True, **chosen.sbatch},
            **{key: value for key, value in options.items() if value is not None},
        )
        return executor

    # -- asking ---------------------------------------------------------------------------------------------------

    def _ask_first(self) -> None:
        """Ask until squeue answers: without it, what lives would be submitted a second time.

        Raises:
            SettingError: it does not.
        """
        for wait in (*ASK_AGAIN, None):
            self._ask(force=True)
            if self._answered:
                return
            if wait is not None:
                time.sleep(wait)
        raise SettingError("launcher=slurm: squeue does not answer; nothing was submitted, run the same command again")

    def _ask(self, force: bool = False) -> None:
        """Ask squeue for the jobs, at most every few seconds; an answer that fails leaves the last one."""
        if not force and time.monotonic() - self._asked < ASK_SECONDS:
            return
        self._asked = time.monotonic()
        listed = listed_jobs(self.users)
        self._answered = listed is not None
        if listed is not None:
            self._listed = listed


def _record(job: Job) -> dict[str, Any]:
    return read_json(job.folder / RECORD) or {}


def listed_jobs(others: Iterable[str] = ()) -> dict[str, Listed] | None:
    """Jobs of this user and of ``others`` that are queued or run, by id, or None: squeue does not answer.

    Raises:
        SettingError: there is no squeue.
    """
    users = ",".join([getpass.getuser(), *sorted(filter(_is_known, set(others) - {getpass.getuser()}))])
    try:
        answer = subprocess.run(
            ["squeue", "--noheader", "--array", "--states=all", f"--user={users}", "--format=%i|%T|%N|%r"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
    except FileNotFoundError as error:
        raise SettingError("launcher=slurm: there is no squeue on this machine; allowed here: local, inline") from error
    except (subprocess.SubprocessError, OSError):
        return None
    rows = (line.split("|", 3) for line in answer.splitlines() if line.count("|") >= 3)
    return {number: Listed(state, node, reason) for number, state, node, reason in rows if state in ALIVE}


def _is_known(user: str) -> bool:
    """Whether this machine has a user of that name: squeue answers nothing at all where one is unknown."""
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def cancel_jobs(numbers: Iterable[str]) -> int:
    """Cancel those of the jobs that are queued or run, or all where squeue does not answer; returns how many.

    Raises:
        SettingError: there is no squeue.
    """
    listed = listed_jobs()
    there = sorted(set(numbers) if listed is None else set(numbers) & listed.keys())
    for part in _parts(there, 200):
        subprocess.run(["scancel", *part], capture_output=True, check=False)
    return len(there)


def _grouped(jobs: Iterable[Job]) -> list[list[Job]]:
    """Jobs by what they need and how they run, which one array shares; those that need nothing first."""
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in sorted(jobs, key=lambda job: len(job.needs)):
        groups.setdefault((job.needs, job.spread, job.exclusive, job.plan.get("threads")), []).append(job)
    return list(groups.values())


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    """A list in parts of at most ``size``."""
    return (items[first : first + size] for first in range(0, len(items), size))


def _last_words(log: Path) -> str:
    """The last line of a log that is the job's own, not Slurm's."""
    own = [
        line for line in tail(log, 50).splitlines() if line.strip() and not line.startswith(("srun:", "slurmstepd:"))
    ]
    return own[-1] if own else "ended with an error"


def _memory(gigabytes: float | None) -> str | None:
    return None if gigabytes is None else f"{int(gigabytes * 1024)}MB"


def _accounted(number: str) -> str | None:
    """How accounting says that a job ended; None where it says nothing."""
    try:
        answer = subprocess.run(
            ["sacct", "--noheader", "--parsable2", "--format=State", "-X", "-j", number],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
    except (subprocess.SubprocessError, OSError):
        return None
    word = re.match(r"[A-Z_]*", answer.strip())
    return {"TIMEOUT": "timeout", "OUT_OF_MEMORY": "oom"}.get(word.group() if word else "")
