"""The judge of a grid: which settings name it, what identifies it, and a trial measured by a general one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ablations.question.compose import composed, settings_of
from ablations.question.plan import Plan, make_plan
from ablations.trial.stages import Stages
from ablations.trial.trial import run_trial
from eval.judges import MissingWeights
from iris.errors import SettingError

GRID = ("grid=mixers", "scale=smoke", "grid.match=none", "grid.axes={model.mixer: [grfm]}")


def plan_of(*overrides: str) -> Plan:
    return make_plan(*settings_of(composed([*GRID, *overrides])))


def file_of(folder: Path, content: str) -> str:
    folder.mkdir()
    (folder / "weights.pt").write_text(content)
    return str(folder / "weights.pt")


def keys(plan: Plan) -> list[str]:
    return [trial.key for trial in plan.trials]


def stage_keys(plan: Plan) -> list[str]:
    return list(plan.stages(plan.trials[0]).keys)


def test_weights_are_known_by_their_hash_not_by_their_place(tmp_path):
    first, moved, other = (file_of(tmp_path / name, text) for name, text in (("a", "x"), ("b", "x"), ("c", "y")))
    one, same, changed = (plan_of("judge=inception", f"judge.weights={path}") for path in (first, moved, other))
    assert keys(one) == keys(same) and stage_keys(one) == stage_keys(same)
    assert keys(one) != keys(changed) and keys(one) != keys(plan_of())
    assert len(set(stage_keys(one)) & set(stage_keys(changed))) == 2  # data and latent; not the judge's reference


def test_the_model_and_the_prefix_are_part_of_what_a_judge_is(tmp_path):
    path = file_of(tmp_path / "a", "x")
    small, base = (
        plan_of("judge=dinov2", f"judge.weights={path}", f"judge.model={size}") for size in ("small", "base")
    )
    assert keys(small) != keys(base) and len(set(stage_keys(small)) & set(stage_keys(base))) == 2
    plain, prefixed = (
        plan_of("judge=clip_vit_b32", f"judge.weights={path}", *more)
        for more in ((), ("judge.prefix='A photo depicts '",))
    )
    assert keys(plain) != keys(prefixed) and stage_keys(plain) == stage_keys(prefixed)
    assert prefixed.judge["prefix"] == "A photo depicts "


def test_a_relative_path_is_made_absolute_and_a_tag_is_left_alone(tmp_path, monkeypatch):
    file_of(tmp_path / "a", "x")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").write_text("x")
    plan = plan_of("judge=inception", "judge.weights=a/weights.pt")
    assert plan.trials[0].settings["judge"]["weights"] == str(tmp_path / "a" / "weights.pt")
    monkeypatch.setattr("ablations.question.plan.describe", lambda **_: {"sha256": "0" * 64})
    assert (
        plan_of("judge=clip", "judge.model=ViT-B-32-quickgelu", "judge.weights=openai")
        .trials[0]
        .settings["judge"]["weights"]
        == "openai"
    )


@pytest.mark.parametrize(
    ("overrides", "kind", "words"),
    [
        (("judge=inception", "judge.weights=/nowhere/x.pt"), MissingWeights, "judge.weights=/nowhere/x.pt is no file"),
        (("judge=clip",), SettingError, "set judge.weights to a tag"),
        (("judge.model=large",), SettingError, "judge shapes takes no judge.model"),
        (("grid.axes={judge.name: [shapes, inception]}",), SettingError, "judge.name cannot vary"),
        (
            ("judge.name=oracle",),
            SettingError,
            "judge.name='oracle' is unknown; allowed: shapes, inception, clip_vit_b32",
        ),
    ],
)
def test_a_judge_that_cannot_be_used_stops_the_plan(overrides, kind, words):
    with pytest.raises(kind, match=words):
        plan_of(*overrides)


def test_weights_exchanged_after_the_plan_are_noticed(tmp_path):
    plan = plan_of()
    stages = plan.stages(plan.trials[0])
    assert stages.judge().sha256 == plan.judge["sha256"]
    with pytest.raises(SettingError, match="put those back or start the grid again"):
        Stages(stages.settings, plan.facts[plan.trials[0].arm] | {"judge": "0" * 64}, tmp_path).judge()


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


@pytest.mark.filterwarnings("ignore::eval.metrics.fid.RankDeficientWarning", "ignore::FutureWarning")
def test_a_trial_is_measured_by_a_judge_without_text_and_worlds(tmp_path):
    torch.jit.script(Archive()).save(tmp_path / "inception.pt")
    plan = plan_of(
        "judge=inception",
        f"judge.weights={tmp_path / 'inception.pt'}",
        f"runs_dir={tmp_path / 'runs'}",
        "latent=pixel",
        "data.train=48",
        "data.validation=24",
        "data.heldout=8",
        "train.steps=2",
        "measure.samples=12",
        "measure.heldout_samples=4",
        "measure.iterations=[]",
    )
    trial = plan.trials[0]
    run_trial(str(plan.folder(trial)), plan.job_plan(trial))
    result = json.loads((plan.folder(trial) / "result.json").read_text())["metrics"]
    assert {"fid", "fid_se", "kid", "fid_untrained", "fid_reference"} <= set(result)
    assert not [name for name in result if "clip" in name or "accuracy" in name]
    stages = plan.stages(trial)
    reference = stages.reference("validation")
    assert reference.shape == (24, 2048) and np.isfinite(reference.numpy()).all()
