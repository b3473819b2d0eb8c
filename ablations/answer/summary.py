"""A grid's results as a table for the terminal: one row an arm, means over its seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ablations.answer.records import GridOutcome, TrialRecord

LISTED = 40  # arms that are printed, the best and the baseline; the report has all
TOLD = 20  # failed trials that are


def summary_renderables(outcome: GridOutcome, width: int) -> list[RenderableType]:
    """The results' table, a line on how to read it, failed trials, and the outcome's notes, for ``width`` columns."""
    arms = _by_arm(outcome)
    seeds = max((len(records) for records in arms.values()), default=0)
    parts: list[RenderableType] = [Text()]
    if arms:
        shown = {
            arm: records for rank, (arm, records) in enumerate(arms.items()) if rank < LISTED or records[0].baseline
        }
        parts += [_table(outcome, shown, seeds, width), Text(_legend(outcome, arms, seeds), style="dim")]
        if len(shown) < len(arms):
            parts.append(Text(f"the best {len(shown)} of {len(arms)} arms; the report has all of them", style="dim"))
    failed = [record for record in outcome.records if record.state == "failed"]
    for record in failed[:TOLD]:
        error = record.error or {}
        parts.append(
            Text.assemble(
                ("failed ", "bold red"),
                f"{record.label}: {error.get('cause', 'error')}: {error.get('message', 'no message')}",
            )
        )
        if error.get("log"):
            parts.append(Text(f"  log: {error['log']}"))
    if len(failed) > TOLD:
        parts.append(Text(f"and {len(failed) - TOLD} more failed; the report has all of them", style="bold red"))
    parts += [Text(f"note: {note}", style="yellow") for note in outcome.notes]
    return parts


def _by_arm(outcome: GridOutcome) -> dict[str, list[TrialRecord]]:
    """Finished trials by arm; the arms best first in the measure that decides, those without it last."""
    arms: dict[str, list[TrialRecord]] = {}
    for record in outcome.records:
        if record.state == "done":
            arms.setdefault(record.arm, []).append(record)
    metric, sign = outcome.decide.get("metric", "fid"), 1 if outcome.decide.get("better", "lower") == "lower" else -1

    def rank(arm: str) -> float:
        value = _mean(arms[arm], metric)
        return sign * value if value is not None else math.inf

    return {arm: arms[arm] for arm in sorted(arms, key=rank)}


def _table(outcome: GridOutcome, arms: dict[str, list[TrialRecord]], seeds: int, width: int) -> Table:
    table = Table(
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        header_style="bold",
        title_justify="left",
        title=Text(f"{outcome.name}: {outcome.question}", style="bold"),
    )
    table.add_column("arm\n", overflow="fold", max_width=34 if width >= 100 else 18)
    columns = _columns()
    if seeds > 1:
        columns = [("seeds\n", lambda records: str(len(records))), *columns]
    shown = [(title, cell) for title, cell in columns if any(cell(records) for records in arms.values())]
    for title, _ in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for arm, records in arms.items():
        name = Text(arm + (" *" if records[0].baseline else ""), style="bold" if records[0].baseline else "")
        table.add_row(name, *(cell(records) for _, cell in shown))
    return table


def _columns() -> list[tuple[str, Callable[[Sequence[TrialRecord]], str]]]:
    """Title (with its unit in the second line) and text of each measure; an empty text where it was not measured."""

    def plain(name: str, pattern: str) -> Callable[[Sequence[TrialRecord]], str]:
        def cell(records: Sequence[TrialRecord]) -> str:
            value = _mean(records, name)
            return "" if value is None else format(value, pattern)

        return cell

    return [
        ("FID\n", _fid),
        ("CLIP\nscore", plain("clip_score", ".1f")),
        ("colour\n", plain("accuracy_colour", ".0%")),
        ("shape\n", plain("accuracy_shape", ".0%")),
        ("all\nskills", plain("accuracy_all", ".0%")),
        ("latency\nratio", plain("latency_ratio", ".2f")),
        ("\nms", plain("latency_ms", ".1f")),
        ("memory\nMB", plain("peak_memory_mb", ".0f")),
        ("params\nM", plain("params_m", ".2f")),
    ]


def _fid(records: Sequence[TrialRecord]) -> str:
    value, spread = _mean(records, "fid"), _fid_spread(records)
    if value is None:
        return ""
    digits = 2 if value < 100 else 1
    return f"{value:.{digits}f}" + (f" ±{spread:.{digits}f}" if spread is not None else "")


def _fid_spread(records: Sequence[TrialRecord]) -> float | None:
    """Of one seed the sampling error (jackknife), of more the standard deviation over seeds, which is the larger."""
    values = _values(records, "fid")
    if len(values) > 1:
        mean = sum(values) / len(values)
        return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return next(iter(_values(records, "fid_se")), None)


def _values(records: Sequence[TrialRecord], name: str) -> list[float]:
    return [
        float(record.metrics[name])
        for record in records
        if record.metrics.get(name) is not None and math.isfinite(record.metrics[name])
    ]


def _mean(records: Sequence[TrialRecord], name: str) -> float | None:
    values = _values(records, name)
    return sum(values) / len(values) if values else None


def _legend(outcome: GridOutcome, arms: dict[str, list[TrialRecord]], seeds: int) -> str:
    said = [f"judge: {outcome.judge.get('name', 'none')}"]
    samples = {int(value) for records in arms.values() for value in _values(records, "samples")}
    if samples:
        said.append(f"{min(samples):,} samples" if len(samples) == 1 else f"{min(samples):,}-{max(samples):,} samples")
    if any(_fid_spread(records) is not None for records in arms.values()):
        said.append("±: standard deviation over seeds" if seeds > 1 else "±: sampling error of one seed")
    if any(records[0].baseline for records in arms.values()):
        said.append("*: baseline")
    return "; ".join(said)
