"""The command: ``python -m ablations.run grid=mixers``. Compose, check, launch, watch, measure, report."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ablations.launch.processes import thread_environment
from ablations.report.places import VERDICT, neighbours, report_folder
from ablations.report.process import ReportLost
from ablations.track.location import Location
from iris.errors import SettingError
from iris.io.command import answer_options, failed
from iris.io.files import read_json
from iris.settings import Tree

if TYPE_CHECKING:
    from ablations.question.plan import Plan
    from ablations.question.settings import Settings

ACTIONS = ("status", "cancel")
LISTED = 5  # other reports of a grid that the terminal names
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)

HELP = """\
Run an ablation grid: train every trial, measure it, log it to MLflow, write a report.

  python -m ablations.run grid=mixers
  python -m ablations.run grid=mixers seeds=[0,1,2] train.steps=2000
  python -m ablations.run grid=depth model.mixer=attention data=shapes2
  python -m ablations.run grid=mixers dry_run=true          # the plan and its cost; trains nothing
  python -m ablations.run grid=mixers --cfg job             # the composed configuration
  python -m ablations.run grid=mixers launcher=inline       # in this process, for a debugger

  python -m ablations.run grid=mixers launcher=slurm launcher.partition=gpu
  python -m ablations.run grid=mixers action=status         # also: cancel, retry (only what failed), report
  python -m ablations show KEY                              # a trial: settings, state, results, files; also: diff, gc, sync

Run again after a stop or a failure: finished trials are reused, others continue where they were. A second call beside a
running one follows the same trials.
Exit codes: 0 done, 1 a trial failed, 2 a setting or the disk cannot be used, 130 interrupted.

Groups (group=option), and any setting as key=value:"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return 0 if answer_options(words, _tree, HELP) else _obey(words)
    except SettingError as error:
        return failed(error, 2)
    except ReportLost as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        word = "interrupted" if type(stopped) is KeyboardInterrupt else "stopped by action=cancel"
        print(f"\n{word}; the same command continues where this stopped", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        print(
            f"error: {error}; what is finished is kept, and the same command goes on when there is room",
            file=sys.stderr,
        )
        return 2


def _tree() -> Tree:
    from ablations.question.settings import TREE  # knows every part of the model, and with them torch

    return TREE


def _obey(words: Sequence[str]) -> int:
    settings = _tree().build(words)
    if settings.action in ACTIONS:
        from ablations.session import actions

        return getattr(actions, settings.action)(settings, Console())
    return _run(settings, words)


def _run(settings: Settings, words: Sequence[str]) -> int:
    console = Console()
    os.environ.update(thread_environment(settings.threads or os.cpu_count() or 1))
    Location.of(settings.track.uri, Path.cwd()).check()
    if settings.dry_run:
        return _dry_run(settings, console)
    from ablations.session.grid_record import cost_of, record_path
    from ablations.session.watch import Watch
    from ablations.track.tracking import Tracker

    record = record_path(settings)
    with Watch(
        settings.grid.name,
        settings.grid.question,
        settings.launcher.workers,
        console,
        cost=cost_of(settings.launcher, settings.launcher.threads_of(settings.threads)),
    ) as watch:
        watch.note("checking the settings")
        from ablations.question.plan import make_plan
        from ablations.session.session import Detached, Session

        plan = make_plan(settings)
        _check_room(settings)
        only = None
        if settings.action != "run":
            from ablations.session.actions import failed_keys

            only = failed_keys(plan.runs, record) if settings.action == "retry" else set()
        try:
            with Tracker(
                settings.grid.name, settings.track.uri, Path.cwd(), plan.runs, watch.note, settings.track.models_mb
            ) as tracker:
                place = report_folder(Path(settings.reports_dir), settings.grid.name, words)
                outcome, report, problems = Session(settings, plan, watch, tracker, record, place, only).run()
        except Detached:
            watch.note(
                "the trials run on; the same command follows them again, action=status shows them, action=cancel stops them"
            )
            return 0
    watch.summary(outcome, read_json(report.parent / VERDICT) or {})
    for problem in problems:
        console.print(problem, style="yellow", markup=False)
    if others := neighbours(report.parent, settings.grid.name):
        told = ", ".join(one.settings or settings.grid.name for one in others[:LISTED])
        console.print(f"other reports of this grid: {told}", highlight=False, markup=False)
    console.print(f"\nreport   {report}\nMLflow   {tracker.command}", highlight=False, markup=False, soft_wrap=True)
    return 1 if any(record.state == "failed" for record in outcome.records) else 0


def _check_room(settings: Settings) -> None:
    """Before anything is trained: can results and the report be written?"""
    from ablations.launch.job import no_room

    places = {"reports_dir": settings.reports_dir} | (
        {} if settings.action == "report" else {"runs_dir": settings.runs_dir}
    )
    for name, folder in places.items():
        if reason := no_room(Path(folder)):
            raise SettingError(f"{name}: {reason}")


def _dry_run(settings: Settings, console: Console) -> int:
    """Print trials, keys, parameters, cost and what is there; train nothing."""
    console.print(f"grid {settings.grid.name}: {settings.grid.question}", highlight=False, markup=False)
    import torch

    from ablations.question.plan import make_plan

    plan = make_plan(settings)
    torch.set_num_threads(plan.threads)
    seconds = _training_seconds(plan)
    console.print(_trial_table(plan, seconds), highlight=False)
    for arm in plan.arms:
        if arm.matched:
            console.print(f"{arm.name}: {arm.matched}", highlight=False, markup=False)
    console.print(_shared_table(plan), highlight=False)
    minutes = sum(seconds.values()) / 60 / settings.launcher.workers
    console.print(
        f"training, {settings.launcher.workers} at a time on {plan.threads} thread(s) each: about {minutes:.0f} min here, "
        "from a few timed steps; sampling and measuring come on top",
        highlight=False,
    )
    return 0


def _training_seconds(plan: Plan) -> dict[str, float]:
    """Key of each training that is missing -> about how long it takes here."""
    from ablations.question.costs import step_seconds

    missing = {stage.key: (trial, stage) for trial in plan.trials for stage in trial.chain.flows if not stage.done}
    steps: dict[str, float] = {}
    for trial, _ in missing.values():
        if trial.arm not in steps:
            steps[trial.arm] = step_seconds(trial.chain.settings)
    return {key: steps[trial.arm] * stage.training.steps for key, (trial, stage) in missing.items()}


def _trial_table(plan: Plan, seconds: dict[str, float]) -> Table:
    """A row a trial: its cost, and which of its stages are there."""
    from ablations.launch.job import RESULT
    from ablations.question.costs import parameters

    table = Table(box=None, pad_edge=False)
    table.add_column("trial")  # the one that gives way in a narrow terminal: a key cut short names nothing
    table.add_column("key", no_wrap=True)
    for name in ("params", "steps", "minutes"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for trial in plan.trials:
        flows = trial.chain.flows
        cost = sum(seconds.get(stage.key, 0.0) for stage in flows)
        finished = (plan.folder(trial) / RESULT).exists()
        trained = all(stage.done for stage in flows)
        table.add_row(
            escape(trial.label),
            trial.key,
            f"{parameters(trial.chain.settings) / 1e6:.3f} M",
            str(sum(stage.training.steps for stage in flows)),
            f"{cost / 60:.1f}" if cost else "–",
            "done" if finished else "to measure" if trained else "new",
        )
    return table


def _shared_table(plan: Plan) -> Table:
    """A row a stage that trials share, or that is trained: how many use it, and whether it is there."""
    from iris.stages.flow import OnLatents

    users: dict[str, int] = {}
    stages = {}
    for trial in plan.trials:
        for stage in trial.chain.stages:
            users[stage.key] = users.get(stage.key, 0) + 1
            stages[stage.key] = stage
    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    for name in ("key", "trials", "state"):
        table.add_column(name, justify="right" if name == "trials" else "left", no_wrap=True)
    for key, stage in stages.items():
        if users[key] > 1 or isinstance(stage, OnLatents):
            table.add_row(escape(stage.label), key, str(users[key]), "there" if stage.done else "to make")
    return table


if __name__ == "__main__":
    sys.exit(main())
