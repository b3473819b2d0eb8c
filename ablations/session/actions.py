"""Looking at a grid and stopping it, from files alone: ``action=status`` and ``action=cancel``."""

from __future__ import annotations

import getpass
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ablations.launch.pool import local_slots, stop
from ablations.launch.trial_state import TrialState, state_of
from ablations.session.grid_record import CANCELLED, Entry, GridRecord, load_record, record_path
from iris.errors import SettingError
from iris.io.files import read_json

if TYPE_CHECKING:
    from ablations.question.settings import Settings

STYLES = {"done": "green", "running": "", "failed": "bold red", "stopped": "yellow", "waiting": "dim"}
ROWS = 40  # trials listed; the rest is counted


def status(settings: Settings, console: Console) -> int:
    """Print how the grid's trials stand; the exit code is 1 when one failed."""
    runs, record = _found(settings)
    states = {entry.key: state_of(runs / entry.folder) for entry in record.trials}
    console.print(f"grid {record.name}: {record.question}", highlight=False, markup=False)
    for entry in record.stages:
        found = state_of(runs / entry.folder)
        if found.state not in ("done", "waiting"):
            console.print(
                f"{entry.label}: {found.state}, {found.status.get('phase', '')}", highlight=False, markup=False
            )
    console.print(_table(record.trials, states))
    counts = Counter(found.state for found in states.values())
    count, unit = record.cost
    hours = sum(found.seconds for found in states.values()) * count / 3600
    parts = ", ".join(f"{counts[name]} {name}" for name in STYLES if counts[name])
    console.print(
        f"{len(states)} trials: {parts}; {hours:.2f} {unit}-hours spent on those that are done", highlight=False
    )
    return 1 if counts["failed"] else 0


def _table(entries: list[Entry], states: dict[str, TrialState]) -> Table:
    """Failed and running trials first, at most ``ROWS``."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, side in (
        ("trial", "left"),
        ("key", "left"),
        ("state", "left"),
        ("step", "right"),
        ("loss", "right"),
        ("images/s", "right"),
        ("node", "left"),
        ("", "left"),
    ):
        table.add_column(name, justify=side, no_wrap=name != "")
    order = ("failed", "running", "stopped", "waiting", "done")
    ranked = sorted(entries, key=lambda entry: order.index(states[entry.key].state))
    for entry in ranked[:ROWS]:
        found = states[entry.key]
        facts = found.status
        step = f"{facts.get('step', 0)}/{facts['steps']}" if facts.get("steps") and found.state != "done" else ""
        loss = f"{facts['loss']:.4f}" if facts.get("loss") is not None else ""
        speed = f"{facts['images_per_s']:.0f}" if facts.get("images_per_s") else ""
        table.add_row(
            escape(entry.label),
            entry.key,
            found.state,
            step,
            loss,
            speed,
            str(facts.get("host", "")),
            escape(_remark(found)),
            style=STYLES[found.state],
        )
    if len(ranked) > ROWS:
        table.add_row(f"and {len(ranked) - ROWS} more", style="dim")
    return table


def _remark(found: TrialState) -> str:
    if found.state == "failed":
        said = str(found.error.get("message", "")).splitlines() or ["no message"]
        return f"{found.error.get('cause', 'error')}: {said[-1][:160]}"
    if found.state == "done" and "fid" in found.result.get("metrics", {}):
        return f"FID {found.result['metrics']['fid']:.3g}"
    return str(found.status.get("phase", "")) if found.state != "waiting" else ""


def cancel(settings: Settings, console: Console) -> int:
    """Stop what is being computed for the grid, on this machine and on a cluster; trials keep their checkpoints."""
    from ablations.launch.slurm import RECORD, cancel_jobs  # imports submitit, for which status need not wait

    runs, record = _found(settings)
    record_path(settings).with_suffix(CANCELLED).touch()
    listings = _listings(runs, {entry.key for entry in record.trials})
    for path in listings:
        path.with_suffix(".cancel").touch()
    slots = [slot for slot in local_slots(runs / "pool") if slot.get("listing") in {str(path) for path in listings}]
    stop(slots)
    submitted = {folder: found for folder in _job_folders(runs, record) if (found := read_json(folder / RECORD))}
    cancelled = cancel_jobs(job["id"] for job in submitted.values()) if submitted else 0
    console.print(
        f"stopped {len(slots)} workers here and {cancelled} Slurm jobs; the same command without action=cancel goes on",
        highlight=False,
    )
    open_ones = [job for folder, job in submitted.items() if state_of(folder).state not in ("done", "failed")]
    for user in sorted({job["user"] for job in open_ones if "user" in job} - {getpass.getuser()}):
        console.print(f"what {user} submitted only {user} can cancel", highlight=False, markup=False)
    return 0


def _listings(runs: Path, keys: set[str]) -> list[Path]:
    """Lists of workers that have no other trials than these: another grid that shares some goes on."""
    found = {
        path: {Path(job["folder"]) for job in (read_json(path) or {}).get("jobs", [])}
        for path in (runs / "pool").glob("*.json")
        if not path.name.startswith("slot-")
    }
    trials = {path: {job.name for job in listed if job.parent.name == "trials"} for path, listed in found.items()}
    return [path for path, listed in trials.items() if listed and listed <= keys]


def _job_folders(runs: Path, record: GridRecord) -> list[Path]:
    """Where the grid's jobs leave what they are: its trials' folders, and those of the stages that they wait for."""
    return [runs / entry.folder for entry in (*record.stages, *record.trials)]


def failed_keys(runs: Path, record: Path) -> set[str]:
    """Keys of the grid's trials that failed.

    Raises:
        SettingError: the grid was never started.
    """
    found = load_record(record)
    if found is None:
        raise SettingError("action=retry: this grid was not run with these settings; without action it runs")
    return {entry.key for entry in found.trials if state_of(runs / entry.folder).state == "failed"}


def _found(settings: Settings) -> tuple[Path, GridRecord]:
    runs = Path(settings.runs_dir).absolute()
    record = load_record(record_path(settings))
    if record is None:
        known = ", ".join(sorted({path.stem.rpartition("-")[0] for path in (runs / "grids").glob("*.json")})) or "none"
        raise SettingError(
            f"action={settings.action}: grid {settings.grid.name} was not run with these settings in "
            f"{settings.runs_dir}; grids there: {known}"
        )
    return runs, record
