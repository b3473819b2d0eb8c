"""Which arms a rung keeps, and what its trials are."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from test_grid import settings_from

from ablations.question.halving import Halving, halve, halving_of, rung_plan, survivors
from ablations.question.plan import Plan, make_plan
from iris.errors import SettingError

DECIDE = {"metric": "fid", "better": "lower"}


@pytest.fixture
def plan(tmp_path) -> Plan:
    return make_plan(
        *settings_from("grid=mixers", "grid.match=none", "train.steps=80", f"runs_dir={tmp_path}", "seeds=[0,1]")
    )


def give(plan: Plan, scores: dict[str, float | None], error: float = 0.0, spread: float = 0.0) -> None:
    """Results with these FIDs; seeds lie ``spread`` apart."""
    for trial in plan.trials:
        if (score := scores[trial.arm]) is not None:
            folder = plan.folder(trial)
            folder.mkdir(parents=True, exist_ok=True)
            metrics = {"fid": score + spread * (trial.seed - 0.5), "fid_se": error}
            (folder / "result.json").write_text(json.dumps({"metrics": metrics}))


SCORES = {"grfm": 9.0, "attention": 2.0, "fourier": 3.0, "recurrence": 4.0, "spatial": 8.0}


def test_the_baseline_and_the_best_stay(plan):
    give(plan, SCORES)
    kept, dropped = survivors(plan, DECIDE, 0.5)
    assert [arm.name for arm in kept] == [
        "grfm",
        "attention",
        "fourier",
    ] and dropped == "recurrence (fid 4), spatial (fid 8)"


def test_higher_may_be_better(plan):
    give(plan, SCORES)
    assert [arm.name for arm in survivors(plan, DECIDE | {"better": "higher"}, 0.25)[0]] == ["grfm", "spatial"]


def test_what_is_not_clearly_worse_stays(plan):
    give(plan, SCORES, spread=1.0)  # standard error of two seeds 1 apart: 0.5; of a difference: 0.71
    assert [arm.name for arm in survivors(plan, DECIDE, 0.5)[0]] == ["grfm", "attention", "fourier", "recurrence"]


def test_an_arm_without_a_result_is_dropped(plan):
    give(plan, SCORES | {"attention": None})
    kept, dropped = survivors(plan, DECIDE, 0.34)
    assert [arm.name for arm in kept] == ["grfm", "fourier", "recurrence"]
    assert dropped == "attention (no result), spatial (fid 8)"


def test_one_seed_has_its_sampling_error(plan):
    one = replace(plan, trials=[trial for trial in plan.trials if trial.seed == 0])
    give(one, SCORES, error=0.36)  # of a difference: 0.51, and recurrence is 1.0 behind fourier
    assert "recurrence" in [arm.name for arm in survivors(one, DECIDE, 0.5)[0]]


def test_a_rungs_trials_are_short_and_have_keys_of_their_own(plan):
    short = rung_plan(plan, [0, 1], 0.25)
    assert {trial.settings["train"]["steps"] for trial in short.trials} == {20}
    assert not {trial.key for trial in short.trials} & {trial.key for trial in plan.trials}
    assert [trial.arm for trial in short.trials] == [trial.arm for trial in plan.trials]


def test_rungs_follow_each_other_and_say_what_they_dropped(plan):
    ran = []

    def run(short: Plan, name: str) -> None:
        ran.append((name, short.trials[0].settings["train"]["steps"], len(short.arms)))
        give(short, SCORES)

    steps = list(halve(plan, [0, 1], DECIDE, Halving(2, 0.5), run))
    assert ran == [("rung 1 of 2", 20, 5), ("rung 2 of 2", 40, 3)]
    left, note = steps[-1]
    assert [arm.name for arm in left.arms] == ["grfm", "attention"] and left.trials[0].settings["train"]["steps"] == 80
    assert "2 of 3 arms went on" in note and "dropped: fourier (fid 3)" in note


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rungs": 0}, "grid.halving.rungs=0"),
        ({"keep": 1.0}, "grid.halving.keep=1.0"),
        ({"share": 0.5}, "allowed: rungs, keep"),
    ],
)
def test_settings_that_cannot_be_used(given, words):
    with pytest.raises(SettingError, match=words):
        halving_of(given)
    assert halving_of(None) is None
