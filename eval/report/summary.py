"""What a person sees at the end of the command."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from eval.report.tables import WHY, Table, headline, skills, targets
from eval.results import PAGE, Results

LEFT = ("verdict", "asked for", "measured", "")  # columns of words
WHOLE = ("value", "n", "verdict")  # columns that a narrow terminal does not wrap


def print_summary(results: Results, folder: Path, console: Console) -> None:
    """The main numbers with their intervals, and where the rest is."""
    for table in (headline(results), skills(results), targets(results)):
        if table is not None and table.rows:
            print_table(table, console)
    for note in results.notes:
        console.print(Text(f"note: {note}"))
    console.print(Text(f"results   {folder / 'results.json'}"), soft_wrap=True)
    console.print(Text(f"page      {folder / PAGE}"), soft_wrap=True)


def print_table(table: Table, console: Console) -> None:
    """One table, without its reasons; columns of numbers to the right."""
    kept = [i for i, name in enumerate(table.head) if name != WHY]
    shown = RichTable(
        title=table.title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        collapse_padding=True,
        header_style="dim",
    )
    for i in kept:
        name = table.head[i]
        whole = i == 0 or name in WHOLE or name.endswith("interval")
        shown.add_column(name, justify="left" if i == 0 or name in LEFT else "right", overflow="fold", no_wrap=whole)
    for row in table.rows:
        shown.add_row(*(Text(row[i]) for i in kept))
    console.print(shown)
    for line in (table.note, *table.foot):
        console.print(Text(line, style="dim"))
    console.print()
