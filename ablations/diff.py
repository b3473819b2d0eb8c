"""What differs between two trials: ``python -m ablations.diff KEY KEY [runs_dir=runs]``. Settings, results, where made."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ablations.launch.stored import find_trial, settings_of_trial
from ablations.launch.trial_state import state_of
from iris.errors import SettingError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0 whether or not something differs."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    places = [word.partition("=")[2] for word in words if word.startswith("runs_dir=")]
    keys = [word for word in words if "=" not in word and not word.startswith("-")]
    if len(keys) != 2 or len(keys) + len(places) != len(words):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        folders = [find_trial(Path(places[-1] if places else "runs"), key) for key in keys]
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
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


if __name__ == "__main__":
    sys.exit(main())
