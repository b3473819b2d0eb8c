"""benchmarks.mobile: bad words are told, and its report says what its rows say. Its phases take hours; their parts have tests
of their own in tests/eval."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mobile import measure
from benchmarks.mobile.plan import Plan, Setup
from benchmarks.mobile.report import build_report, verdict
from benchmarks.mobile.rows import Rows, read_rows
from benchmarks.mobile.tables import latency_table, parts_table, passed_beside_import, target_results
from eval.targets import published
from iris.errors import SettingError

PEAKS = {"pytorch": 1400.0, "onnx": 900.0, "executorch": 500.0}  # of made-up rows, MB


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Rows of one preset in fp32 by each runtime; whatever needs less than a cap holds."""
    plan = Plan.of([f"work={tmp_path}", "presets=tiny", "iterations=4", "threads=1"])
    setups = [setup for setup in plan.setups() if setup.dtype == "fp32"]
    for setup in setups:
        key = {"preset": "tiny", "runtime": setup.runtime, "dtype": "fp32", "iterations": 4}
        peak = PEAKS[setup.runtime]
        image = {
            "peak_memory_mb": peak,
            "import_mb": 50.0,
            "loaded_mb": 300.0,
            "weights_mb": 250.0,
            "activations_mb": None,
        }
        plan.once(
            f"memory-{setup}",
            lambda: (
                key
                | {
                    "threads": 1,
                    "image": {"all": image, "one part": image | {"peak_memory_mb": peak / 2}},
                    "parts": {"text": image, "generator": image, "decoder": image},
                }
            ),
        )
        for resident, need in (("all", peak), ("one part", peak / 2)):
            caps = [run_under(cap, cap >= need) for cap in (600, 1000, 2000)]
            plan.once(f"caps-{resident.replace(' ', '_')}-{setup}", lambda: key | {"resident": resident, "caps": caps})
        if setup.runtime != "pytorch":
            plan.once(f"agreement-{setup}", lambda: key | {"rms": 1e-6, "max": 2e-6})
    plan.once("latency-tiny-4", lambda: [timed(setup, part) for setup in setups for part in ("image", "text")])
    return tmp_path


def run_under(cap: float, held: bool) -> dict[str, Any]:
    return {
        "cap_mb": cap,
        "scope": "process",
        "limit_mb": cap,
        "method": "RLIMIT_DATA",
        "held": held,
        "peak_mb": 1.0,
        "charged_mb": 1.0,
        "why": "",
    }


def timed(setup: Setup, part: str) -> dict[str, Any]:
    times = {
        "median_ms": 123.4,
        "q1_ms": 120.0,
        "q3_ms": 130.0,
        "ratio_to_first": 1.5,
        "ratio_q1": 1.4,
        "ratio_q3": 1.6,
    }
    return {
        "preset": setup.preset,
        "runtime": setup.runtime,
        "dtype": setup.dtype,
        "iterations": setup.iterations,
        "part": part,
        "n": 4,
        "threads": 2,
        "contended": False,
        "reasons": [],
        "ratio_to": "pytorch fp32",
        **times,
    }


def test_a_row_for_each_cap_and_each_part(work, tmp_path):
    build_report(read_rows(work), tmp_path / "report")
    with open(tmp_path / "report" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:9] == [
        "preset",
        "runtime",
        "dtype",
        "steps",
        "iterations",
        "latency_ms",
        "peak_memory_mb",
        "cap",
        "verdict",
    ]
    images = [row for row in rows if row["part"] == "image"]
    assert len(images) == 3 * 2 * 3 and len(rows) == len(images) + 3 * 3
    held = {(row["runtime"], row["resident"]): row["verdict"] for row in images if row["cap"] == "600"}
    assert {name for name, verdict in held.items() if verdict == "holds"} == {
        ("executorch", "all"),
        ("executorch", "one part"),
        ("onnx", "one part"),
    }
    assert {row["latency_ms"] for row in images if row["resident"] == "all"} == {"123.4"}
    assert {row["latency_ms"] for row in images if row["resident"] == "one part"} == {""}  # not what was timed


def test_the_page_says_which_presets_fit(work, tmp_path):
    page = build_report(read_rows(work), tmp_path / "report").read_text()
    said = verdict(read_rows(work))
    assert said == (
        "Under a cap of 600 MB a process makes an image of tiny (ExecuTorch fp32) with everything loaded; of tiny "
        "(ONNX Runtime fp32, ExecuTorch fp32) with one part loaded at a time."
    )
    assert said in page and "latency: 2; memory: 1" in page
    assert "Latency by runtime" in page and len(list((tmp_path / "report" / "figures").glob("*.png"))) == 2


def test_the_page_says_what_the_files_are(work, tmp_path):
    """Of the presets' folders, and of no other model's."""
    method = {"delegates": 2, "undelegated": {"aten.flip": 3}, "planned_bytes": 4_000_000}
    entry = {
        "files": {"x": {"bytes": 5_000_000}},
        "agreement": {"rms": 1e-5, "max": 2e-5},
        "methods": {"start": method},
    }
    for folder, runtime, parts in (
        ("tiny/executorch-fp32", "executorch", ("text", "generator", "decoder")),
        ("tiny/onnx-fp32-4", "onnx", ("generator",)),
        ("shapes/fp32", "executorch", ("text",)),
    ):
        (work / folder).mkdir(parents=True)
        about = {"runtime": runtime, "dtype": "fp32", "iterations": 4, "parts": dict.fromkeys(parts, entry)}
        (work / folder / "pipeline.json").write_text(json.dumps(about))
    rows = read_rows(work)
    assert {(one["runtime"], one["part"], one["iterations"]) for one in rows.files} == {
        ("executorch", "text", None),
        ("executorch", "generator", None),
        ("executorch", "decoder", None),
        ("onnx", "generator", 4),
    }
    build_report(rows, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| tiny, ExecuTorch fp32, generator | 5.00 | 2 | 3 | 4.00 |" in text
    assert "| tiny, ExecuTorch fp32, ×4 | 1.0e-05 | 1.0e-05 | 1.0e-05 | 1.0e-06 |" in text
    assert "| tiny, ONNX Runtime fp32, ×4 | – | 1.0e-05 | – | 1.0e-06 |" in text


def rows_of(*held: tuple[str, str, int, float | None]) -> Rows:
    """Runs under caps of (preset, dtype, iterations) in ExecuTorch, the smallest that holds; None: none was tried."""
    rows = Rows()
    for preset, dtype, iterations, need in held:
        key = Setup.of({"preset": preset, "runtime": "executorch", "dtype": dtype, "iterations": iterations})
        rows.memory[key] = {"image": {}, "parts": {}}
        if need is not None:
            rows.caps[key, "all"] = rows.caps[key, "one part"] = [run_under(cap, cap >= need) for cap in (600, 1000)]
    return rows


def test_a_preset_fits_if_it_does_at_every_number_of_iterations():
    said = verdict(
        rows_of(
            ("tiny", "int8", 4, 600),
            ("tiny", "int8", 8, 600),
            ("small", "int8", 4, 600),
            ("small", "int8", 8, 1000),
            ("base", "int8", 4, 600),
            ("base", "int8", 8, None),
        )
    )
    assert said == (
        "Under a cap of 600 MB a process makes an image, at 4 and at 8 iterations, of tiny (ExecuTorch int8) with "
        "everything loaded; of tiny (ExecuTorch int8) with one part loaded at a time. Not tried at every number "
        "of iterations, and so not counted: base (ExecuTorch int8) with everything loaded; base (ExecuTorch int8) "
        "with one part loaded at a time."
    )
    assert verdict(Rows()) == "Not measured."


def test_targets_take_the_weights_of_the_files_themselves():
    """And say who meets the memory target only with the runtime's import left out of the budget."""
    rows = rows_of(("base", "fp16", 4, 1000))
    plain, half = (
        Setup.of({"preset": "base", "runtime": runtime, "dtype": dtype, "iterations": 4})
        for runtime, dtype in (("pytorch", "fp32"), ("executorch", "fp16"))
    )
    image = {"weights_mb": 1040.0, "activations_mb": 21.0}
    rows.memory[plain] = {"image": {"all": image}, "parts": {"text": image}}
    assert target_results(rows)[0][1][0].verdict == "not measured"  # not half of PyTorch's
    rows.memory[half]["image"]["all"] = {"weights_mb": 517.5}
    rows.caps[half, "all"] += [
        run_under(600, True) | {"scope": "above import"},
        run_under(100, False) | {"scope": "control"},
    ]
    ((key, results),) = target_results(rows)
    assert (
        key == half and results[0].verdict == "pass" and "weights 517.5 MB (as measured in float16)" in results[0].why
    )
    assert passed_beside_import(rows) == [half]


def test_what_spread_is_marked_and_counted(work, tmp_path):
    row = json.loads((work / "rows" / "latency-tiny-4.json").read_text())
    for one in row:
        if (one["part"], one["runtime"]) == ("text", "executorch"):
            one |= {"contended": True, "reasons": ["the interquartile range is 40% of the median (limit 10%)"]}
    (work / "rows" / "latency-tiny-4.json").write_text(json.dumps(row))
    rows = read_rows(work)
    assert [line.cells[0].text for line in parts_table(rows).rows] == ["123", "123", "123 *"]
    build_report(rows, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "- Quiet: no other load seen; 1 of 6 rows spread by more than 10 % (*)" in text
    assert "Quartiles are of 4 rounds; figures to be quoted want 30." in text
    assert "python -m benchmarks.mobile work=DIR phase=latency rounds=4 threads=2\n" in text
    assert "python -m benchmarks.mobile work=DIR phase=memory threads=1\n" in text
    assert "## Published figures\n\nFigures of other systems on other people's machines" in text
    assert all(f"| {one.system} | {one.device} |" in text for one in published())


def test_latencies_with_other_settings_are_measured_anew(tmp_path, monkeypatch):
    """And a ratio to another runtime than PyTorch is not called one to PyTorch."""
    monkeypatch.setattr(measure, "machine", lambda threads: {})
    monkeypatch.setattr(
        measure,
        "latency_rows",
        lambda setups, plan: [
            timed(one, "image") | {"n": plan.rounds, "ratio_to": f"{setups[0].runtime} {setups[0].dtype}"}
            for one in setups
        ],
    )
    words = [f"work={tmp_path}", "presets=tiny", "iterations=4", "threads=1"]
    for more in (["rounds=4"], ["rounds=2"], ["rounds=4", "runtimes=onnx"]):
        measure.latency(Plan.of([*words, *more]))
    assert len(list((tmp_path / "rows").glob("latency-*.json"))) == 3
    assert {one["n"] for one in read_rows(tmp_path).latency.values()} == {4}
    alone = tmp_path / "alone"
    measure.latency(Plan.of([f"work={alone}", *words[1:], "runtimes=onnx"]))
    build_report(read_rows(alone), tmp_path / "report")
    with open(tmp_path / "report" / "results.csv", newline="") as file:
        assert {
            (row["latency_ms"], row["ratio_to_pytorch"]) for row in csv.DictReader(file) if row["resident"] == "all"
        } == {("123.4", "")}
    assert [line.cells[1].text for line in latency_table(read_rows(alone)).rows] == ["–"] * 3


def test_a_row_is_measured_once(tmp_path):
    plan = Plan.of([f"work={tmp_path}"])
    plan.once("one", lambda: {"value": 1})
    plan.once("one", lambda: pytest.fail("measured again"))
    assert json.loads((tmp_path / "rows" / "one.json").read_text()) == {"value": 1}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "work=DIR is needed"),
        (["work=x", "presets=huge"], "presets='huge'"),
        (["work=x", "rounds=1"], "rounds=1"),
        (["work=x", "iterations=four"], "iterations=four"),
        (["work=x", "speed=1"], "speed"),
        (["work"], "name=value"),
    ],
)
def test_bad_words_are_named(words, expected):
    with pytest.raises(SettingError, match=expected):
        Plan.of(words)
