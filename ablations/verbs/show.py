"""A trial by its key: settings, state, results, files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ablations.launch.trial_state import TrialState, state_of
from ablations.verbs.stored import find_trial, megabytes, settings_of_trial, size_of
from iris.settings import setting

NAMES = (1, 1)
HELP = """\
A trial by its key, or the beginning of it: settings, state, results, files.

  python -m ablations show KEY [runs_dir=runs]
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of this verb."""

    runs_dir: str = setting("runs", "where trials lie")


def run(names: list[str], settings: Settings, console: Console) -> int:
    """Show the trial; returns the exit code."""
    show(find_trial(Path(settings.runs_dir), names[0]), console)
    return 0


def show(folder: Path, console: Console) -> None:
    """Print what is known of the trial in ``folder``."""
    found = state_of(folder)
    console.print(f"trial {folder.name}: {found.state}{_remark(found)}", highlight=False, markup=False)
    settings = settings_of_trial(folder)
    groups: dict[str, list[str]] = {}
    for key, value in settings.items():
        group, _, name = key.rpartition(".")
        groups.setdefault(group, []).append(f"{name}={value}")
    _print(console, "settings", [(group or "-", "  ".join(values)) for group, values in groups.items()])
    metrics = found.result.get("metrics", {})
    _print(
        console,
        "results",
        [(name, f"{value:.6g}" if isinstance(value, float) else str(value)) for name, value in metrics.items()],
    )
    facts = found.result.get("environment", {}) | {
        f"{name}, seconds": f"{value:.1f}" for name, value in found.result.get("seconds", {}).items()
    }
    _print(console, "made on", [(name, str(value)) for name, value in facts.items()])
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    _print(
        console,
        "files",
        [(path.name, megabytes(size_of(path) if path.is_dir() else path.stat().st_size)) for path in files],
    )
    console.print(str(folder), highlight=False, markup=False, soft_wrap=True)
    if found.error.get("traceback"):
        console.print(str(found.error["traceback"]).rstrip(), style="red", highlight=False, markup=False)


def _remark(found: TrialState) -> str:
    if found.state == "failed":
        return f", {found.error.get('cause')}: {found.error.get('message')}"
    if found.state in ("running", "stopped") and found.status:
        step = f" {found.status['step']}/{found.status['steps']}" if found.status.get("steps") else ""
        return f", {found.status.get('phase', '')}{step} on {found.status.get('host', '?')}"
    return ""


def _print(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    if not rows:
        return
    table = Table(box=None, pad_edge=False, show_header=False, title=title, title_justify="left", title_style="bold")
    table.add_column(no_wrap=True, style="dim")
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    console.print(table, highlight=False, markup=False)
