"""What a trial's job does: makes its stages, measures, and leaves a result, or an error with its cause."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planned import TINY, plan_of
from submitit.core.utils import UncompletedJobError
from torch import nn
from torch.nn import functional as F

from ablations.launch.progress import Status, StatusProgress
from ablations.question.plan import Plan, Trial
from ablations.session.work import cause_of, chain_of, make_shared, run_trial, told
from iris.errors import SettingError
from iris.training.loop import NonFiniteLoss

GRID = ("grid=mixers", "grid.match=none", "grid.axes={model.mixer: [grfm]}", *TINY)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A runs folder that the trials of this file share."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def plan(runs) -> Plan:
    """Its first trial has been run."""
    plan = planned(runs)
    run(plan)
    return plan


def planned(runs: Path, *words: str) -> Plan:
    return plan_of(*GRID, "threads=1", f"runs_dir={runs}", *words)


def run(plan: Plan, trial: Trial | None = None) -> dict[str, Any]:
    """Run a trial in this process; its result."""
    trial = trial or plan.trials[0]
    run_trial(str(plan.folder(trial)), plan.job_plan(trial))
    return read(plan.folder(trial) / "result.json")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def made(runs: Path) -> dict[str, float]:
    """Stage -> when it was finished."""
    return {path.parent.name: path.stat().st_mtime_ns for path in runs.glob("stages/*/result.json")}


def test_a_trial_leaves_measures_seconds_settings_and_pictures(plan):
    trial, folder = plan.trials[0], plan.folder(plan.trials[0])
    result = read(folder / "result.json")
    assert result["key"] == trial.key and result["steps"] == 2 and result["environment"]["torch"]
    metrics = result["metrics"]
    assert {"fid", "fid_se", "fid_reference", "kid", "clip_score", "clip_score_se", "accuracy_colour"} <= metrics.keys()
    assert {"accuracy_all", "heldout_accuracy_all", "validation_loss", "latent_psnr"} <= metrics.keys()
    assert metrics["samples"] == 12 and metrics["nfe"] == trial.chain.sampling.evaluations > 0
    assert "train_seconds" not in metrics  # which must be the same each time
    assert metrics["params_m"] > 0 and metrics["gflops"] > 0 and all(np.isfinite(list(metrics.values())))
    assert set(result["seconds"]) == {"train", "images", "measures"} and min(result["seconds"].values()) > 0
    assert read(folder / "settings.json") == json.loads(json.dumps(trial.settings))
    assert read(folder / "stages.json") == [stage.key for stage in trial.chain.stages]
    assert (read(folder / "status.json")["state"], (folder / "error.json").exists()) == ("done", False)
    gates = read(folder / "gates.json")["layers"]
    assert len(gates) == 1  # a layer of the core


def test_a_trial_keeps_its_first_images_beside_real_ones(plan):
    folder, images = plan.folder(plan.trials[0]), plan.trials[0].chain.run.main
    with np.load(folder / "samples.npz") as kept:
        assert kept["images"].shape == (12, 32, 32, 3) and np.array_equal(kept["images"], images.images())
        assert kept["captions"].tolist() == images.captions and len(kept["real"]) >= 12


def test_its_curve_and_its_model_lie_where_the_plan_says(plan, runs):
    trial = plan.trials[0]
    assert [json.loads(line)["step"] for line in (runs / trial.curves[-1]).read_text().splitlines()][-1] == 2
    assert (runs / trial.model / "config.json").is_file()


def test_a_finished_trial_is_left_as_it_is(plan, runs):
    before, result = made(runs), (plan.folder(plan.trials[0]) / "result.json").stat().st_mtime_ns
    run(plan)
    assert made(runs) == before and (plan.folder(plan.trials[0]) / "result.json").stat().st_mtime_ns == result


def test_another_number_of_steps_takes_the_trained_model(plan, runs):
    before = made(runs)
    other = planned(runs, "sample.steps=1")
    assert run(other)["metrics"]["nfe"] < read(plan.folder(plan.trials[0]) / "result.json")["metrics"]["nfe"]
    kinds = {key.partition("-")[0] for key in made(runs).keys() - before.keys()}
    assert kinds == {"images", "features", "quality", "alignment", "skills"}
    assert {key: when for key, when in made(runs).items() if key in before} == before


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        (["stage=distill", "distill.steps=1", "student.steps=1,2", "sample.steps=1"], {"student"}),
        (["stage=text", "start=class", "pretrain.steps=1"], {"class", "text"}),
        (["runtime.precision=bf16"], set()),
    ],
)
def test_trials_of_every_kind_of_model_run(words, kinds, plan, runs):
    before, other = made(runs), planned(runs, *words)
    result = run(other)
    assert "fid" in result["metrics"] and {"seconds", "steps"} <= result.keys()
    trained = {key.partition("-")[0] for key in made(runs).keys() - before.keys()} & {"text", "class", "student"}
    assert trained == kinds


def test_shared_stages_are_made_by_a_job_of_their_own(plan, tmp_path):
    other = planned(tmp_path)
    trial = other.trials[0]
    wanted = [stage for stage in trial.chain.stages if stage.kind in ("data", "latent")]
    status = wanted[-1].folder / "status.json"
    make_shared(str(wanted[-1].folder), other.job_plan(trial, stages=[stage.key for stage in wanted]))
    assert set(made(tmp_path)) == {stage.key for stage in wanted} and read(status)["state"] == "done"
    assert not other.folder(trial).exists()


# -- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_told_with_its_cause(plan, runs):
    broken = planned(runs, "train.optimiser=adamw", "train.learning_rate=1e30", "train.steps=4", "train.clip=1e30")
    folder = broken.folder(broken.trials[0])
    with pytest.raises(NonFiniteLoss):
        run(broken)
    error = read(folder / "error.json")
    assert (error["cause"], error["kind"]) == ("nan", "NonFiniteLoss") and "step" in error["message"]
    assert "NonFiniteLoss" in error["traceback"] and not (folder / "result.json").exists()
    assert read(folder / "status.json")["state"] == "failed"


def test_what_went_wrong_before_is_forgotten_when_it_goes_right(tmp_path):
    with pytest.raises(ValueError), told(tmp_path):
        raise ValueError("no")
    assert read(tmp_path / "error.json")["message"] == "no"
    with told(tmp_path):
        pass
    assert not (tmp_path / "error.json").exists() and read(tmp_path / "status.json")["state"] == "done"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (NonFiniteLoss("step 3"), "nan"),
        (MemoryError(), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "oom"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "oom"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk"),
        (OSError("12 requested and 0 written"), "disk"),
        # submitit raises this inside the job, where a trial writes down what stopped it
        (UncompletedJobError("Job not requeued because: timed-out and not checkpointable."), "timeout"),
        (SettingError("data.path does not exist"), "error"),
        (ValueError("no"), "error"),
    ],
)
def test_causes(error, cause):
    assert cause_of(error) == cause


def test_a_chain_that_is_not_what_was_planned_is_refused(tmp_path):
    weights = tmp_path / "weights.pt"
    weights.write_text("x")
    plan = plan_of(*GRID, f"runs_dir={tmp_path}", "judge=inception", f"judge.weights={weights}")
    told = plan.job_plan(plan.trials[0])
    progress = StatusProgress(Status(tmp_path))
    assert chain_of(told, progress).key == plan.trials[0].key
    weights.write_text("y")
    with pytest.raises(
        SettingError, match=f"trial {plan.trials[0].key} is now .*put them back or start the grid again"
    ):
        chain_of(told, progress)
    with pytest.raises(SettingError):
        run(plan)
    assert read(plan.folder(plan.trials[0]) / "error.json")["kind"] == "SettingError"


# -- another judge --------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """[N, 3, 299, 299] -> [N, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 9, stride=16)

    def forward(self, x):
        return F.adaptive_avg_pool2d(self.convolution(x), [16, 16]).flatten(1)


class Archive(nn.Module):
    """The part of clean-fid's Inception that is used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_judge_without_text_and_worlds_measures_the_same_images(plan, runs, tmp_path):
    torch.jit.script(Archive()).save(tmp_path / "inception.pt")
    before = made(runs)
    other = planned(runs, "judge=inception", f"judge.weights={tmp_path / 'inception.pt'}")
    metrics = run(other)["metrics"]
    assert {"fid", "fid_se", "kid", "fid_reference"} <= metrics.keys()
    assert not [name for name in metrics if "clip" in name or "accuracy" in name]
    kinds = {key.partition("-")[0] for key in made(runs).keys() - before.keys()}
    assert kinds == {"features", "reference", "quality"}
