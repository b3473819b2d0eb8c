"""benchmarks.mobile: bad words are told, and its report says what its rows say. Its phases take hours; their parts have tests
of their own in tests/eval."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mobile import Plan, Setup
from benchmarks.mobile_export import once
from benchmarks.mobile_report import build_report, verdict
from benchmarks.mobile_rows import read_rows
from iris.errors import SettingError

PEAKS = {"pytorch": 1400.0, "onnxruntime": 900.0, "executorch": 500.0}      # of made-up rows, MB


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Rows of one preset in fp32 by each runtime; whatever needs less than a cap holds."""
    plan = Plan.of([f"work={tmp_path}", "presets=tiny", "iterations=4", "threads=1"])
    setups = [setup for setup in plan.setups() if setup.dtype == "fp32"]
    for setup in setups:
        key = {"preset": "tiny", "runtime": setup.runtime, "dtype": "fp32", "iterations": 4}
        peak = PEAKS[setup.runtime]
        image = {"peak_memory_mb": peak, "import_mb": 50.0, "loaded_mb": 300.0, "weights_mb": 250.0, "activations_mb": None}
        once(plan, f"memory-{setup}", lambda: key | {
            "threads": 1, "image": {"all": image, "one part": image | {"peak_memory_mb": peak / 2}},
            "parts": {"text": image, "generator": image, "decoder": image}})
        for resident, need in (("all", peak), ("one part", peak / 2)):
            caps = [run_under(cap, cap >= need) for cap in (600, 1000, 2000)]
            once(plan, f"caps-{resident.replace(' ', '_')}-{setup}", lambda: key | {"resident": resident, "caps": caps})
        if setup.runtime != "pytorch":
            once(plan, f"agreement-{setup}", lambda: key | {"rms": 1e-6, "max": 2e-6})
    once(plan, "latency-tiny-4", lambda: [timed(setup, part) for setup in setups for part in ("image", "text")])
    return tmp_path


def run_under(cap: float, held: bool) -> dict[str, Any]:
    return {"cap_mb": cap, "scope": "process", "limit_mb": cap, "method": "RLIMIT_DATA", "held": held, "peak_mb": 1.0,
            "charged_mb": 1.0, "why": ""}


def timed(setup: Setup, part: str) -> dict[str, Any]:
    times = {"median_ms": 123.4, "q1_ms": 120.0, "q3_ms": 130.0, "ratio_to_first": 1.5, "ratio_q1": 1.4, "ratio_q3": 1.6}
    return {"preset": setup.preset, "runtime": setup.runtime, "dtype": setup.dtype, "iterations": setup.iterations, "part": part,
            "n": 4, "threads": 2, "contended": False, "reasons": [], **times}


def test_a_row_for_each_cap_and_each_part(work, tmp_path):
    build_report(read_rows(work), tmp_path / "report")
    with open(tmp_path / "report" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:9] == ["preset", "runtime", "dtype", "steps", "iterations", "latency_ms", "peak_memory_mb", "cap",
                                 "verdict"]
    images = [row for row in rows if row["part"] == "image"]
    assert len(images) == 3 * 2 * 3 and len(rows) == len(images) + 3 * 3
    held = {(row["runtime"], row["resident"]): row["verdict"] for row in images if row["cap"] == "600"}
    assert {name for name, verdict in held.items() if verdict == "holds"} == {
        ("executorch", "all"), ("executorch", "one part"), ("onnxruntime", "one part")}
    assert {row["latency_ms"] for row in images if row["resident"] == "all"} == {"123.4"}
    assert {row["latency_ms"] for row in images if row["resident"] == "one part"} == {""}       # not what was timed


def test_the_page_says_which_presets_fit(work, tmp_path):
    page = build_report(read_rows(work), tmp_path / "report").read_text()
    said = verdict(read_rows(work))
    assert said == ("Under a cap of 600 MB a process makes an image of tiny (ExecuTorch fp32) with everything loaded; of tiny "
                    "(ONNX Runtime fp32, ExecuTorch fp32) with one part loaded at a time.")
    assert said in page and "latency: 2; memory: 1" in page
    assert "Latency by runtime" in page and len(list((tmp_path / "report" / "figures").glob("*.png"))) == 2


def test_a_row_is_measured_once(tmp_path):
    plan = Plan.of([f"work={tmp_path}"])
    once(plan, "one", lambda: {"value": 1})
    once(plan, "one", lambda: pytest.fail("measured again"))
    assert json.loads((tmp_path / "rows" / "one.json").read_text()) == {"value": 1}


@pytest.mark.parametrize(("words", "expected"), [
    ([], "work=DIR is needed"), (["work=x", "presets=huge"], "presets='huge'"), (["work=x", "rounds=1"], "rounds=1"),
    (["work=x", "iterations=four"], "iterations=four"), (["work=x", "speed=1"], "speed"), (["work"], "name=value"),
])
def test_bad_words_are_named(words, expected):
    with pytest.raises(SettingError, match=expected):
        Plan.of(words)
