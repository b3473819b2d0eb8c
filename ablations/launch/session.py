"""One invocation of one grid: run what is missing, follow it, measure speed, report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablations.answer.notes import notes_of
from ablations.answer.records import GridOutcome, TrialRecord
from ablations.launch import Job, JobRun, jobs, make_backend, run_jobs
from ablations.launch.grid_record import CANCELLED, GridRecord
from ablations.launch.job import ERROR, RESULT
from ablations.launch.trial_state import state_of
from ablations.question.axes import values_by_setting
from ablations.question.grid import Trial, expectations
from ablations.question.halving import Halving, halve, halving_of
from ablations.question.plan import Plan, command, commit, hardware
from ablations.question.settings import Settings
from ablations.report.process import write_report_apart
from ablations.trial.arm_speed import ArmSpeed
from iris.errors import SettingError
from iris.io.files import read_json

if TYPE_CHECKING:
    from ablations.launch.watch import Watch
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


class RungOpen(Exception):
    """A report is written while a rung of the halving still runs: who goes on is not known."""


class Session:
    """What an invocation knows.

    Args:
        values: the settings as plain values.
        record: where the grid's record goes.
        only: keys of the trials to run if they are missing (None: all).
    """

    def __init__(
        self,
        settings: Settings,
        values: dict[str, Any],
        plan: Plan,
        watch: Watch,
        tracker: Tracker,
        record: Path,
        only: set[str] | None = None,
    ) -> None:
        self.settings, self.values, self.watch, self.tracker, self.only = settings, values, watch, tracker, only
        self._take(plan)
        self.errors: dict[str, dict[str, str]] = {}
        self.notes: list[str] = []
        self._tracked = False
        self.began = time.monotonic()
        self.backend = make_backend(settings.launcher, plan.runs, plan.threads)
        self.reads_only = settings.action == "report"  # also what lies on a disk that cannot be written
        self._record, self._cancelled = record, record.with_suffix(CANCELLED)
        if not self.reads_only:
            self._cancelled.unlink(missing_ok=True)  # what was cancelled before is not any more
            self._write_record()

    def run(self) -> tuple[GridOutcome, Path, list[str]]:
        """Everything; returns the outcome, the report's path, and what MLflow could not take.

        Raises:
            SettingError: the data cannot be used, which only reading them showed.
            Detached: the person left.
            KeyboardInterrupt: the person stopped it, here or with ``action=cancel``.
        """
        tracker, grid = self.tracker, self.settings.grid
        halving = halving_of(grid.halving)
        if halving is not None:
            self._halve(halving)
        tracker.start(self.outcome([]), self.plan.trials, self.settings.seeds, grid.baseline)
        self._tracked = True
        self._show()
        self._follow(self._jobs())
        speed = self._speed()
        records = [self.record(trial, speed.get(trial.arm, {})) for trial in self.plan.trials]
        unfinished = [record for record in records if record.state == "failed" and record.error["cause"] in UNFINISHED]
        for record in records:
            if record not in unfinished:  # action=report while others run them, or on what was stopped
                tracker.trial_finished(record)
        outcome = self.outcome(records)
        self.watch.note("writing the report")
        report, verdict = write_report_apart(outcome, Path(self.settings.reports_dir) / grid.name)
        self.watch.note("finishing MLflow")
        if unfinished:
            tracker.detach()
            return outcome, report, tracker.problems
        failed = any(record.state == "failed" for record in records)
        problems = tracker.finish(outcome, report.parent, "FAILED" if failed else "FINISHED", verdict)
        return outcome, report, problems

    def _speed(self) -> dict[str, dict[str, Any]]:
        on_cluster = self.settings.launcher.name == "slurm"
        arms = ArmSpeed(
            self.plan, self.backend, self.watch, self._tick, self.settings.launcher if on_cluster else None, self.notes
        )
        return arms.measure(stored=self.reads_only)

    def _write_record(self) -> None:
        grid = self.settings.grid
        GridRecord.of(self.plan, grid.name, grid.question, command(), self.settings.launcher).save(self._record)

    def _take(self, plan: Plan) -> None:
        """Work on this plan from here on."""
        self.plan, self.trials = plan, {trial.key: trial for trial in plan.trials}
        self.cached = {key for key, trial in self.trials.items() if (plan.folder(trial) / RESULT).exists()}

    def _halve(self, halving: Halving) -> None:
        """Run the rungs and go on with the arms that are left. MLflow is told of the whole trials alone."""
        left = self.plan
        try:
            for left, note in halve(self.plan, self.settings.seeds, self.settings.grid.decide, halving, self._rung):  # noqa: B007
                self.notes.append(note)
                self.watch.note(note)
        except RungOpen as rung:
            self.notes.append(f"Successive halving: {rung} is not finished.")
        self._take(left)
        if not self.reads_only:
            self._write_record()

    def _rung(self, plan: Plan, name: str) -> None:
        """Run the short trials of a rung, which is what status, cancel and retry see of the grid meanwhile."""
        self.watch.note(f"{name}: {len(plan.trials)} trials of {plan.trials[0].settings['train']['steps']} steps")
        self._take(plan)
        if self.reads_only:
            if any(state_of(plan.folder(trial)).state in UNFINISHED for trial in plan.trials):
                raise RungOpen(name)
            return
        self._write_record()
        self._show()
        self._follow(self._jobs())
        if self.only is not None and self.only & self.trials.keys():
            self.only = None  # what was tried again belongs to a rung: the grid goes on behind it

    # -- running --------------------------------------------------------------------------------------------------

    def _show(self) -> None:
        """The rows of the table: shared work of trials that are not finished, then the trials."""
        for trial in self.plan.trials:
            stages = self.plan.stages(trial)
            for key, name in {} if trial.key in self.cached else stages.keys.items():
                if self.watch.add_stage(key, name, stages.folder(key)) and stages.done(key):
                    self.watch.set_state(key, "cached")
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
        """Shared work that is missing, a job for each set of stages, and the trials that wait for it."""
        shared: dict[str, Job] = {}
        listed = []
        wanted = [
            trial
            for trial in self.plan.trials
            if trial.key not in self.cached and (self.only is None or trial.key in self.only)
        ]
        sets = {tuple(self.plan.stages(trial).keys) for trial in wanted}
        # Nothing else runs while stages are made: they share out all the threads that trials will use.
        workers = self.settings.launcher.workers if self.settings.launcher.name == "local" else 1
        threads = {"threads": self.plan.threads * max(1, workers // max(1, len(sets)))}
        for trial in wanted:
            stages, needs = self.plan.stages(trial), ()
            if not all(stages.done(key) for key in stages.keys):
                name = "-".join(["prepare", *(key.rpartition("-")[2] for key in stages.keys)])
                if name not in shared:
                    shared[name] = Job(name, jobs.stages, self.plan.job_plan(trial) | threads, stages.root / name)
                    # It was there once, and what it made has been cleared away since.
                    (stages.root / name / RESULT).unlink(missing_ok=True)
                needs = (shared[name].folder,)
            listed.append(
                Job(trial.key, jobs.trial, self.plan.job_plan(trial), self.plan.folder(trial), needs, spread=True)
            )
        return [*shared.values(), *listed]

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
            if self._tracked:
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
            return self._shared_work_ended(error)
        if error is None:
            result = read_json(job.folder / RESULT) or {"metrics": {}}
            self.watch.set_state(job.key, "done", f"FID {result['metrics'].get('fid', float('nan')):.3g}")
        else:
            self.errors[job.key] = error
            self.watch.set_state(job.key, "failed", f"{error['cause']}: {error['message']}")
        if self._tracked:
            self.tracker.trial_finished(self.record(self.trials[job.key], {}))  # its speed follows
        return None

    def _shared_work_ended(self, error: dict[str, str] | None) -> None:
        """Bad data is the user's to mend, before anything is trained; other failures stop the trials that need the stage."""
        if error is None:
            return
        if error.get("kind") == "SettingError":
            self.backend.cancel()
            raise SettingError(error["message"])
        self.watch.note(f"shared work failed ({error['cause']}): {error['message']} (log: {error['log']})")

    # -- what is known --------------------------------------------------------------------------------------------

    def record(self, trial: Trial, speed: dict[str, Any]) -> TrialRecord:
        """What is known of a trial now."""
        folder = self.plan.folder(trial)
        result = read_json(folder / RESULT) or {}
        metrics = result.get("metrics", {}) | (speed if result else {})
        if result:
            metrics["train_seconds"] = result["seconds"]["train"]
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
            seconds=result.get("seconds", {}),
            environment=result.get("environment", {}),
            error=None if result else error,
        )

    def outcome(self, records: list[TrialRecord]) -> GridOutcome:
        """The grid with these records."""
        grid, data = self.settings.grid, self.values["data"]
        decide = grid.decide | {"expect": expectations(grid.decide, self.plan.arms)[0]}
        return GridOutcome(
            name=grid.name,
            question=grid.question,
            claim=grid.claim,
            match=grid.match,
            decide=decide,
            axes=values_by_setting([arm.values for arm in self.plan.arms]),
            records=records,
            judge=self.plan.judge,
            data=data | {"fingerprint": self.plan.facts[self.plan.arms[0].name]["data"]},
            command=command(),
            commit=commit(),
            hardware=hardware(self.plan.threads),
            notes=[*self.notes, *notes_of(self.settings, self.plan)],
            wall_seconds=time.monotonic() - self.began,
        )
