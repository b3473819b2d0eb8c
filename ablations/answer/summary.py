"""A grid's results as a table for the terminal: one row an arm, means over its seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ablations.answer.records import GridOutcome, TrialRecord

Cell = Callable[[Sequence[TrialRecord]], str]
NAMES = 12  # characters that arms' names need at least
LISTED = 40  # arms that are printed, the best and the baseline; the report has all
TOLD = 20  # failed trials that are
MEASURES = {  # title, with its unit in the second line, and how it is printed
    "fid": ("FID\n", ".2f"),
    "clip_score": ("CLIP\nscore", ".1f"),
    "accuracy_colour": ("colour\n", ".0%"),
    "accuracy_shape": ("shape\n", ".0%"),
    "accuracy_all": ("all\nskills", ".0%"),
    "latency_ratio": ("latency\nratio", ".2f"),
    "params_m": ("params\nM", ".2f"),
    "peak_memory_mb": ("memory\nMB", ".0f"),
    "latency_ms": ("latency\nms", ".1f"),
}


def summary_renderables(outcome: GridOutcome, verdict: Mapping[str, Any], width: int) -> list[RenderableType]:
    """The results' table, a line on how to read it, failed trials, notes and the verdict, for ``width`` columns.

    ``verdict``: of ``ablations.report.build.verdict_facts``, as the report's folder holds it.
    """
    arms = _by_arm(outcome)
    seeds = max((len(records) for records in arms.values()), default=0)
    parts: list[RenderableType] = [Text()]
    if arms:
        shown = {
            arm: records for rank, (arm, records) in enumerate(arms.items()) if rank < LISTED or records[0].baseline
        }
        parts += [_table(outcome, verdict, shown, seeds, width)]
        parts += [Text(_legend(outcome, verdict, arms, seeds), style="dim")]
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
    return [*parts, *_verdict(verdict)]


def _verdict(verdict: Mapping[str, Any]) -> list[RenderableType]:
    """The word, the sentence, how sure it is, and what to do next."""
    if not verdict:
        return []
    answer = Table.grid(padding=(0, 2))
    answer.add_row(Text("verdict", style="bold"), Text(str(verdict["verdict"]), style="bold"))
    for name in ("sentence", "sureness"):
        answer.add_row("", Text(str(verdict[name])))
    next_command = verdict.get("next_command")
    return [Text(), answer, *([Text(f"next     {next_command}")] if next_command else [])]


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


def _table(
    outcome: GridOutcome, verdict: Mapping[str, Any], arms: dict[str, list[TrialRecord]], seeds: int, width: int
) -> Table:
    table = Table(
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        header_style="bold",
        title_justify="left",
        title=Text(f"{outcome.name}: {outcome.question}", style="bold"),
    )
    table.add_column("arm\n", overflow="fold", min_width=NAMES - 1, max_width=34 if width >= 100 else 18)
    columns = _columns(outcome, verdict)
    if seeds > 1:
        columns = [("seeds\n", lambda records: str(len(records))), *columns]
    shown = [(title, cell) for title, cell in columns if any(cell(records) for records in arms.values())]
    while len(shown) > 1 and _width(shown, arms) > width - NAMES:
        shown.pop()  # the last ones are the least important; the report has all
    for title, _ in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for arm, records in arms.items():
        name = Text(arm + (" *" if records[0].baseline else ""), style="bold" if records[0].baseline else "")
        table.add_row(name, *(cell(records) for _, cell in shown))
    return table


def _width(columns: Sequence[tuple[str, Cell]], arms: dict[str, list[TrialRecord]]) -> int:
    """Characters that columns take, with the blank between them."""
    return sum(
        1 + max(len(text) for text in (*title.split("\n"), *(cell(records) for records in arms.values())))
        for title, cell in columns
    )


def _columns(
    outcome: GridOutcome, verdict: Mapping[str, Any]
) -> list[tuple[str, Callable[[Sequence[TrialRecord]], str]]]:
    """Title (with its unit in the second line) and text of each measure; an empty text where it was not measured."""

    def plain(name: str, pattern: str) -> Callable[[Sequence[TrialRecord]], str]:
        def cell(records: Sequence[TrialRecord]) -> str:
            value = _mean(records, name)
            return "" if value is None else format(value, pattern)

        return cell

    def word(records: Sequence[TrialRecord]) -> str:
        found = str(verdict.get("arms", {}).get(records[0].arm, {}).get("verdict", ""))
        return "" if found in ("baseline", "not enough seeds") else found

    metric = str(outcome.decide.get("metric", "fid"))
    title = MEASURES[metric][0] if metric in MEASURES else f"{metric.replace('_', ' ')}\n"
    others = [(title, plain(name, pattern)) for name, (title, pattern) in MEASURES.items() if name != metric]
    return [(title, lambda records: _decided(records, metric, verdict)), ("against\nbaseline", word), *others]


def _decided(records: Sequence[TrialRecord], metric: str, verdict: Mapping[str, Any]) -> str:
    """An arm's mean in the measure that decides, and half of its 95 % interval, as in the report."""
    known = verdict.get("arms", {}).get(records[0].arm, {})
    mean = known.get("mean") if known else _mean(records, metric)
    if mean is None:
        return ""
    digits = 4 if abs(mean) < 1 else 2 if abs(mean) < 100 else 1
    half = _half(known)
    return f"{mean:.{digits}f}" + (f" ±{half:.{digits}f}" if half is not None else "")


def _half(known: Mapping[str, Any]) -> float | None:
    return None if None in (known.get("low"), known.get("high")) else (known["high"] - known["low"]) / 2


def _values(records: Sequence[TrialRecord], name: str) -> list[float]:
    return [
        float(record.metrics[name])
        for record in records
        if record.metrics.get(name) is not None and math.isfinite(record.metrics[name])
    ]


def _mean(records: Sequence[TrialRecord], name: str) -> float | None:
    values = _values(records, name)
    return sum(values) / len(values) if values else None


def _legend(outcome: GridOutcome, verdict: Mapping[str, Any], arms: dict[str, list[TrialRecord]], seeds: int) -> str:
    said = [f"judge: {outcome.judge.get('name', 'none')}"]
    samples = {int(value) for records in arms.values() for value in _values(records, "samples")}
    if samples:
        said.append(f"{min(samples):,} samples" if len(samples) == 1 else f"{min(samples):,}-{max(samples):,} samples")
    if any(_half(known) is not None for known in verdict.get("arms", {}).values()):
        said.append("±: 95% interval" + (", sampling alone" if seeds == 1 else ""))
    if any(records[0].baseline for records in arms.values()):
        said.append("*: baseline")
    return "; ".join(said)
