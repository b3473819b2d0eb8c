"""What differs between two trials: settings, results, where they were made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ablations.launch.trial_state import state_of
from ablations.verbs.stored import find_trial, settings_of_trial
from iris.settings import setting

NAMES = (2, 2)
HELP = """\
What differs between two trials: settings, results, where they were made. The exit code is 0 whether or not something does.

  python -m ablations diff KEY KEY [runs_dir=runs]
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of this verb."""

    runs_dir: str = setting("runs", "where trials lie")


def run(names: list[str], settings: Settings, console: Console) -> int:
    """Show the differences; returns the exit code."""
    folders = [find_trial(Path(settings.runs_dir), key) for key in names]
    one, two = (state_of(folder) for folder in folders)
    parts = {
        "settings": [settings_of_trial(folder) for folder in folders],
        "results": [one.result.get("metrics", {}), two.result.get("metrics", {})],
        "made on": [one.result.get("environment", {}), two.result.get("environment", {})],
    }
    for title, (left, right) in parts.items():
        rows = differences(left, right)
        _print(console, title, [folder.name for folder in folders], rows)
        if not rows:
            console.print(f"{title}: the same" if left or right else f"{title}: none", highlight=False)
    return 0


def differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, left, right) of what is not the same on both sides; None where a side lacks it."""
    names = [*left, *(name for name in right if name not in left)]
    return [(name, left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)]


def _print(console: Console, title: str, keys: list[str], rows: list[tuple[str, Any, Any]]) -> None:
    if not rows:
        return
    table = Table(box=None, pad_edge=False, header_style="dim", title=title, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for key in keys:
        table.add_column(key, justify="right")
    change = all(isinstance(value, int | float) for _, *pair in rows for value in pair)
    if change:
        table.add_column("change", justify="right")
    for name, left, right in rows:
        cells = [
            f"{value:.6g}" if isinstance(value, float) else "–" if value is None else str(value)
            for value in (left, right)
        ]
        percent = [f"{right / left - 1:+.1%}" if left else ""] if change else []
        table.add_row(name, *cells, *percent)
    console.print(table, highlight=False, markup=False)
