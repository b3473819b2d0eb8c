"""Grids over what comes after a training, with the real command at smoke scale: one training, made before, serves them all."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
from real_command import json_of, made, report_of, rows_of, succeeded, training_of

pytestmark = pytest.mark.xdist_group("new_grids")  # one worker: what the module's fixtures make is shared
SMALL = (
    "scale=smoke",
    "data.train=64",
    "data.validation=32",
    "vae.steps=4",
    "train.steps=4",
    "distill.steps=4",
    "student.steps=[1, 2]",
    "model.mixer=identity",
    "model.iterations=2",
)
FEW = ("measure.samples=24", "measure.heldout=0", "measure.latency.rounds=0", "threads=1")
COMPILER = shutil.which("c++") is not None and importlib.util.find_spec("executorch") is not None


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the training that the grids are about, made by the command of training."""
    folder = tmp_path_factory.mktemp("grids")
    succeeded(folder, *SMALL, "stage=text", "log=none", module="iris.training")
    assert len(made(folder, ("text-",))) == len(made(folder, ("latent-",))) == 1
    return folder


def asked(folder: Path, grid: str, *words: str) -> dict[str, dict[str, str]]:
    """Arm -> row of the report of a grid, all of whose trials must be done; what was trained before stays as it is."""
    before = made(folder)
    report = report_of(succeeded(folder, f"grid={grid}", *SMALL, *FEW, *words), folder)
    assert made(folder).items() >= before.items()
    rows = {row["arm"]: row for row in rows_of(report)}
    assert all(row["state"] == "done" and float(row["fid"]) > 0 for row in rows.values())
    page = (report / "report.md").read_text()
    assert all(arm in page for arm in rows) and json_of(report / "verdict.json")["verdict"] == "not enough seeds"
    return rows


def trainings(folder: Path, rows: dict[str, dict[str, str]]) -> dict[str, str]:
    """Arm -> key of the training that it ends with."""
    return {arm: training_of(folder / "runs" / "trials" / row["key"]).name for arm, row in rows.items()}


@pytest.mark.long
def test_steps_and_samplers_train_nothing(trained):
    before = made(trained)
    axes = "grid.axes={sample.steps: [1, 2], sample.sampler: [euler, heun]}"
    rows = asked(
        trained, "steps", axes, "grid.baseline={sample.steps: 2, sample.sampler: euler}", "grid.decide.expect={}"
    )
    assert next(iter(rows)) == "steps=2 sampler=euler" and len(rows) == 4
    assert made(trained) == before and len(set(trainings(trained, rows).values())) == 1
    assert [int(float(rows[f"steps={n} sampler={name}"]["nfe"])) for n, name in ((1, "euler"), (2, "heun"))] == [2, 6]
    assert len({row["fid"] for row in rows.values()}) > 1


@pytest.mark.long
def test_guidance_trains_nothing(trained):
    before = made(trained)
    rows = asked(trained, "guidance", "grid.axes={sample.guidance: [1.0, 2.5]}")
    assert list(rows) == ["1.0", "2.5"] and rows["1.0"]["fid"] != rows["2.5"]["fid"]
    assert made(trained) == before and len(set(trainings(trained, rows).values())) == 1


@pytest.mark.long
def test_students_of_one_teacher(trained):
    """A training for each method, of which both numbers of steps come; the teacher is the model that was there."""
    before = set(made(trained))
    axes = "grid.axes={student.method: [consistency, shortcut], sample.steps: [1, 2]}"
    points = "grid.points=[{stage: text, sample.steps: 6}, {stage: text, sample.steps: 1}]"
    rows = asked(trained, "distilled", axes, points, "grid.decide.expect={}")
    students = {f"method={method} steps={n}" for method in ("consistency", "shortcut") for n in (1, 2)}
    assert set(rows) == students | {"stage=text steps=6", "stage=text steps=1"}
    assert rows["stage=text steps=6"]["baseline"] == "true"
    assert {key.partition("-")[0] for key in set(made(trained)) - before} == {"student"}
    ends = trainings(trained, rows)
    assert {ends["stage=text steps=6"], ends["stage=text steps=1"]} == set(made(trained, ("text-",)))
    for method in ("consistency", "shortcut"):
        assert len({ends[f"method={method} steps={n}"] for n in (1, 2)}) == 1
    assert len(made(trained, ("student-",))) == 2


@pytest.mark.long
def test_passes_need_a_training_for_each_way_to_train_them(trained):
    teacher = set(made(trained, ("text-",)))
    axes = "grid.axes={depth.training: [fixed, drawn], sample.iterations: [1, 2]}"
    rows = asked(trained, "elastic", axes, "grid.decide.expect={}")
    assert next(iter(rows)) == "training=fixed iterations=2" and len(rows) == 4
    ends = trainings(trained, rows)
    assert {ends[f"training=fixed iterations={n}"] for n in (1, 2)} == teacher
    (drawn,) = {ends[f"training=drawn iterations={n}"] for n in (1, 2)} - teacher
    assert set(made(trained, ("text-",))) == teacher | {drawn}
    assert float(rows["training=drawn iterations=1"]["gflops"]) < float(rows["training=drawn iterations=2"]["gflops"])


@pytest.mark.long
@pytest.mark.skipif(not COMPILER, reason="ExecuTorch is an extra, and its runtime's interface needs a compiler")
def test_precisions_and_runtimes_export_what_was_trained(trained):
    before = made(trained)
    chosen = [("pytorch", "fp32"), ("pytorch", "bf16"), ("onnx", "int8"), ("executorch", "fp32")]
    points = ", ".join(f"{{runtime.name: {name}, runtime.precision: {precision}}}" for name, precision in chosen)
    speed = ("measure.latency.rounds=2", "measure.latency.warmup=0")
    rows = asked(trained, "precision", f"grid.points=[{points}]", "grid.decide.expect={}", *speed)
    assert list(rows) == [f"runtime={name} precision={precision}" for name, precision in chosen]
    assert made(trained) == before and len(set(trainings(trained, rows).values())) == 1
    assert len(made(trained, ("export-",))) == 2
    assert all(float(row["latency_ms"]) > 0 and float(row["peak_memory_mb"]) > 0 for row in rows.values())
    whole, half = (float(rows[f"runtime=pytorch precision={name}"]["fid"]) for name in ("fp32", "bf16"))
    assert half == pytest.approx(whole, rel=0.05)
    exported = float(rows["runtime=executorch precision=fp32"]["fid"])
    assert exported == pytest.approx(whole, rel=0.02)
