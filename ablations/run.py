"""The command: ``python -m ablations.run grid=mixers``. Compose, check, launch, watch, measure, report."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ablations.launch import thread_environment, threads_of
from ablations.question.compose import GROUPS, composed, options, settings_of
from ablations.report.process import ReportLost
from ablations.track.location import Location
from iris.errors import SettingError
from iris.io.masking import masked
from iris.settings import plain_values

ACTIONS = ("status", "cancel")
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
  python -m ablations.show KEY                              # a trial: settings, state, results, files
  python -m ablations.diff KEY KEY                          # what differs between two
  python -m ablations.gc                                    # what the runs folder holds, and what may go

Run again after a stop or a failure: finished trials are reused, others continue where they were. A second call beside a
running one follows the same trials.
Exit codes: 0 done, 1 a trial failed, 2 a setting or the disk cannot be used, 130 interrupted.

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

            print(masked(OmegaConf.to_yaml(config)), end="")
            return 0
        if config.action in ACTIONS:  # before torch is imported: they only read files
            from ablations.launch import actions

            return getattr(actions, config.action)(plain_values(config), Console())
        return _run(*settings_of(config))
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
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


def _run(settings: Any, values: dict[str, Any]) -> int:
    console = Console()
    os.environ.update(thread_environment(settings.threads or os.cpu_count() or 1))
    Location.of(settings.track.uri, Path.cwd()).check()
    if settings.dry_run:
        return _dry_run(settings, values, console)
    from ablations.launch.grid_record import cost_of, record_path
    from ablations.launch.watch import Watch
    from ablations.track.tracking import Tracker

    record = record_path(Path(settings.runs_dir), values)
    with Watch(
        settings.grid.name,
        settings.grid.question,
        settings.launcher.workers,
        console,
        cost=cost_of(settings.launcher, threads_of(settings.launcher, settings.threads)),
    ) as watch:
        watch.note("checking the settings")
        from ablations.launch.session import Detached, Session
        from ablations.question.plan import make_plan

        plan = make_plan(settings, values)
        _check_room(settings)
        only = None
        if settings.action != "run":
            from ablations.launch.actions import failed_keys

            only = failed_keys(plan.runs, record) if settings.action == "retry" else set()
        try:
            with Tracker(
                settings.grid.name, settings.track.uri, Path.cwd(), plan.runs, watch.note, settings.track.models_mb
            ) as tracker:
                outcome, report, problems = Session(settings, values, plan, watch, tracker, record, only).run()
        except Detached:
            watch.note(
                "the trials run on; the same command follows them again, action=status shows them, action=cancel stops them"
            )
            return 0
    watch.summary(outcome)
    for problem in problems:
        console.print(problem, style="yellow", markup=False)
    console.print(f"\nreport   {report}\nMLflow   {tracker.command}", highlight=False, markup=False, soft_wrap=True)
    return 1 if any(record.state == "failed" for record in outcome.records) else 0


def _check_room(settings: Any) -> None:
    """Before anything is trained: can results and the report be written?"""
    from ablations.launch.job import no_room

    places = {"reports_dir": settings.reports_dir} | (
        {} if settings.action == "report" else {"runs_dir": settings.runs_dir}
    )
    for name, folder in places.items():
        if reason := no_room(Path(folder)):
            raise SettingError(f"{name}: {reason}")


def _dry_run(settings: Any, values: dict[str, Any], console: Console) -> int:
    """Print trials, keys, parameters, cost and what is cached; train nothing."""
    console.print(f"grid {settings.grid.name}: {settings.grid.question}", highlight=False, markup=False)
    import torch

    from ablations.question.plan import make_plan, parameters, step_seconds

    plan = make_plan(settings, values)
    torch.set_num_threads(plan.threads)
    table = Table(box=None, pad_edge=False)
    for name, side in (
        ("trial", "left"),
        ("key", "left"),
        ("params", "right"),
        ("steps", "right"),
        ("minutes", "right"),
        ("state", "left"),
    ):
        table.add_column(name, justify=side, no_wrap=name in ("trial", "key", "params"))
    seconds = {arm.name: step_seconds(arm.settings | {"seed": 0}) for arm in plan.arms}
    total = 0.0
    for trial in plan.trials:
        done = (plan.folder(trial) / "result.json").exists()
        cost = 0.0 if done else seconds[trial.arm] * trial.settings["train"]["steps"]
        total += cost
        table.add_row(
            escape(f"{trial.arm}, seed {trial.seed}"),
            trial.key,
            f"{parameters(trial.settings) / 1e6:.3f} M",
            str(trial.settings["train"]["steps"]),
            "–" if done else f"{cost / 60:.1f}",
            "cached" if done else "new",
        )
    console.print(table, highlight=False)
    for arm in plan.arms:
        if arm.matched:
            console.print(f"{arm.name}: {arm.matched}", highlight=False, markup=False)
    stages = {
        name: plan.stages(trial).done(key) for trial in plan.trials for key, name in plan.stages(trial).keys.items()
    }
    for name, done in stages.items():
        console.print(f"{name}: {'cached' if done else 'to make'}", highlight=False)
    console.print(
        f"training, {settings.launcher.workers} at a time on {plan.threads} thread(s) each: about "
        f"{total / 60 / settings.launcher.workers:.0f} min here, from a few timed steps; sampling and measuring come on top",
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
