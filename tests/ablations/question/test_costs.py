"""What trials cost, and fair swaps: mixers resized until an arm has the baseline's parameters, operations or time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from planned import plan_of, settings_from, with_grid

from ablations.question import costs
from ablations.question.costs import RelativeTime, operations, parameters, step_seconds
from ablations.question.grid import TOLERANCE, Arm, expand, match_arms
from ablations.question.settings import TrialSettings, grids
from iris.errors import SettingError
from iris.pipeline import IrisPipeline

ROOT = Path(__file__).parents[3]


def trial(*words: str) -> TrialSettings:
    """The settings of a grid's baseline."""
    return expand(settings_from(*words))[0].settings


def check_matched(arms: list[Arm], what: str, cost: Any) -> None:
    """Every arm is as close to the baseline as ``TOLERANCE`` says, and its words are true."""
    target = cost(arms[0].settings)
    assert arms[0].matched is None and arms[0].settings.model.mixer_width is None
    for arm in arms[1:]:
        model, error = arm.settings.model, cost(arm.settings) / target - 1
        if model.mixer == "identity":
            assert arm.matched == f"has no size to change: {error:+.2%} {what}"
            continue
        assert abs(error) <= TOLERANCE[what] == 0.01
        assert model.mixer_width % (4 * model.heads if model.mixer == "attention" else model.heads) == 0
        assert arm.matched == f"mixer_width {model.mixer_width} (model.dim {model.dim}): {error:+.2%} {what}"


# -- costs ----------------------------------------------------------------------------------------------------------


def test_parameters_are_those_of_the_model_that_is_trained():
    """The shipped one was trained with the default settings."""
    pipeline = IrisPipeline.from_pretrained(ROOT / "iris" / "weights" / "shapes")
    assert parameters(trial()) == sum(p.numel() for p in pipeline.model.generator.parameters())


def test_costs_grow_with_the_network():
    small, wide, deep = (trial("scale=smoke", *more) for more in ([], ["model.dim=64"], ["model.iterations=8"]))
    assert parameters(small) < parameters(wide) and operations(small) < operations(wide)
    assert parameters(small) == parameters(deep) and operations(small) < operations(deep)  # weights are shared
    assert parameters(trial("scale=smoke", "model.core=2")) > parameters(small)


def test_operations_are_counted_once_for_all_settings_that_it_is_the_same_for(monkeypatch):
    counted = []
    monkeypatch.setattr(costs, "_known", {})
    monkeypatch.setattr(costs, "_operations", lambda settings: counted.append(settings) or 7.0)
    for words in (["train.steps=3"], ["data.seed=1"], ["sample.steps=3"], ["model.dim=48"]):
        assert operations(trial(*words)) == 7.0
    assert len(counted) == 2


@pytest.mark.parametrize("word", ["latent=pixel", "model.text=labels"])
def test_a_step_takes_time(word):
    assert step_seconds(trial("scale=smoke", word), steps=1) > 0


# -- fair swaps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, sets in grids().items() if sets["grid"]["match"] == "params"])
@pytest.mark.parametrize("scale", ["default", pytest.param("gpu", marks=pytest.mark.slow)])
def test_every_grid_that_asks_for_it_has_arms_of_equal_parameters(name, scale):
    check_matched(
        match_arms(expand(settings_from(f"grid={name}", f"scale={scale}")), "params", parameters), "params", parameters
    )


def test_matched_parameters_of_all_mixers_at_another_width():
    arms = match_arms(expand(settings_from("grid=mixers", "model.dim=128")), "params", parameters)
    assert [arm.name for arm in arms] == settings_from("grid=mixers").grid.axes["model.mixer"]
    check_matched(arms, "params", parameters)


def test_a_plan_matches_operations_where_its_grid_says_so(tmp_path):
    axes = "grid.axes={model.mixer: [grfm, fourier]}"
    plan = plan_of("grid=mixers", axes, "grid.match=flops", f"runs_dir={tmp_path}")
    check_matched(plan.arms, "flops", operations)
    assert plan.trials[1].settings["model"]["mixer_width"] == plan.arms[1].settings.model.mixer_width
    assert plan.trials[1].matched == plan.arms[1].matched


def test_nothing_is_matched_where_nothing_is_asked():
    arms = expand(settings_from("grid=depth"))
    assert match_arms(arms, "none", parameters) == arms


STUBBORN = """
from torch import nn

class Bare(nn.Linear):
    reach = None

    def __init__(self, dim):
        super().__init__(dim, dim)

class Stubborn(Bare):
    def __init__(self, dim, width=None):
        super().__init__(dim)
"""


def test_a_mixer_that_does_not_grow_with_its_width_ends_the_search(tmp_path, monkeypatch):
    (tmp_path / "stubborn_mixers.py").write_text(STUBBORN)
    monkeypatch.syspath_prepend(tmp_path)

    def beside_grfm(name: str) -> list[Arm]:
        axes = {"model.mixer": ["grfm", f"stubborn_mixers:{name}"]}
        return match_arms(expand(with_grid("scale=smoke", axes=axes)), "params", parameters)

    assert beside_grfm("Bare")[1].matched.startswith("has no size to change: -")
    with pytest.raises(SettingError, match="comes no closer than"):
        beside_grfm("Stubborn")


def test_a_match_that_is_impossible_says_so():
    with pytest.raises(SettingError) as caught:
        match_arms(expand(settings_from("grid=mixers", "model.dim=64", "model.heads=16")), "params", parameters)
    for word in ("grid.match=params", "mixer_width=", "model.heads", "grid.match=none"):
        assert word in str(caught.value)


def test_a_time_beside_the_baselines_is_measured_once(tmp_path):
    baseline, other = trial("scale=smoke"), trial("scale=smoke", "model.iterations=1")
    measured = RelativeTime(baseline, tmp_path)(other)
    assert measured > 0 and RelativeTime(baseline, tmp_path)(other) == measured and len(list(tmp_path.iterdir())) == 1
    assert RelativeTime(baseline, tmp_path)(baseline) == 1.0


def test_times_are_kept_so_that_a_grid_planned_again_has_the_same_keys(tmp_path, monkeypatch):
    """The clock is the test's own: an evaluation takes as long as the network has weights."""
    monkeypatch.setattr(costs, "_seconds", lambda task: sum(p.numel() for p in task.module.parameters()))
    axes = "grid.axes={model.mixer: [grfm, recurrence]}"
    words = ("grid=mixers", axes, "grid.match=latency", "scale=smoke", f"runs_dir={tmp_path}")
    first = plan_of(*words)
    monkeypatch.setattr(costs, "_seconds", lambda task: pytest.fail("measured again"))
    again = plan_of(*words)
    assert [trial.key for trial in first.trials] == [trial.key for trial in again.trials]
    baseline, arm = first.arms
    assert "latency" in arm.matched and arm.settings.model.mixer_width is not None
    assert abs(RelativeTime(baseline.settings, tmp_path / "times")(arm.settings) - 1) <= TOLERANCE["latency"]
