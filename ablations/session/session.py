"""One invocation of one grid: run what is missing, follow it, measure speed, report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablations.answer.notes import notes_of
from ablations.answer.provenance import command, commit, hardware
from ablations.answer.records import GridOutcome, TrialRecord, measures_of
from ablations.launch.backend import JobRun, make_backend, run_jobs
from ablations.launch.job import ERROR, RESULT, Job
from ablations.launch.trial_state import state_of
from ablations.question.axes import values_by_setting
from ablations.question.grid import expectations
from ablations.question.plan import Plan, Trial
from ablations.question.registration import question_of, register, registered
from ablations.question.settings import Settings
from ablations.report.places import VERDICT
from ablations.report.process import write_report_apart
from ablations.session.arm_speed import ArmSpeed
from ablations.session.grid_record import CANCELLED, GridRecord
from ablations.session.schedule import jobs_of, shared_stages
from iris.errors import SettingError
from iris.io.files import read_json

if TYPE_CHECKING:
    from ablations.session.watch import Watch
    from ablations.track.tracking import Tracker

MANY = 20  # finished trials that are not told of one by one
UNFINISHED = {
    "running": "it is still running",
    "stopped": "it was stopped; the same command continues it",
    "waiting": "it has not begun",
}


class Detached(Exception):
    """The person left; the trials run on."""


class Cancelled(KeyboardInterrupt):
    """``action=cancel`` stopped the grid from another terminal."""


class Session:
    """What an invocation knows.

    Args:
        record, report: where the grid's record and its report go.
        only: keys of the trials to run if they are missing (None: all).
    """

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        watch: Watch,
        tracker: Tracker,
        record: Path,
        report: Path,
        only: set[str] | None = None,
    ) -> None:
        self.settings, self.plan, self.watch, self.tracker, self.only = settings, plan, watch, tracker, only
        self.report = report
        self.trials = {trial.key: trial for trial in plan.trials}
        self.cached = {key for key, trial in self.trials.items() if (plan.folder(trial) / RESULT).exists()}
        self.errors: dict[str, dict[str, str]] = {}
        self.notes: list[str] = []
        self.began = time.monotonic()
        self.backend = make_backend(settings.launcher, plan.runs, plan.threads, settings.compute.device)
        self.reads_only = settings.action == "report"  # also what lies on a disk that cannot be written
        self._record, self._cancelled = record, record.with_suffix(CANCELLED)
        if not self.reads_only:
            self._cancelled.unlink(missing_ok=True)  # what was cancelled before is not any more
            self._write_record()
        self.registration = self._registered()

    def run(self) -> tuple[GridOutcome, Path, list[str]]:
        """Everything; returns the outcome, the report's path, and what MLflow could not take.

        Raises:
            SettingError: the data cannot be used, which only reading them showed.
            Detached: the person left.
            KeyboardInterrupt: the person stopped it, here or with ``action=cancel``.
        """
        tracker, grid = self.tracker, self.settings.grid
        tracker.start(self.outcome([]), self.plan.trials, self.settings.seeds, grid.baseline)
        listed = self._jobs()
        self._show(listed)
        self._follow(listed)
        speed = self._speed()
        records = [self.record(trial, speed.get(trial.arm, {})) for trial in self.plan.trials]
        unfinished = [record for record in records if record.state == "failed" and record.error["cause"] in UNFINISHED]
        for record in records:
            if record not in unfinished:  # action=report while others run them, or on what was stopped
                tracker.trial_finished(record)
        outcome = self.outcome(records)
        self.watch.note("writing the report")
        report = write_report_apart(outcome, self.report)
        self.watch.note("finishing MLflow")
        if unfinished:
            tracker.detach()
            return outcome, report, tracker.problems
        failed = any(record.state == "failed" for record in records)
        verdict = read_json(report.parent / VERDICT) or {}
        problems = tracker.finish(outcome, report.parent, "FAILED" if failed else "FINISHED", verdict["verdict"])
        return outcome, report, problems

    def _registered(self) -> dict[str, Any] | None:
        """The question, written down before a trial begins; a report alone only looks whether it was."""
        question = question_of(self.settings, self.plan, commit())
        if self.reads_only:
            return registered(question, self.plan.runs)
        return register(question, self.plan.runs, len(self.cached), len(self.trials), self.settings.reason)

    def _speed(self) -> dict[str, dict[str, Any]]:
        on_cluster = self.settings.launcher.name == "slurm"
        arms = ArmSpeed(
            self.plan, self.backend, self.watch, self._tick, self.settings.launcher if on_cluster else None, self.notes
        )
        return arms.measure(stored=self.reads_only)

    def _write_record(self) -> None:
        grid = self.settings.grid
        GridRecord.of(self.plan, grid.name, grid.question, command(), self.settings.launcher).save(self._record)

    # -- running --------------------------------------------------------------------------------------------------

    def _show(self, listed: list[Job]) -> None:
        """The rows of the table: work that trials share, then the trials."""
        waiting = [trial for trial in self.plan.trials if trial.key not in self.cached]
        names = {group.last.key: group.name for group in shared_stages(waiting)}
        for job in listed:
            if job.key in names:
                self.watch.add_stage(job.key, names[job.key], job.folder)
        if many := len(self.cached) > MANY:
            self.watch.note(
                f"{len(self.cached)} of {len(self.trials)} trials were finished before and are taken as they are"
            )
        for trial in self.plan.trials:
            self.watch.add_trial(
                trial.key,
                trial.arm,
                trial.seed,
                self.plan.folder(trial),
                *(("cached", many) if trial.key in self.cached else ()),
            )

    def _jobs(self) -> list[Job]:
        """Trials that are missing, and the work that they share."""
        wanted = [
            trial
            for trial in self.plan.trials
            if trial.key not in self.cached and (self.only is None or trial.key in self.only)
        ]
        launcher = self.settings.launcher
        return jobs_of(self.plan, wanted, launcher.workers if launcher.name == "local" else 1)

    def _follow(self, listed: list[Job]) -> None:
        """Run jobs to their end; an interrupt is answered as the settings or the person say."""
        if not listed:
            return None
        run = None
        while True:
            try:
                run = run or JobRun(listed, self.backend, self._started, self._ended)
                return run_jobs(run, self._tick)
            except Cancelled:
                raise
            except KeyboardInterrupt:
                self._interrupted()

    def _interrupted(self) -> None:
        """Go on, leave the trials running, or stop them."""
        chosen = self.settings.launcher.interrupt
        if self.settings.launcher.name == "inline":
            raise KeyboardInterrupt
        if chosen == "ask":
            chosen = self.watch.ask(
                "Trials are running: (d)etach and let them run on, (c)ancel them, (g)o on watching",
                {"d": "detach", "c": "cancel", "g": "go on"},
                "detach",
            )
        if chosen == "cancel":
            self.backend.cancel()
            raise KeyboardInterrupt
        if chosen == "detach":
            self.tracker.detach()
            raise Detached

    def _started(self, job: Job) -> None:
        if job.key in self.trials:
            self.watch.set_state(job.key, "running")
            self.tracker.trial_started(job.key)

    def _tick(self) -> None:
        if not self.reads_only and self._cancelled.exists():
            self.backend.cancel()
            raise Cancelled
        for key, place in self.backend.places().items():
            if key in self.trials:
                self.watch.set_place(key, place)
        self.watch.update()

    def _ended(self, job: Job, error: dict[str, str] | None) -> None:
        if job.key not in self.trials:
            return self._shared_work_ended(job, error)
        if error is None:
            result = read_json(job.folder / RESULT) or {"metrics": {}}
            self.watch.set_state(job.key, "done", f"FID {result['metrics'].get('fid', float('nan')):.3g}")
        else:
            self.errors[job.key] = error
            self.watch.set_state(job.key, "failed", f"{error['cause']}: {error['message']}")
        self.tracker.trial_finished(self.record(self.trials[job.key], {}))  # its speed follows
        return None

    def _shared_work_ended(self, job: Job, error: dict[str, str] | None) -> None:
        """Bad data is the user's to mend, before anything is trained; other failures stop the trials that need the stage."""
        if error is None:
            return self.watch.set_state(job.key, "done")
        if error.get("kind") == "SettingError":
            self.backend.cancel()
            raise SettingError(error["message"])
        self.watch.set_state(job.key, "failed", f"{error['cause']}: {error['message']}")
        return self.watch.note(f"shared work failed ({error['cause']}): {error['message']} (log: {error['log']})")

    # -- what is known --------------------------------------------------------------------------------------------

    def record(self, trial: Trial, speed: dict[str, Any]) -> TrialRecord:
        """What is known of a trial now."""
        folder = self.plan.folder(trial)
        result = read_json(folder / RESULT) or {}
        metrics = measures_of(result) | (speed if result else {})
        error = self.errors.get(trial.key) or read_json(folder / ERROR)
        if not result and error is None:
            state = state_of(folder).state
            state = state if state in UNFINISHED else "running"  # it ended between two looks
            error = {"cause": state, "message": UNFINISHED[state], "traceback": "", "log": ""}
        return TrialRecord(
            key=trial.key,
            arm=trial.arm,
            values=trial.values,
            seed=trial.seed,
            baseline=trial.baseline,
            state="done" if result else "failed",
            cached=trial.key in self.cached,
            settings=trial.settings,
            metrics=metrics,
            folder=folder,
            matched=trial.matched,
            curves=trial.curves,
            model=trial.model,
            seconds=result.get("seconds", {}),
            environment=result.get("environment", {}),
            error=None if result else error,
        )

    def outcome(self, records: list[TrialRecord]) -> GridOutcome:
        """The grid with these records."""
        grid = self.settings.grid
        expect, untested = expectations(grid.decide, self.plan.arms)
        decide = grid.decide | {"expect": expect, "untested": untested}
        return GridOutcome(
            name=grid.name,
            question=grid.question,
            claim=grid.claim,
            match=grid.match,
            decide=decide,
            axes=values_by_setting([arm.values for arm in self.plan.arms]),
            records=records,
            judge=self.plan.judge,
            data=self.plan.data,
            command=command(),
            commit=commit(),
            hardware=hardware(self.plan.threads),
            notes=[*self.notes, *notes_of(self.settings, self.plan)],
            wall_seconds=time.monotonic() - self.began,
            registration=self.registration,
        )
