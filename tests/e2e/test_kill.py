"""Kill -9 at any moment, run again: it continues, and ends as a run that was never killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ablations.question.compose import composed, settings_of
from ablations.question.plan import make_plan
from iris.io.tensors import load_tensors

pytestmark = pytest.mark.xdist_group("kill")  # one worker: what the module's fixtures make is shared
ROOT = Path(__file__).parents[2]
RUN = "run(sys.argv[1], json.load(open(sys.argv[2])))"
TRIAL = f"import json, sys; from ablations.trial.trial import run_trial as run; {RUN}"
# A stage saves every 20 s, which is longer than this test lasts: here it saves at every step.
STAGES = (
    "import functools, json, sys; import ablations.trial.stages as s; "
    "from ablations.trial.trial import prepare_stages as run; "
    f"s.LoopSettings = functools.partial(s.LoopSettings, checkpoint_seconds=0.0); {RUN}"
)


class Place:
    """A runs folder, the plan of its GRFM trial, and processes that work on it."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        settings, values = settings_of(
            composed(
                [
                    "grid=mixers",
                    "scale=smoke",
                    "train.steps=60",
                    "train.checkpoint_seconds=0",
                    "latent.steps=60",
                    "threads=1",
                    f"runs_dir={root}",
                ]
            )
        )
        plan = make_plan(settings, values)
        trial = plan.trials[0]
        assert trial.arm == "grfm"
        self.root, self.trial, self.stages = root, plan.folder(trial), plan.stages(trial)
        self.latent = self.stages.folder(self.stages.latent_key)
        self.plan = root / "plan.json"
        self.plan.write_text(json.dumps(plan.job_plan(trial)))

    def start(self, script: str, folder: Path) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        return subprocess.Popen(
            [sys.executable, "-c", script, str(folder), str(self.plan)],
            cwd=self.root,
            text=True,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def finish(self, script: str, folder: Path) -> None:
        """Run to the end."""
        with self.start(script, folder) as process:
            errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors

    def kill(self, script: str, folder: Path, watched: Path, step: int) -> tuple[int, list[dict[str, Any]]]:
        """Start, kill -9 when ``watched`` has logged ``step``; the step of the checkpoint then, and what was logged."""
        with self.start(script, folder) as process:
            deadline = time.monotonic() + 300
            while process.poll() is None and time.monotonic() < deadline:
                if any(row["step"] >= step for row in logged(watched)):
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.01)
            errors = process.communicate(timeout=60)[1]
        assert process.returncode == -signal.SIGKILL, errors
        return load_tensors(watched / "checkpoint.safetensors")[1]["step"], logged(watched)


def logged(folder: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def check_same_curve(folder: Path, other: Path) -> None:
    """Strictly increasing steps, and the same values but for times."""
    rows, others = logged(folder), logged(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others] == list(range(10, 61, 10))
    for name in ("loss", "lr", "grad_norm"):
        assert [row[name] for row in rows] == [row[name] for row in others]


def check_continued(folder: Path, step: int, before: list[dict[str, Any]]) -> None:
    """What was logged up to the checkpoint was kept, not made again: the same rows at the same times."""
    kept = [row for row in before if row["step"] <= step]
    assert kept and logged(folder)[: len(kept)] == kept


def check_same_tensors(path: Path, other: Path) -> None:
    tensors, others = load_tensors(path)[0], load_tensors(other)[0]
    assert tensors.keys() == others.keys() and tensors
    for name in tensors:
        assert torch.equal(tensors[name], others[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Stages and trial, never killed."""
    place = Place(tmp_path_factory.mktemp("whole") / "runs")
    place.finish(TRIAL, place.trial)
    return place


def test_a_killed_latent_continues_and_ends_the_same(whole, tmp_path):
    place = Place(tmp_path / "runs")
    assert place.latent.name == whole.latent.name
    job = place.root / "stages" / "prepare"
    step, before = place.kill(STAGES, job, place.latent, 15)
    assert 15 <= step < 60 and not (place.latent / "result.json").exists()
    place.finish(STAGES, job)
    check_continued(place.latent, step, before)
    check_same_curve(place.latent, whole.latent)
    check_same_tensors(place.latent / "latent.safetensors", whole.latent / "latent.safetensors")
    for split in ("train", "validation"):
        assert np.array_equal(np.load(place.latent / f"{split}.npy"), np.load(whole.latent / f"{split}.npy"))
    assert all(place.stages.done(key) for key in place.stages.keys)
    results = [json.loads((p.latent / "result.json").read_text()) for p in (place, whole)]
    assert results[0]["psnr"] == results[1]["psnr"]


def test_a_killed_trial_continues_and_ends_the_same(whole, tmp_path):
    place = Place(tmp_path / "runs")
    shutil.copytree(whole.root / "stages", place.root / "stages")
    assert place.trial.name == whole.trial.name
    for wanted in (15, 40):
        step, before = place.kill(TRIAL, place.trial, place.trial, wanted)
        assert wanted - 1 <= step < 60  # a row is logged before its step is saved
        assert not (place.trial / "result.json").exists() and not (place.trial / "error.json").exists()
    place.finish(TRIAL, place.trial)
    check_continued(place.trial, step, before)
    check_same_curve(place.trial, whole.trial)
    results = [json.loads((p.trial / "result.json").read_text()) for p in (place, whole)]
    assert results[0]["metrics"] == results[1]["metrics"] and len(results[0]["metrics"]) > 20
    for name in ("model.safetensors", "latent.safetensors"):
        check_same_tensors(place.trial / "model" / name, whole.trial / "model" / name)
    samples, others = (np.load(p.trial / "samples.npz") for p in (place, whole))
    assert all(np.array_equal(samples[name], others[name]) for name in others.files)
    assert (place.trial / "gates.json").read_bytes() == (whole.trial / "gates.json").read_bytes()


def test_a_finished_trial_is_left_alone(whole):
    stamp = (whole.trial / "result.json").stat().st_mtime_ns
    whole.finish(TRIAL, whole.trial)
    assert (whole.trial / "result.json").stat().st_mtime_ns == stamp
