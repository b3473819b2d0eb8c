"""Drawing charts: one look for all, written as PNG for Markdown and as SVG that takes its colours from the page."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ablations.report.measures import number
from ablations.report.palette import HUES, INK, MUTED, PAPER, RULE

WIDTH = 4.9  # inches; half a page's width, and about a phone's
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.titlesize": 9.5,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.6,
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "lines.linewidth": 1.5,
    "legend.labelcolor": INK,
    "legend.columnspacing": 1.4,
    "legend.handlelength": 1.8,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}


@dataclass(frozen=True)
class Chart:
    """A figure ready for both reports. ``svg`` is markup for the page; ``file`` the PNG relative to the report."""

    name: str
    title: str
    caption: str
    svg: str
    file: str
    alt: str


def new_figure(height: float = 3.4, width: float = WIDTH) -> Figure:
    """A figure without pyplot, so that nothing global is left behind."""
    return Figure(figsize=(width, height), layout="constrained")


def finish(figure: Figure, folder: Path, name: str, title: str, caption: str) -> Chart:
    """Writes ``folder``/figures/``name``.png and returns the chart."""
    path = folder / "figures" / f"{name}.png"
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(path, dpi=200)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Chart(
        name, title, caption, themed_svg(buffer.getvalue(), title), f"figures/{name}.png", f"{title}. {caption}"
    )


def themed_svg(svg: str, title: str) -> str:
    """Matplotlib's SVG made fit for a page: scalable, without ids that repeat, its colours CSS variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[\d.]+pt"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[\d.]+pt"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) xmlns:xlink="[^"]*"', r"\1", svg).replace("xlink:href", "href")
    svg = re.sub(r'(<svg[^>]*?) xmlns="[^"]*"', r"\1", svg)
    # Names such as axes_1 repeat between figures; only hashed ones are referred to, and those are salted by figure.
    svg = re.sub(r' id="(?!m[0-9a-f]{8}|p[0-9a-f]{8}|[A-Z]\d_)[^"]*"', "", svg)
    for colour, variable in (
        (INK, "ink"),
        (MUTED, "muted"),
        (RULE, "rule"),
        (PAPER, "paper"),
        *((hue, f"hue-{i}") for i, hue in enumerate(HUES) if i),
    ):
        svg = re.sub(colour, f"var(--{variable})", svg, flags=re.IGNORECASE)
    svg = re.sub(r"(font: [^;]*?)'DejaVu Sans'[^;\"]*", r"\1var(--sans)", svg)
    return svg.replace("<svg", f'<svg class="chart" role="img" aria-label="{title}"', 1).strip()


def use_log(values: list[float], ratio: float = 4.0) -> bool:
    """Whether an axis of these values reads better on a log scale."""
    positive = [v for v in values if v > 0]
    return len(positive) == len(values) > 1 and max(positive) / min(positive) > ratio


def log_axis(axes: Axes, which: str, values: list[float]) -> None:
    """Log scale with plain numbers: ticks at 1, 2, 5 times powers of ten, on a range of at least one such step."""
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    span = max(values) / min(values)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 300 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}" if v < 1000 else number(v)))
    axis.set_minor_formatter(NullFormatter())
