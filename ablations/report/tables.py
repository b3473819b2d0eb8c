"""The tables of a report as plain values: what each cell says. Both templates print these."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ablations.answer import stats
from ablations.answer.intervals import level_of
from ablations.answer.records import GridOutcome, TrialRecord
from ablations.answer.stats import Analysis
from ablations.answer.verdict import analyse_outcome, arms_of, baseline_of, metric_label
from ablations.question.decide import fraction
from ablations.report.measures import (
    COLUMNS,
    COST,
    DASH,
    QUALITY,
    SHOWN_SKILLS,
    Measure,
    error_number,
    number,
    signed,
    value_of,
)
from ablations.report.palette import LABELLED, ArmStyle
from eval.metrics.skills import ALL

if TYPE_CHECKING:
    from eval.targets import TargetResult


@dataclass(frozen=True)
class Cell:
    """One cell: its text, a quieter error or remark, and a sign that the difference from the baseline is real."""

    text: str
    error: str = ""  # what follows ±
    note: str = ""  # a second, quiet line
    mark: str = ""  # better | worse | ""
    kind: str = ""  # CSS class of the text, e.g. a verdict's


@dataclass(frozen=True)
class Row:
    """One row; ``style`` is None for rows that are not about one arm."""

    label: str
    cells: list[Cell]
    style: ArmStyle | None = None
    baseline: bool = False
    failed: bool = False
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Headings (text, unit or direction) and rows. ``foot`` is printed beneath."""

    columns: list[tuple[str, str]]
    rows: list[Row]
    foot: list[str] = field(default_factory=list)


def _mean(trials: Iterable[TrialRecord], metric: str) -> float | None:
    values = [v for t in trials if t.state == "done" and (v := value_of(t.metrics, metric)) is not None]
    return sum(values) / len(values) if values else None


def _kind(word: str) -> str:
    return word.replace(" ", "-")


def shown_measures(outcome: GridOutcome, measures: Iterable[Measure]) -> list[Measure]:
    """Those that at least one trial has."""
    return [m for m in measures if any(value_of(r.metrics, m.name) is not None for r in outcome.records)]


def verdict_cell(analysis: Analysis, arm: str, trials: list[TrialRecord]) -> Cell:
    """The word first; the difference and its interval beneath."""
    if arm == analysis.baseline:
        failed = all(t.state == "failed" for t in trials)
        return Cell("failed", kind="failed") if failed else Cell("baseline", kind="baseline")
    comparison = analysis.comparisons[arm]
    if comparison.verdict == stats.FAILED:
        cause = next((t.error["cause"] for t in trials if t.error and t.error.get("cause")), "")
        return Cell("failed", note=cause, kind="failed")
    if comparison.difference is None:
        return Cell(comparison.verdict, kind=_kind(comparison.verdict))
    percent = analysis.scale == "log"
    note = signed(comparison.difference, percent)
    if comparison.low is not None:
        note += (
            " [" + ", ".join(signed(end, percent).removesuffix("%") for end in (comparison.low, comparison.high)) + "]"
        )
    return Cell(comparison.verdict, note=note, kind=_kind(comparison.verdict))


def _quality_cell(analysis: Analysis, arm: str) -> Cell:
    """Mean over seeds and half of its 95 % interval, marked where it differs for sure by more than the margin."""
    summary = analysis.arms[arm]
    if summary.mean is None:
        return Cell(DASH)
    comparison = analysis.comparisons.get(arm)
    mark = comparison.verdict if comparison and comparison.verdict in (stats.BETTER, stats.WORSE) else ""
    return Cell(number(summary.mean), error_number(summary.half_width, summary.mean), mark=mark)


def _latency_cell(trials: list[TrialRecord], base: list[TrialRecord]) -> Cell:
    """Ratio to the baseline, then milliseconds; said to be noise where the ratio's interval holds 1."""
    median, low, high = (_mean(trials, n) for n in ("latency_ms", "latency_ratio_low", "latency_ratio_high"))
    ratio, reference = _mean(trials, "latency_ratio"), _mean(base, "latency_ms")
    if ratio is None and median is not None and reference:
        ratio = median / reference
    note = f"{number(median)} ms" if median is not None else ""
    if trials is not base and low is not None and high is not None and low <= 1 <= high:
        note += f"\n{stats.WITHIN_NOISE}"
    return Cell(f"{number(ratio)}×" if ratio is not None else DASH, note=note)


def key_table(outcome: GridOutcome, analysis: Analysis, styles: dict[str, ArmStyle]) -> Table:
    """A row an arm, the baseline first: verdict, quality, cost."""
    arms, quality, cost = arms_of(outcome), shown_measures(outcome, QUALITY), shown_measures(outcome, COST)
    tested = {m.name: analysis if m.name == analysis.metric else analyse_outcome(outcome, m.name) for m in quality}
    extra = [] if analysis.metric in tested else [Measure(analysis.metric, metric_label(analysis.metric))]
    tested |= {m.name: analysis for m in extra}
    base = arms[analysis.baseline]
    rows = []
    for arm, trials in arms.items():
        done = [t for t in trials if t.state == "done"]
        cells = [verdict_cell(analysis, arm, trials)]
        cells += [_quality_cell(tested[m.name], arm) for m in (*extra, *quality)]
        cells += [
            _latency_cell(trials, base) if m.name == "latency_ms" else Cell(number(_mean(trials, m.name))) for m in cost
        ]
        lost = len(trials) - len(done)
        note = f"{lost} of {len(trials)} seeds failed" if done and lost else ""
        rows.append(Row(arm, cells, styles[arm], arm == analysis.baseline, not done, note))
    short = len(analysis.baseline) <= 14
    columns = [(f"vs {analysis.baseline}" if short else "vs baseline", f"in {metric_label(analysis.metric)}")]
    columns += [(m.label, f"{m.unit} {m.arrow}".strip()) for m in (*extra, *quality)]
    columns += [(m.label, "ratio ↓" if m.name == "latency_ms" else f"{m.unit} {m.arrow}".strip()) for m in cost]
    return Table(columns, rows, _key_foot(outcome, analysis))


def _key_foot(outcome: GridOutcome, analysis: Analysis) -> list[str]:
    margin = fraction(outcome.decide.get("practical", 0.0))
    if analysis.noise.method == "none":
        foot = [
            "± is half of a 95% interval of sampling error alone; with one seed an arm it does not include training "
            "noise, so no difference here is a verdict."
        ]
    else:
        foot = [
            "Means over seeds; ± is half of a 95% interval that includes seed noise. ▲ better, ▼ worse than the "
            f"baseline by more than the margin of {100 * margin:.3g}%, for sure (all arms of a column together at "
            f"{100 * (1 - level_of(analysis.look)):.4g}%)."
        ]
    if any(len(a.values) for a in analysis.arms.values()):
        together = f"{100 * (1 - level_of(analysis.look)):.4g}%"
        kind = {"none": "sampling-only 95%", "rounds": "99%"}.get(analysis.noise.method, together)
        foot.append(
            f"With each verdict: the observed difference in {metric_label(analysis.metric)} and its {kind} interval."
        )
    floor = _mean(outcome.records, "fid_reference")
    if floor is not None:
        foot.append(f"Real pictures against as many other real ones have an FID of {number(floor)}.")
    if any(value_of(r.metrics, "latency_ms") is not None for r in outcome.records):
        foot.append(
            "Latency: median for one image, and the median ratio of interleaved rounds; “within noise” where its 99% "
            "interval holds 1."
        )
    return foot


def trial_table(outcome: GridOutcome, styles: dict[str, ArmStyle]) -> Table:
    """A row a trial."""
    names = [
        ("fid", "FID"),
        ("kid", "KID"),
        ("clip_score", "CLIP score"),
        (f"accuracy_{ALL}", "all skills"),
        ("validation_loss", "val. loss"),
        ("latency_ms", "latency ms"),
        ("train_seconds", "train s"),
    ]
    names = [(n, label) for n, label in names if any(value_of(r.metrics, n) is not None for r in outcome.records)]
    rows = []
    for arm, trials in arms_of(outcome).items():
        for t in trials:
            state = "failed" if t.state == "failed" else "from cache" if t.cached else "done"
            cells = [Cell(str(t.seed)), Cell(t.key, kind="key"), Cell(state, kind=state.replace(" ", "-"))]
            for name, _ in names:
                value = value_of(t.metrics, name)
                cells.append(Cell(number(value), error_number(value_of(t.metrics, f"{name}_se"), value)))
            rows.append(Row(arm, cells, styles[arm], t.baseline, t.state == "failed"))
    return Table([("seed", ""), ("key", ""), ("state", ""), *((label, "") for _, label in names)], rows)


def composition_table(outcome: GridOutcome, styles: dict[str, ArmStyle]) -> Table | None:
    """Accuracy on combinations seen in training and on held-out ones; None when nothing was measured."""
    names = [
        a
        for a in SHOWN_SKILLS
        if any(value_of(r.metrics, f"{p}accuracy_{a}") is not None for r in outcome.records for p in ("", "heldout_"))
    ]
    if not names:
        return None
    rows = []
    for arm, trials in arms_of(outcome).items():
        pairs = [(_mean(trials, f"accuracy_{a}"), _mean(trials, f"heldout_accuracy_{a}")) for a in names]
        rows.append(
            Row(
                arm,
                [Cell(number(v)) for pair in pairs for v in pair],
                styles[arm],
                arm == baseline_of(outcome),
                all(v is None for pair in pairs for v in pair),
            )
        )
    return Table([(name, kind) for name in names for kind in ("seen", "held out")], rows)


def target_table(outcome: GridOutcome, styles: dict[str, ArmStyle]) -> Table | None:
    """Phone targets: a row an arm, a column a target; None without eval.targets or without a finished trial.

    Of many arms only those are shown whose verdicts differ from the first one's.
    """
    try:
        from eval import targets
    except ImportError:
        return None
    arms = {arm: done for arm, trials in arms_of(outcome).items() if (done := [t for t in trials if t.state == "done"])}
    results = {
        arm: targets.check({name: _mean(done, name) for t in done for name in t.metrics}) for arm, done in arms.items()
    }
    if not results:
        return None
    first = next(iter(results))
    words = {arm: [r.verdict for r in checked] for arm, checked in results.items()}
    shown = [arm for arm in results if len(results) <= LABELLED or arm == first or words[arm] != words[first]]
    rows = [Row(arm, [_target_cell(r) for r in results[arm]], styles[arm], arms[arm][0].baseline) for arm in shown]
    reasons: dict[str, list[str]] = {}
    for r in results[first]:
        if r.why:
            reasons.setdefault(r.why, []).append(_target_name(r.name))
    foot = (
        [f"Why, for {first}:", *(_sentence(f"{', '.join(names)}: {why}.") for why, names in reasons.items())]
        if reasons
        else []
    )
    if len(shown) < len(results):
        foot.insert(0, f"The other {len(results) - len(shown)} arms have the same verdicts as {first}.")
    return Table([(_target_name(r.name), str(r.target).replace("<=", "≤")) for r in results[first]], rows, foot)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _target_cell(result: TargetResult) -> Cell:
    measured = "" if result.measured in ("-", "", None) else str(result.measured)
    return Cell(str(result.verdict), note=measured, kind=_kind(f"target-{result.verdict}"))


def _target_name(name: str) -> str:
    """ "ram_3gb" -> "3 GB phone", "nfe" -> "NFE"."""
    size = re.fullmatch(r"ram_([\d.]+)gb", name)
    return f"{size[1]} GB phone" if size else name.upper() if name == "nfe" else name.replace("_", " ")


def write_csv(outcome: GridOutcome, path: Path) -> None:
    """results.csv: a row a trial; a metric that a trial has not is an empty field."""
    extra = sorted({name for r in outcome.records for name in r.metrics} - set(COLUMNS))
    metrics, axes = [*COLUMNS, *extra], list(outcome.axes)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["key", "arm", "seed", "baseline", "state", *axes, *metrics])
        for trials in arms_of(outcome).values():
            for r in trials:
                numbers = [r.metrics.get(name) for name in metrics]
                writer.writerow(
                    [
                        r.key,
                        r.arm,
                        r.seed,
                        str(r.baseline).lower(),
                        r.state,
                        *(r.values.get(a, "") for a in axes),
                        *("" if v is None or not math.isfinite(v) else f"{v:.8g}" for v in numbers),
                    ]
                )
