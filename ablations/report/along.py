"""Quality along an axis of numbers, such as sampling steps or passes: a line for each value of the other axes."""

from __future__ import annotations

from pathlib import Path

from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ablations.answer.records import GridOutcome, TrialRecord
from ablations.answer.stats import Analysis
from ablations.answer.verdict import arms_of, metric_label
from ablations.report.charts import Chart, finish, log_axis, new_figure, use_log
from ablations.report.measures import number, value_of
from ablations.report.palette import DASHES, HUES, MARKERS

FEWEST = 3  # values of an axis that make a line
Line = dict[float, float]  # place on the axis -> mean over seeds


def draw_along(outcome: GridOutcome, analysis: Analysis, folder: Path) -> Chart | None:
    """decide.metric along the axis with most numbers; None where no axis has enough."""
    axis = number_axis(outcome)
    lines = {} if axis is None else lines_along(outcome, analysis.metric, axis)
    lines = {name: line for name, line in lines.items() if len(line) > 1}
    if not lines or len(lines) > (len(HUES) - 1) * len(DASHES):
        return None
    label, metric = axis.replace("_", " "), metric_label(analysis.metric)
    figure = new_figure(3.6)
    axes = figure.add_subplot()
    handles = []
    for rank, (name, line) in enumerate(lines.items()):
        turn, hue = divmod(rank, len(HUES))
        look = {"color": HUES[hue], "linestyle": DASHES[turn], "marker": MARKERS[rank % len(MARKERS)]}
        axes.plot(*zip(*line.items(), strict=True), markersize=5, **look)
        handles.append(Line2D([], [], label=name, **look))
    _number_axis(axes, sorted({x for line in lines.values() for x in line}))
    values = [value for line in lines.values() for value in line.values()]
    if analysis.scale == "log" and use_log(values):
        log_axis(axes, "y", values)
    axes.set_xlabel(label)
    axes.set_ylabel(f"{metric} ({analysis.better} is better)")
    if len(lines) > 1:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(lines)))
    return finish(figure, folder, "along", f"{metric} along {label}", _caption(lines, analysis, label))


def number_axis(outcome: GridOutcome) -> str | None:
    """The axis with most different numbers, if any has enough."""
    counts = {}
    for name, values in outcome.axes.items():
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) >= FEWEST:
            counts[name] = len(numbers)
    return max(counts, key=lambda name: counts[name], default=None)


def lines_along(outcome: GridOutcome, metric: str, axis: str) -> dict[str, Line]:
    """What the other axes say -> the metric's mean over seeds at each number of ``axis``."""
    lines: dict[str, Line] = {}
    for trials in arms_of(outcome).values():
        others = {key: value for key, value in trials[0].values.items() if key != axis}
        name = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in others.items()) or outcome.name
        place, mean = trials[0].values.get(axis), _mean(trials, metric)
        if isinstance(place, int | float) and mean is not None:
            lines.setdefault(name, {})[float(place)] = mean
    return {name: dict(sorted(line.items())) for name, line in lines.items()}


def _mean(trials: list[TrialRecord], metric: str) -> float | None:
    values = [v for t in trials if t.state == "done" and (v := value_of(t.metrics, metric)) is not None]
    return sum(values) / len(values) if values else None


def _number_axis(axes, places: list[float]) -> None:
    if use_log(places):
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def _caption(lines: dict[str, Line], analysis: Analysis, label: str) -> str:
    """Where the best value lies, and how far each line's ends are from its best."""
    best = min if analysis.better == "lower" else max
    points = [(value, place, name) for name, line in lines.items() for place, value in line.items()]
    value, place, name = best(points)
    told = f"Best: {number(value)} at {label} {place:g}"
    return told + (f" ({name})" if len(lines) > 1 else "") + ". Mean over seeds."
