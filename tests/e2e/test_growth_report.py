"""benchmarks.growth: its page and figure, of made-up curves; measuring them has tests in tests/eval."""

from __future__ import annotations

import sys
from argparse import Namespace

import pytest

from benchmarks.growth import draw, report, worst
from eval.speed.growth import Curve
from eval.speed.latency import LatencyResult

SIZES = (64, 256, 1024)


def timed(milliseconds: float, *reasons: str) -> LatencyResult:
    times = dict.fromkeys(("median_ms", "q1_ms", "q3_ms", "processor_ms"), milliseconds)
    ratios = dict.fromkeys(("ratio_to_first", "ratio_q1", "ratio_q3"), 1.0)
    return LatencyResult(
        **times, **ratios, n=2, threads=1, device="cpu", contended=bool(reasons), reasons=reasons, times_ms=()
    )


@pytest.fixture
def curves() -> dict[str, Curve]:
    square = {size: timed(size**2 / 1e4) for size in SIZES}
    line = {size: timed(size / 1e1, f"the load average is {size / 64:.1f} on 2 cores") for size in SIZES}
    part = Curve(
        {64: timed(3.0)}, {64: 0.1}, {256: "predicted to take 90 s, more than 60 s", 1024: "a smaller size was skipped"}
    )
    return {
        "attention": Curve(square, dict.fromkeys(SIZES, 1.0)),
        "fourier": Curve(line, dict.fromkeys(SIZES, 0.5)),
        "slow": part,
    }


def test_the_page_has_command_exponents_and_the_largest_of_each_reason(curves, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["growth.py", "--sides", "8", "16", "32", "--out", "a b.md"])
    text = report(curves, Namespace(sides=[8, 16, 32], dim=16, heads=2, rounds=2, out=tmp_path / "growth.md"))
    assert "`uv run python -m benchmarks.growth --sides 8 16 32 --out 'a b.md'`" in text
    assert "| 2.00 ± 0.00 |" in text and "| 1.00 ± 0.00 | from 1,000 tokens |" in text
    assert "(c): contended; at most: the load average is 16.0 on 2 cores." in text
    assert "slow at 256 tokens: predicted to take 90 s" in text and "![time against tokens](growth.png)" in text
    assert "| slow | 0.10 | skipped | skipped |" in text


def test_of_each_kind_of_reason_the_largest():
    said = [
        "the load average is 9.5 on 2 cores",
        "the load average is 12.0 on 2 cores",
        "the interquartile range is 14% of the median (limit 10%)",
        "the load average is 2.1 on 2 cores",
    ]
    assert sorted(worst(said)) == [said[2], said[1]]
    assert worst([]) == []


def test_the_figure_is_drawn(curves, tmp_path):
    draw(curves, tmp_path / "growth")
    assert (tmp_path / "growth.png").read_bytes()[1:4] == b"PNG"
    assert all(name in (tmp_path / "growth.svg").read_text() for name in ("<svg", "tokens"))
