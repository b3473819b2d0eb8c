"""The command: ``python -m ablations.run grid=mixers``. Compose, check, launch, watch, measure, report."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ablations import jobs
from ablations.compose import GROUPS, composed, options, settings_of
from ablations.grid import Trial, expectations
from ablations.launch import Job, run_jobs, thread_environment
from ablations.progress import read_json
from ablations.records import GridOutcome, TrialRecord
from ablations.settings import Settings
from ablations.watch import Watch
from iris.errors import SettingError

if TYPE_CHECKING:
    from ablations.plan import Plan
    from ablations.tracking import Tracker

HELP = """\
Run an ablation grid: train every trial, measure it, log it to MLflow, write a report.

  python -m ablations.run grid=mixers
  python -m ablations.run grid=mixers seeds=[0,1,2] train.steps=2000
  python -m ablations.run grid=depth model.mixer=attention data=shapes2
  python -m ablations.run grid=mixers dry_run=true          # the plan and its cost; trains nothing
  python -m ablations.run grid=mixers --cfg job             # the composed configuration
  python -m ablations.run grid=mixers launcher=inline       # in this process, for a debugger

Run again after a stop or a failure: finished trials are reused, others continue where they were.
Exit codes: 0 done, 1 a trial failed, 2 a setting cannot be used, 130 interrupted.

Groups (group=option), and any setting as key=value:"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in given or "-h" in given:
        return _help()
    try:
        show = _wants_config(given)
        config = composed(given)
        if show:
            from omegaconf import OmegaConf

            print(OmegaConf.to_yaml(config), end="")
            return 0
        settings, values = settings_of(config)
        return _run(settings, values)
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues where this stopped", file=sys.stderr)
        return 130


def _help() -> int:
    print(HELP)
    for group in GROUPS:
        print(f"  {group:9} {', '.join(options(group))}")
    return 0


def _wants_config(given: list[str]) -> bool:
    """Take ``--cfg job`` out of the arguments; whether it was there."""
    for index, word in enumerate(given):
        if word in ("--cfg", "-c") or word.startswith("--cfg="):
            what = word.partition("=")[2] or (given[index + 1] if index + 1 < len(given) else "")
            if what != "job":
                raise SettingError(f"--cfg {what}: only 'job' is there to be shown")
            del given[index : index + (1 if "=" in word else 2)]
            return True
        if word.startswith("-"):
            raise SettingError(f"{word} is no option; allowed: --help, --cfg job, and key=value settings")
    return False


def _run(settings: Settings, values: dict[str, Any]) -> int:
    console = Console()
    os.environ.update(thread_environment(settings.threads or os.cpu_count() or 1))
    if settings.dry_run:
        return _dry_run(settings, values, console)
    from ablations.tracking import Tracker

    with Watch(settings.grid.name, settings.grid.question, settings.launcher.workers, console) as watch:
        watch.note("checking the settings")
        from ablations.plan import make_plan

        plan = make_plan(settings, values)
        with Tracker(settings.grid.name, None, Path.cwd(), watch.note) as tracker:
            outcome, report, problems = Session(settings, values, plan, watch, tracker).run()
    watch.summary(outcome)
    for problem in problems:
        console.print(problem, style="yellow", markup=False)
    console.print(f"\nreport   {report}\nMLflow   {tracker.command}", highlight=False, markup=False, soft_wrap=True)
    return 1 if any(record.state == "failed" for record in outcome.records) else 0


class Session:
    """One invocation of one grid."""

    def __init__(self, settings: Settings, values: dict[str, Any], plan: Plan, watch: Watch, tracker: Tracker) -> None:
        self.settings, self.values, self.plan, self.watch, self.tracker = settings, values, plan, watch, tracker
        self.trials = {trial.key: trial for trial in plan.trials}
        self.cached = {key for key, trial in self.trials.items() if (plan.folder(trial) / "result.json").exists()}
        self.errors: dict[str, dict[str, str]] = {}
        self.notes: list[str] = []
        self.began = time.monotonic()

    def run(self) -> tuple[GridOutcome, Path, list[str]]:
        """Everything; returns the outcome, the report's path, and what MLflow could not take."""
        from ablations.report import write_report
        from ablations.verdict import judge_outcome

        plan, tracker, grid = self.plan, self.tracker, self.settings.grid
        tracker.prepare()
        tracker.start(self.outcome([]), self.settings.seeds, grid.baseline)
        stages = self._stage_jobs()
        for trial in plan.trials:
            self.watch.add_trial(trial.key, trial.arm, trial.seed, plan.folder(trial),
                                 "cached" if trial.key in self.cached else "waiting")
        tracker.ready()
        self._launch(stages, self._stage_ended)
        self._launch([Job(t.key, jobs.trial, plan.job_plan(t), plan.folder(t)) for t in plan.trials
                      if t.key not in self.cached], self._trial_ended)
        speed = self._speed()
        records = [self.record(trial, speed.get(trial.arm, {})) for trial in plan.trials]
        for record in records:
            tracker.trial_finished(record)
        outcome = self.outcome(records)
        self.watch.note("writing the report")
        report = write_report(outcome, Path(self.settings.reports_dir) / grid.name)
        failed = any(record.state == "failed" for record in records)
        self.watch.note("finishing MLflow")
        problems = tracker.finish(outcome, report.parent, "FAILED" if failed else "FINISHED", judge_outcome(outcome).word)
        return outcome, report, problems

    def _stage_jobs(self) -> list[Job]:
        """One job for each set of unfinished stages, and their rows in the table."""
        made: dict[str, Job] = {}
        shown: set[str] = set()
        # Nothing else runs while stages are made: they share out all the threads that trials will use.
        workers = self.settings.launcher.workers
        sets = {tuple(self.plan.stages(trial).keys) for trial in self.plan.trials}
        threads = {"threads": self.plan.threads * max(1, workers // len(sets))}
        for trial in self.plan.trials:
            stages = self.plan.stages(trial)
            if trial.key in self.cached:
                continue
            for key, name in stages.keys.items():
                if key not in shown:
                    self.watch.add_stage(key, name, stages.folder(key))
                    shown.add(key)
                    if stages.done(key):
                        self.watch.set_state(key, "cached")
            if not all(stages.done(key) for key in stages.keys):
                name = "-".join(["prepare", *(key.rpartition("-")[2] for key in stages.keys)])
                made.setdefault(name, Job(name, jobs.stages, self.plan.job_plan(trial) | threads, stages.root / name))
        return list(made.values())

    def _launch(self, listed: list[Job], ended: Any) -> None:
        if listed:
            run_jobs(listed, self.settings.launcher, self.plan.runs / "logs", listed[0].plan["threads"],
                     started=self._started, ended=ended, tick=self._tick)

    def _started(self, job: Job) -> None:
        if job.key in self.trials:
            trial = self.trials[job.key]
            self.watch.set_state(job.key, "running")
            self.tracker.trial_started(trial.key, trial.arm, trial.seed, trial.baseline, trial.settings)

    def _tick(self) -> None:
        self.watch.update()
        for key, trial in self.trials.items():
            if key not in self.cached:
                self.tracker.sync(key, self.plan.folder(trial))

    def _stage_ended(self, job: Job, error: dict[str, str] | None) -> None:
        """Bad data is the user's to mend, before anything is trained; other failures stop the trials that need the stage."""
        if error is None:
            return
        if error["kind"] == "SettingError":
            raise SettingError(error["message"])
        self.watch.note(f"shared work failed ({error['cause']}): {error['message']} (log: {error['log']})")

    def _trial_ended(self, job: Job, error: dict[str, str] | None) -> None:
        if error is None:
            result = read_json(job.folder / "result.json") or {"metrics": {}}
            self.watch.set_state(job.key, "done", f"FID {result['metrics'].get('fid', float('nan')):.3g}")
            return
        self.errors[job.key] = error
        self.watch.set_state(job.key, "failed", f"{error['cause']}: {error['message']}")

    def _speed(self) -> dict[str, dict[str, Any]]:
        """Speed and memory by arm, from one finished trial of each, the baseline first."""
        from ablations.plan import hardware
        from ablations.speed import measure_speed
        from eval.workers import WorkerError

        chosen: dict[str, Trial] = {}
        for trial in self.plan.trials:
            if (self.plan.folder(trial) / "result.json").exists():
                chosen.setdefault(trial.arm, trial)
        if not chosen:
            return {}
        result: dict[str, Any] = {}
        machine = str(hardware(self.plan.threads))

        def work() -> None:
            try:
                result.update(measure_speed(list(chosen.values()), self.plan.runs, 1, machine))
            except WorkerError as error:
                self.notes.append(f"Speed and memory were not measured: {error}")

        self.watch.note(f"measuring speed and memory of {len(chosen)} models, interleaved, one thread each")
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive():
            self.watch.update()
            thread.join(0.5)
        contended = {reason for value in result.values() for reason in value["contended"].split("; ") if reason}
        if contended:
            self.notes.append(f"The machine was not quiet while speed was measured: {'; '.join(sorted(contended))}.")
        return {arm: {k: v for k, v in result[t.key].items() if k != "contended"}
                for arm, t in chosen.items() if t.key in result}

    def record(self, trial: Trial, speed: dict[str, Any]) -> TrialRecord:
        """What is known of a trial now."""
        folder = self.plan.folder(trial)
        result = read_json(folder / "result.json") or {}
        metrics = result.get("metrics", {}) | (speed if result else {})
        if result:
            metrics["train_seconds"] = result["seconds"]["train"]
        return TrialRecord(
            key=trial.key, arm=trial.arm, values=trial.values, seed=trial.seed, baseline=trial.baseline,
            state="done" if result else "failed", cached=trial.key in self.cached, settings=trial.settings, metrics=metrics,
            folder=folder, matched=trial.matched, seconds=result.get("seconds", {}),
            environment=result.get("environment", {}),
            error=None if result else self.errors.get(trial.key, {"cause": "error", "message": "did not run", "traceback": "", "log": ""}))

    def outcome(self, records: list[TrialRecord]) -> GridOutcome:
        """The grid with these records."""
        from ablations.plan import command, commit, hardware

        grid, data = self.settings.grid, self.values["data"]
        decide = grid.decide | {"expect": expectations(grid.decide, self.plan.arms)[0]}
        return GridOutcome(
            name=grid.name, question=grid.question, claim=grid.claim, match=grid.match, decide=decide, axes=grid.axes,
            records=records, judge=self.plan.judge, data=data | {"fingerprint": self.plan.facts[self.plan.arms[0].name]["data"]}, command=command(),
            commit=commit(), hardware=hardware(self.plan.threads), notes=self.all_notes(),
            wall_seconds=time.monotonic() - self.began)

    def all_notes(self) -> list[str]:
        """Warnings that belong in the report."""
        notes = list(self.notes)
        stray = expectations(self.settings.grid.decide, self.plan.arms)[1]
        if stray:
            notes.append(f"grid.decide.expect names {', '.join(stray)}, which no arm of this run is: left out.")
        if self.settings.data.name not in self.plan.judge["worlds"]:
            notes.append(f"Judge {self.plan.judge['name']} was trained on {', '.join(self.plan.judge['worlds'])}: on "
                         f"data {self.settings.data.name} its FID and KID show trends only.")
        bad = {split: rows for trial in self.plan.trials[:1] for split, rows in
               ((read_json(self.plan.stages(trial).folder(self.plan.stages(trial).data_key) / "result.json") or {})
                .get("bad", {}).items()) if rows}
        notes += [f"{len(rows)} unusable rows of {split} were skipped: {', '.join(rows[:5])}." for split, rows in bad.items()]
        return notes


def _dry_run(settings: Settings, values: dict[str, Any], console: Console) -> int:
    """Print trials, keys, parameters, cost and what is cached; train nothing."""
    console.print(f"grid {settings.grid.name}: {settings.grid.question}", highlight=False, markup=False)
    import torch

    from ablations.plan import make_plan, parameters, step_seconds

    plan = make_plan(settings, values)
    torch.set_num_threads(plan.threads)
    table = Table(box=None, pad_edge=False)
    for name, side in (("trial", "left"), ("key", "left"), ("params", "right"), ("steps", "right"), ("minutes", "right"),
                       ("state", "left")):
        table.add_column(name, justify=side, no_wrap=name in ("trial", "key", "params"))
    seconds = {arm.name: step_seconds(arm.settings | {"seed": 0}) for arm in plan.arms}
    total = 0.0
    for trial in plan.trials:
        done = (plan.folder(trial) / "result.json").exists()
        cost = 0.0 if done else seconds[trial.arm] * trial.settings["train"]["steps"]
        total += cost
        table.add_row(escape(f"{trial.arm}, seed {trial.seed}"), trial.key, f"{parameters(trial.settings) / 1e6:.3f} M",
                      str(trial.settings["train"]["steps"]), "–" if done else f"{cost / 60:.1f}",
                      "cached" if done else "new")
    console.print(table, highlight=False)
    for arm in plan.arms:
        if arm.matched:
            console.print(f"{arm.name}: {arm.matched}", highlight=False, markup=False)
    stages = {name: plan.stages(trial).done(key) for trial in plan.trials for key, name in plan.stages(trial).keys.items()}
    for name, done in stages.items():
        console.print(f"{name}: {'cached' if done else 'to make'}", highlight=False)
    console.print(f"training, {settings.launcher.workers} at a time on {plan.threads} thread(s) each: about "
                  f"{total / 60 / settings.launcher.workers:.0f} min here, from a few timed steps; sampling and measuring come on top",
                  highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
