"""Quality against the number of passes through the core: does one model serve them all?"""

from __future__ import annotations

import math
import re
from pathlib import Path

from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ablations.answer.records import TrialRecord
from ablations.report.charts import Chart, finish, log_axis, new_figure, use_log
from ablations.report.measures import number, value_of
from ablations.report.palette import ArmStyle

_AT = re.compile(r"fid_at_(\d+)")


def draw_passes(arms: dict[str, list[TrialRecord]], styles: dict[str, ArmStyle], folder: Path) -> Chart | None:
    """FID of each arm's trained models at other numbers of passes, the mean over seeds; None where none was measured."""
    curves = {arm: curve for arm, trials in arms.items() if len(curve := _curve(trials)) > 1}
    if not curves:
        return None
    figure = new_figure(3.6)
    axes = figure.add_subplot()
    for arm, curve in curves.items():
        style = styles[arm]
        axes.plot(
            *zip(*curve.items(), strict=True),
            color=style.colour,
            linestyle=style.dash,
            marker=style.marker,
            markersize=5,
        )
    passes = sorted({r for curve in curves.values() for r in curve})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(passes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    values = [v for curve in curves.values() for v in curve.values()]
    if use_log(values):
        log_axis(axes, "y", values)
    axes.set_xlabel("passes through the core when sampling")
    axes.set_ylabel("FID (lower is better)")
    handles = [
        Line2D([], [], color=styles[a].colour, linestyle=styles[a].dash, marker=styles[a].marker, label=a)
        for a in curves
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(curves)))
    return finish(figure, folder, "fid_vs_passes", "FID against passes", _caption(curves))


def _curve(trials: list[TrialRecord]) -> dict[int, float]:
    """Number of passes -> mean FID over the finished trials that have it."""
    found: dict[int, list[float]] = {}
    for trial in trials:
        for name in trial.metrics if trial.state == "done" else ():
            if (match := _AT.fullmatch(name)) and (value := value_of(trial.metrics, name)) is not None and value > 0:
                found.setdefault(int(match.group(1)), []).append(value)
    return {r: sum(values) / len(values) for r, values in sorted(found.items())}


def _caption(curves: dict[str, dict[int, float]]) -> str:
    """Which arm loses least between its best and its worst number of passes."""
    spread = {arm: max(curve.values()) / min(curve.values()) for arm, curve in curves.items()}
    least = min(spread, key=lambda arm: (spread[arm], arm))
    best = min(curves[least], key=curves[least].__getitem__)
    told = f"{least} changes least: from {number(curves[least][best])} at {best} to {number(max(curves[least].values()))} at its worst"
    if len(curves) > 1 and not math.isclose(max(spread.values()), spread[least]):
        most = max(spread, key=lambda arm: (spread[arm], arm))
        told += f"; {most} most, by a factor of {number(spread[most], 2)}"
    return told + ". The same trained models, sampled with other numbers of passes; mean over seeds."
