"""The measures that a report shows: their names, units, directions, and how a number is printed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ablations.answer.verdict import better_direction
from eval.metrics.skills import ALL, SKILLS

DASH = "–"
MINUS = "−"
SHOWN_SKILLS = (*SKILLS, ALL)


@dataclass(frozen=True)
class Measure:
    """One column: the metric's name in results.csv, its heading, and what stands beneath it."""

    name: str
    label: str
    unit: str = ""

    @property
    def better(self) -> str:
        """lower or higher."""
        return better_direction(self.name)

    @property
    def arrow(self) -> str:
        """Which way is better, as a sign."""
        return "↓" if self.better == "lower" else "↑"


QUALITY = (
    Measure("fid", "FID"),
    Measure("kid", "KID", "×1000"),
    Measure("clip_score", "CLIP", "score"),
    *(Measure(f"accuracy_{name}", name, "acc.") for name in ("colour", "shape", ALL)),
)
COST = (
    Measure("latency_ms", "latency", "ms"),
    Measure("peak_memory_mb", "memory", "peak MB"),
    Measure("params_m", "params", "M"),
    Measure("gflops", "GFLOP"),
)
COLUMNS = (
    "fid",
    "fid_se",
    "fid_reference",
    "kid",
    "kid_se",
    "precision",
    "recall",
    "density",
    "coverage",
    "clip_score",
    "clip_score_se",
    "samples",
    *(f"accuracy_{name}" for name in SHOWN_SKILLS),
    *(f"heldout_accuracy_{name}" for name in SHOWN_SKILLS),
    "params_m",
    "gflops",
    "latency_ms",
    "latency_q1_ms",
    "latency_q3_ms",
    "latency_ratio",
    "latency_ratio_low",
    "latency_ratio_high",
    "peak_memory_mb",
    "weights_mb",
    "activations_mb",
    "validation_loss",
    "train_seconds",
)


def value_of(metrics: Mapping[str, float | None], name: str) -> float | None:
    """The metric when it is there and finite, else None."""
    value = metrics.get(name)
    return float(value) if value is not None and math.isfinite(value) else None


def decimals_for(value: float, digits: int = 3) -> int:
    """Decimals that show ``value`` with this many significant digits."""
    if value == 0 or not math.isfinite(value):
        return digits - 1
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    return max(0, digits - 1 - exponent)


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with three significant digits (thousands rounded and separated), "–" where there is none."""
    if value is None or not math.isfinite(value):
        return DASH
    if abs(value) >= 10**digits - 0.5:
        step = 10 ** (math.floor(math.log10(abs(value))) - digits + 1)
        return f"{round(value / step) * step:,.0f}".replace("-", MINUS)
    return f"{value:.{decimals_for(value, digits)}f}".replace("-", MINUS)


def error_number(error: float | None, value: float | None) -> str:
    """An error with the decimals of its value, or one significant digit where that would print as zero; "" for None."""
    if error is None or not math.isfinite(error) or value is None:
        return ""
    places = max(decimals_for(value), decimals_for(error, 1)) if error > 0 else decimals_for(value)
    return f"{error:,.{places}f}"


def signed(value: float | None, percent: bool) -> str:
    """A difference with its sign: "+4.6%", "−0.012"; "–" for None."""
    if value is None or not math.isfinite(value):
        return DASH
    shown = 100 * value if percent else value
    # Differences are known far less well than values: two digits, and whole percents from 10 up.
    text = f"{abs(shown):.{decimals_for(shown, 2)}f}" if abs(shown) < 1000 else number(abs(shown))
    if float(text.replace(",", "")) == 0:
        return f"0{'%' if percent else ''}"
    return f"{MINUS if shown < 0 else '+'}{text}{'%' if percent else ''}"


def duration(seconds: float | None) -> str:
    """ "48 s", "12 min", "3 h 20 min"."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return DASH
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
