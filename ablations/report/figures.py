"""The charts of a report: quality against cost, loss curves, gates. Each caption says what is to be seen."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ablations.answer import stats
from ablations.answer.records import GridOutcome, TrialRecord
from ablations.answer.stats import Analysis
from ablations.answer.verdict import arms_of, metric_label
from ablations.report.along import draw_along
from ablations.report.charts import STYLE, Chart, finish, log_axis, new_figure, use_log
from ablations.report.measures import number, value_of
from ablations.report.palette import DRAWN, HUES, INK, LABELLED, MUTED, ArmStyle, drawn_arms, left_out

COSTS = (("latency_ms", "latency of one image", "ms", "fastest"), ("params_m", "parameters", "M", "smallest"))
POINTS = 400  # a curve keeps at most this many points
PANELS = 12  # trials whose gates are drawn


def draw_charts(outcome: GridOutcome, analysis: Analysis, styles: dict[str, ArmStyle], folder: Path) -> list[Chart]:
    """Every chart that the records have data for, written to ``folder``/figures."""
    arms, said = arms_of(outcome), left_out(outcome, analysis)
    drawn = {arm: arms[arm] for arm in drawn_arms(outcome, analysis)}
    with matplotlib.rc_context(STYLE):
        charts = [_tradeoff(outcome, analysis, styles, folder, *cost) for cost in COSTS]
        single = [draw_along(outcome, analysis, folder), _losses(drawn, styles, folder), _gates(drawn, styles, folder)]
    charts += [chart and replace(chart, caption=chart.caption + said, alt=chart.alt + said) for chart in single]
    return [chart for chart in charts if chart]


def _mean(trials: list[TrialRecord], metric: str) -> float | None:
    values = [v for t in trials if t.state == "done" and (v := value_of(t.metrics, metric)) is not None]
    return sum(values) / len(values) if values else None


def _tradeoff(
    outcome: GridOutcome,
    analysis: Analysis,
    styles: dict[str, ArmStyle],
    folder: Path,
    cost: str,
    axis: str,
    unit: str,
    superlative: str,
) -> Chart | None:
    """decide.metric against a cost, a point an arm with its 95 % interval, small dots for single seeds."""
    arms = arms_of(outcome)
    places = {
        arm: (x, analysis.arms[arm].mean)
        for arm, trials in arms.items()
        if (x := _mean(trials, cost)) is not None and analysis.arms[arm].mean is not None
    }
    if not places:
        return None
    figure = new_figure()
    axes = figure.add_subplot()
    for arm, (x, y) in places.items():
        style, summary = styles[arm], analysis.arms[arm]
        if summary.low is not None and summary.high is not None:
            axes.plot(
                [x, x], [summary.low, summary.high], color=style.colour, linewidth=1.1, solid_capstyle="butt", zorder=2
            )
        seeds = [
            (c, v)
            for t in arms[arm]
            if t.state == "done"
            and (c := value_of(t.metrics, cost)) is not None
            and (v := value_of(t.metrics, analysis.metric)) is not None
        ]
        if len(seeds) > 1:
            axes.scatter(*zip(*seeds, strict=True), s=7, color=style.colour, alpha=0.5, linewidths=0, zorder=3)
        axes.scatter([x], [y], s=46, color=style.colour, marker=style.marker, linewidths=0, zorder=4)
    _axes_for(axes, places, analysis, f"{axis}, {unit}")
    drawn = drawn_arms(outcome, analysis)
    _name_points(axes, {arm: place for arm, place in places.items() if arm in drawn}, styles, analysis)
    name = f"{analysis.metric}_vs_{cost.split('_')[0]}"
    title = f"{metric_label(analysis.metric)} against {axis.removesuffix(' of one image')}"
    return finish(figure, folder, name, title, _tradeoff_caption(analysis, places, unit, superlative))


def _axes_for(axes: Axes, places: dict[str, tuple[float, float]], analysis: Analysis, axis: str) -> None:
    xs, ys = ([p[i] for p in places.values()] for i in (0, 1))
    axes.margins(0.14, 0.12)
    if use_log(xs):
        log_axis(axes, "x", xs)
    elif max(xs) - min(xs) < 0.02 * max(xs):  # matched arms differ by less than this: do not blow it up
        axes.set_xlim(0.9 * min(xs), 1.1 * max(xs))
    if analysis.scale == "log" and use_log(ys, 6.0):
        log_axis(axes, "y", ys)
    axes.set_xlabel(axis)
    axes.set_ylabel(f"{metric_label(analysis.metric)} ({analysis.better} is better)")


def _name_points(
    axes: Axes, places: dict[str, tuple[float, float]], styles: dict[str, ArmStyle], analysis: Analysis
) -> None:
    """Names beside the points, moved up or down until none covers another; row numbers when there are many."""
    many = len(places) > LABELLED
    axes.figure.canvas.draw()  # constrained layout settles here, so that pixels below are the final ones
    window = axes.get_window_extent()
    taken: list[tuple[float, float, float, float]] = []
    spots = {arm: axes.transData.transform(place) for arm, place in places.items()}
    scale = axes.figure.dpi / 72
    markers = [(x - 4 * scale, x + 4 * scale, y - 4 * scale, y + 4 * scale) for x, y in spots.values()]
    for arm, (x, _) in spots.items():  # an interval's bar is in the way too
        low, high = analysis.arms[arm].low, analysis.arms[arm].high
        if low is not None and high is not None:
            ends = [axes.transData.transform((places[arm][0], y))[1] for y in (low, high)]
            markers.append((x - scale, x + scale, *ends))
    for arm in sorted(spots, key=lambda a: -spots[a][1]):
        x, y = spots[arm]
        text = str(styles[arm].number) if many else arm
        width, height = (0.6 * 9 * len(text) + 3) * scale, 11 * scale
        best, best_hits = (6.0, 0.0, "left"), math.inf
        for up in (0, 9, -9, 17, -17, 26, -26):
            for side in ("left", "right"):
                start = x + 6 * scale if side == "left" else x - 6 * scale - width
                box = (start, start + width, y + up * scale - height / 2, y + up * scale + height / 2)
                hits = sum(_overlap(box, other) for other in taken + markers)
                hits += 10 * (box[1] > window.x1 + 20 * scale or box[0] < window.x0)
                if hits < best_hits:
                    best, best_hits, best_box = (6.0 if side == "left" else -6.0, float(up), side), hits, box
        taken.append(best_box)
        axes.annotate(
            text,
            places[arm],
            xytext=best[:2],
            textcoords="offset points",
            ha=best[2],
            va="center",
            fontsize=9,
            color=INK,
            annotation_clip=False,
        )


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


def _tradeoff_caption(analysis: Analysis, places: dict[str, tuple[float, float]], unit: str, superlative: str) -> str:
    corner = "lower" if analysis.better == "lower" else "upper"
    best = (min if analysis.better == "lower" else max)(places, key=lambda a: places[a][1])
    least = min(places, key=lambda a: places[a][0])
    lowest = "lowest" if analysis.better == "lower" else "highest"
    measure = f"{metric_label(analysis.metric)} ({number(places[best][1])})"
    text = f"Towards the {corner} left is better: {best} has the {lowest} {measure}"
    verdict = analysis.comparisons[best].verdict if best in analysis.comparisons else None
    if verdict in (stats.WITHIN_NOISE, stats.EQUIVALENT):
        text += f", {verdict} {'of' if verdict == stats.WITHIN_NOISE else 'to'} {analysis.baseline}"
    if len(places) > 1 and max(p[0] for p in places.values()) <= 1.02 * places[least][0]:
        text += "; the arms are matched within 2% on the horizontal axis"
    elif len(places) > 1:
        text += (
            f"{' and is' if least == best else f'; {least} is'} the {superlative} ({number(places[least][0])} {unit})"
        )
    # What the bars hold decides how far apart two points must be to mean anything.
    bars = "sampling error only, one seed" if all(analysis.arms[a].sampling_only for a in places) else "seed noise"
    text += f". Bars: 95% interval ({bars})."
    if len(places) > DRAWN:
        text += f" The baseline and the best {DRAWN - 1} are numbered."
    return text + (" Numbers are rows of the key table." if len(places) > LABELLED else "")


def read_curve(trial: TrialRecord, name: str = "loss") -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one curve of a trial's own training; lines without a finite value are left out."""
    steps, values = [], []
    path = trial.curve
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            step, value = int(entry["step"]), float(entry[name])
        except (ValueError, KeyError, TypeError):  # a line cut off by a kill, or another kind of line
            continue
        if math.isfinite(value):
            steps.append(step)
            values.append(value)
    return np.array(steps), np.array(values)


def smooth(values: np.ndarray, span: float) -> np.ndarray:
    """Exponential moving average over about ``span`` values, without the bias towards its start at zero."""
    decay, mean, weight, out = 1 - 1 / max(span, 1.0), 0.0, 0.0, np.empty(len(values))
    for i, value in enumerate(values):
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        out[i] = mean / weight
    return out


def _legend_columns(names: Iterable[str]) -> int:
    """The most columns, filled top down, whose legend stays inside the figure (about 74 characters, a sample 6)."""
    lengths = [len(name) + 6 for name in names]
    for columns in range(min(5, len(lengths)), 1, -1):
        rows = math.ceil(len(lengths) / columns)
        if sum(max(lengths[i : i + rows]) for i in range(0, len(lengths), rows)) <= 74:
            return columns
    return 1


def _losses(arms: dict[str, list[TrialRecord]], styles: dict[str, ArmStyle], folder: Path) -> Chart | None:
    figure = new_figure(3.25 + 0.17 * math.ceil(len(arms) / _legend_columns(arms)))
    axes = figure.add_subplot()
    ends: dict[str, list[float]] = {}
    shown: list[float] = []
    broken = False
    for arm, trials in arms.items():
        style = styles[arm]
        for trial in trials:
            steps, values = read_curve(trial)
            if len(steps) < 2:
                continue
            line, stride = smooth(values, len(values) / 40), max(1, len(values) // POINTS)
            axes.plot(steps[::stride], values[::stride], color=style.colour, alpha=0.16, linewidth=0.6, zorder=1)
            axes.plot(
                steps[::stride], line[::stride], color=style.colour, linestyle=style.dash, linewidth=1.3, zorder=2
            )
            shown += [float(v) for v in line]
            if trial.state == "failed":
                broken = True
                axes.scatter(steps[-1:], line[-1:], marker="x", s=36, color=style.colour, zorder=3)
            else:
                ends.setdefault(arm, []).append(float(line[-1]))
    if not shown:
        return None
    if use_log(shown):
        log_axis(axes, "y", shown)
    axes.set_ylim(0.93 * min(shown), min(max(shown), 4 * float(np.quantile(shown, 0.8))) * 1.05)
    axes.set_xlabel("training step")
    axes.set_ylabel("training loss")
    handles = [Line2D([], [], color=styles[a].colour, linestyle=styles[a].dash, label=a) for a in arms]
    figure.legend(handles=handles, loc="outside lower center", ncols=_legend_columns(arms))
    caption = "Lines are smoothed over a fortieth of training, the raw loss is faint behind them"
    if len(ends) > 1:
        final = {arm: sum(v) / len(v) for arm, v in ends.items()}
        low, high = min(final, key=final.__getitem__), max(final, key=final.__getitem__)
        caption += f"; {low} ends lowest ({number(final[low])}), {high} highest ({number(final[high])})"
    return finish(
        figure, folder, "loss", "Training loss", caption + (". A cross marks where a trial failed." if broken else ".")
    )


def _read_gates(trial: TrialRecord) -> dict[str, np.ndarray] | None:
    """Pathway -> mean gate [layers, iterations]; None without a readable gates.json."""
    path = trial.folder / "gates.json"
    if not path.exists():
        return None
    layers = json.loads(path.read_text(encoding="utf-8")).get("layers", [])
    rows = [layer["iterations"] for layer in layers if layer.get("iterations")]
    if not rows:
        return None
    names = [
        key for key, value in rows[0][0].items() if key not in ("iteration", "std") and isinstance(value, int | float)
    ]
    return {name: np.array([[float(entry[name]) for entry in row] for row in rows]) for name in names} or None


def _gates(arms: dict[str, list[TrialRecord]], styles: dict[str, ArmStyle], folder: Path) -> Chart | None:
    """A panel a trial: each pathway's gate over iterations, the mean over layers bold, single layers faint.

    Of many trials, one of each arm, and the first of these.
    """
    gated = [[(trial, gates) for trial in trials if (gates := _read_gates(trial))] for trials in arms.values()]
    found = all_found = [pair for pairs in gated for pair in pairs]
    if not found:
        return None
    if len(found) > PANELS:
        found = [pairs[0] for pairs in gated if pairs][:PANELS]
    columns = min(len(found), 2 if len(found) <= 6 else 3)
    rows = math.ceil(len(found) / columns)
    figure = new_figure(3.4 if rows == 1 else 0.5 + 1.7 * rows)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    names = list(dict.fromkeys(name for _, gates in found for name in gates))
    # A pathway that is also an arm keeps that arm's colour.
    spare = [hue for hue in HUES[1:] if hue not in {styles[n].colour for n in names if n in styles}]
    colours = {
        n: styles[n].colour if n in styles and styles[n].hue else spare.pop(0) if spare else MUTED for n in names
    }
    marks = dict(zip(names, ("o", "s", "^", "D", "v", "P"), strict=False))
    several = any(len(trials) > 1 for trials in arms.values())
    for panel, (trial, gates) in zip(panels.flat, found, strict=False):
        for name, table in gates.items():
            iterations = np.arange(1, table.shape[1] + 1)
            for layer in table if len(table) > 1 else []:
                panel.plot(iterations, layer, color=colours[name], alpha=0.3, linewidth=0.8)
            panel.plot(iterations, table.mean(axis=0), color=colours[name], marker=marks.get(name, "o"), markersize=4)
        panel.set_title(trial.label if several else trial.arm, fontsize=8.5 if columns < 3 else 7)
        panel.xaxis.get_major_locator().set_params(integer=True)
    for panel in panels.flat[len(found) :]:
        panel.set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("iteration of the core")
    for panel in panels[:, 0]:
        panel.set_ylabel("mean gate")
    handles = [Line2D([], [], color=colours[n], marker=marks.get(n, "o"), markersize=4, label=n) for n in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 5))
    caption = _gates_caption(found[0][0].arm, found[0][1])
    if len(found) < len(all_found):
        caption += f" One trial an arm, {len(found)} of {len(all_found)} that have gates."
    return finish(figure, folder, "gates", "Gates over iterations", caption)


def _gates_caption(arm: str, gates: dict[str, np.ndarray]) -> str:
    first, last = ({name: float(table.mean(axis=0)[i]) for name, table in gates.items()} for i in (0, -1))
    start, end = max(first, key=first.__getitem__), max(last, key=last.__getitem__)
    if len(next(iter(gates.values()))[0]) == 1:
        told = f"{start} is the most open pathway of {arm} ({number(first[start])})"
    else:
        told = f"In {arm}, {start} is the most open at the first iteration ({number(first[start])})" + (
            f" and still at the last ({number(last[end])})"
            if start == end
            else f", {end} at the last ({number(last[end])})"
        )
    layered = " Faint lines are single layers, bold ones their mean." if len(next(iter(gates.values()))) > 1 else ""
    return f"{told}.{layered}"
