"""Kill -9 at any moment, run again: it continues, and ends as a run that was never killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import ended, start, together

from ablations.question.plan import make_plan
from ablations.question.settings import TREE
from ablations.session.work import make_shared, run_trial
from iris.io.tensors import load_tensors
from iris.stages.latent_cache import CachedLatents

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("kill")]  # one worker: the fixture is shared
STEPS, EVERY, PATIENCE = 60, 4, 300.0
SMALL = (
    "grid=mixers",
    "scale=smoke",
    f"train.steps={STEPS}",
    f"vae.steps={STEPS}",
    "compute.checkpoint_seconds=0",
    "threads=1",
)


class Place:
    """A runs folder, the plan of its GRFM trial, and processes that work on it."""

    def __init__(self, root: Path) -> None:
        plan = make_plan(TREE.build([*SMALL, f"runs_dir={root}"]))
        trial = plan.trials[0]
        assert trial.arm == "grfm"
        self.root, self.folder, self.plan = root, plan.folder(trial), plan.job_plan(trial)
        self.stages = plan.stages(trial)
        self.latent, self.model = (
            next(stage.folder for stage in self.stages if stage.kind == kind) for kind in ("latent", "text")
        )
        self.shared = self.stages[: [stage.folder for stage in self.stages].index(self.model)]

    def trial(self) -> None:
        run_trial(str(self.folder), self.plan)

    def share(self) -> None:
        """Make what several trials would share, up to the encoded data."""
        make_shared(str(self.root / "stages" / "shared"), self.plan | {"stages": [one.key for one in self.shared]})

    def kill(self, work: Callable[[], None], watched: Path, step: int) -> tuple[int, list[dict[str, Any]]]:
        """Start, kill -9 when ``watched`` has logged ``step``; the step of the checkpoint then, and what was logged."""
        child, code, deadline = start(work), None, time.monotonic() + PATIENCE
        while code is None and time.monotonic() < deadline:
            if any(row["step"] >= step for row in logged(watched)):
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                code = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.002)
                code = ended(child)
        assert code == -signal.SIGKILL
        return load_tensors(watched / "checkpoint.safetensors")[1]["step"], logged(watched)


def finish(work: Callable[[], None]) -> None:
    """Run to the end in a process of its own."""
    assert together(lambda rank: work(), [{}], PATIENCE) == [0]


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
    assert [row["step"] for row in rows] == [row["step"] for row in others] == list(range(EVERY, STEPS + 1, EVERY))
    for name in ("loss", "lr", "grad_norm"):
        assert [row[name] for row in rows] == [row[name] for row in others]


def check_continued(folder: Path, step: int, before: list[dict[str, Any]]) -> None:
    """What was logged up to the checkpoint was kept, not made again: the same rows at the same times."""
    kept = [row for row in before if row["step"] <= step]
    assert kept and logged(folder)[: len(kept)] == kept


def check_same_tensors(folder: Path, other: Path) -> None:
    """Of all weights in two folders."""
    names = sorted(path.name for path in (other / "weights").glob("*.safetensors"))
    assert names
    for name in names:
        tensors, others = (load_tensors(place / "weights" / name)[0] for place in (folder, other))
        assert tensors.keys() == others.keys() and all(torch.equal(tensors[key], others[key]) for key in tensors), name


def latents(place: Place) -> list[torch.Tensor]:
    """All that was encoded."""
    made = [stage for stage in place.stages if stage.kind == "encoded"]
    return [CachedLatents(stage.folder / stage.result["latents"], verify=True).latents() for stage in made]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Stages and trial, never killed."""
    place = Place(tmp_path_factory.mktemp("whole") / "runs")
    finish(place.trial)
    return place


def test_a_killed_latent_continues_and_ends_the_same(whole, tmp_path):
    place = Place(tmp_path / "runs")
    assert place.latent.name == whole.latent.name
    step, before = place.kill(place.share, place.latent, 15)
    assert 15 <= step < STEPS and not (place.latent / "result.json").exists()
    finish(place.share)
    check_continued(place.latent, step, before)
    check_same_curve(place.latent, whole.latent)
    check_same_tensors(place.latent, whole.latent)
    assert all(torch.equal(one, other) for one, other in zip(latents(place), latents(whole), strict=True))
    assert all(stage.done for stage in place.shared) and not (place.model / "result.json").exists()
    results = [json.loads((p.latent / "result.json").read_text()) for p in (place, whole)]
    assert results[0]["metrics"] == results[1]["metrics"] and results[0]["content"] == results[1]["content"]


def test_a_killed_trial_continues_and_ends_the_same(whole, tmp_path):
    place = Place(tmp_path / "runs")
    for stage in whole.shared:
        shutil.copytree(stage.folder, place.root / "stages" / stage.key)
    assert place.folder.name == whole.folder.name
    for wanted in (15, 40):
        step, before = place.kill(place.trial, place.model, wanted)
        assert wanted - 1 <= step < STEPS  # a row is logged before its step is saved
        assert not (place.folder / "result.json").exists() and not (place.folder / "error.json").exists()
    finish(place.trial)
    check_continued(place.model, step, before)
    check_same_curve(place.model, whole.model)
    check_same_tensors(place.model, whole.model)
    results = [json.loads((p.folder / "result.json").read_text()) for p in (place, whole)]
    assert results[0]["metrics"] == results[1]["metrics"] and len(results[0]["metrics"]) > 20
    samples, others = (np.load(p.folder / "samples.npz") for p in (place, whole))
    assert others.files and all(np.array_equal(samples[name], others[name]) for name in others.files)
    assert (place.folder / "gates.json").read_bytes() == (whole.folder / "gates.json").read_bytes()


def test_a_finished_trial_is_left_alone(whole):
    stamp = (whole.folder / "result.json").stat().st_mtime_ns
    finish(whole.trial)
    assert (whole.folder / "result.json").stat().st_mtime_ns == stamp
