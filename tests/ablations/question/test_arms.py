"""Arms and trials of a grid: what is varied, against what, and which question cannot be asked."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from planned import DECIDE, plan_of, settings_from, with_grid, write_rows

from ablations.answer.notes import notes_of
from ablations.question.decide import SPEED
from ablations.question.grid import expand, expectations
from ablations.question.plan import make_plan
from ablations.question.settings import grids
from eval.metrics.quality import METRICS
from iris.errors import SettingError


def error_of(*words: str, **changes: object) -> str:
    with pytest.raises(SettingError) as caught:
        expand(with_grid(*words, **changes))
    return str(caught.value)


# -- arms -----------------------------------------------------------------------------------------------------------


def test_arms_are_the_product_of_the_axes_with_the_baseline_first():
    axes = {"model.mixer": ["attention", "grfm"], "model.iterations": [1, 2, 4]}
    settings = with_grid(axes=axes, baseline={"model.mixer": "grfm", "model.iterations": 2})
    before = asdict(settings)
    arms = expand(settings)
    points = [(arm.values["model.mixer"], arm.values["model.iterations"]) for arm in arms]
    assert points[0] == ("grfm", 2) and arms[0].name == "mixer=grfm iterations=2"
    assert points[1:] == [("attention", 1), ("attention", 2), ("attention", 4), ("grfm", 1), ("grfm", 4)]
    assert [arm.baseline for arm in arms] == [True] + 5 * [False]
    for arm, (mixer, iterations) in zip(arms, points, strict=True):
        assert arm.settings.model == replace(settings.model, mixer=mixer, iterations=iterations)
        assert arm.settings.train == settings.train
    assert asdict(settings) == before


def test_a_baseline_outside_the_product_is_added():
    arms = expand(with_grid(axes={"model.iterations": [1, 2]}, baseline={"model.iterations": 8}))
    assert [(arm.name, arm.baseline) for arm in arms] == [("8", True), ("1", False), ("2", False)]


def test_a_baseline_may_leave_axes_out():
    arms = expand(with_grid(axes={"model.iterations": [4, 2], "train.batch": [8, 16]}, baseline={"train.batch": 16}))
    assert arms[0].values == {"model.iterations": 4, "train.batch": 16} and len(arms) == 4


def test_an_axis_may_be_a_setting_of_a_group_within_a_group():
    arms = expand(with_grid(axes={"measure.quality.blocks": [20, 10], "train.steps": [3]}, baseline={}))
    assert [arm.settings.measure.quality.blocks for arm in arms] == [20, 10]


def test_a_name_says_what_its_setting_is():
    """The last word of a setting, the group's where that is no more than "name", the whole one where two would be alike."""
    named = {"runtime.name": ["onnx"], "runtime.precision": ["fp32"]}
    assert expand(with_grid(axes=named, baseline={}))[0].name == "runtime=onnx precision=fp32"
    points = [{"train.steps": 1, "train.batch": 8}, {"vae.steps": 1, "train.batch": 8}, {"train.batch": 16}]
    names = [arm.name for arm in expand(with_grid(axes={}, points=points, baseline={}))]
    assert names == ["train.steps=1 train.batch=8", "vae.steps=1 train.batch=8", "batch=16"]


def test_one_trial_an_arm_and_seed():
    plan = plan_of("grid=mixers", "grid.match=none", "scale=smoke", "seeds=[3,5]")
    assert len(plan.trials) == len({trial.key for trial in plan.trials}) == 2 * len(plan.arms) == 10
    assert [trial.seed for trial in plan.trials] == [3] * 5 + [5] * 5
    assert all(trial.settings["seed"] == trial.seed and len(trial.key) == 12 for trial in plan.trials)
    assert [trial.arm for trial in plan.trials if trial.baseline] == ["grfm", "grfm"]


def test_a_trial_says_where_its_curves_and_its_model_lie():
    plan = plan_of("grid=distilled", "scale=smoke")
    trial = next(trial for trial in plan.trials if trial.values.get("student.method") == "shortcut")
    teacher, student = trial.chain.flows
    assert trial.curves == (f"stages/{teacher.key}/metrics.jsonl", f"stages/{student.key}/metrics.jsonl")
    assert trial.model == f"stages/{student.key}/weights" and (teacher.kind, student.kind) == ("text", "student")


# -- what cannot be used --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axes": {"model.mixr": ["grfm"]}, "baseline": {}}, ["grid.axes", "model.mixr", "did you mean model.mixer?"]),
        (
            {"axes": {"launcher.workers": [1, 2]}, "baseline": {}},
            ["grid.axes", "launcher.workers is not a trial setting"],
        ),
        ({"axes": {"model.mixer": []}, "baseline": {}}, ["grid.axes.model.mixer", "list of values"]),
        ({"axes": {"model.mixer": "grfm"}, "baseline": {}}, ["grid.axes.model.mixer", "list of values"]),
        ({"axes": {"model.dim": [64, 32, 64]}, "baseline": {}}, ["grid.axes.model.dim", "lists a value twice"]),
        ({"axes": {}, "baseline": {}}, ["grid.axes is empty"]),
        ({"baseline": {"model.dim": 3}}, ["grid.baseline", "model.dim is not an axis", "model.mixer"]),
        ({"axes": {"train.steps": [10, -5]}, "baseline": {}}, ["train.steps=-5", "at least 1"]),
        ({"axes": {"train.loss_weight": ["none", "snr"]}, "baseline": {}}, ["train.loss_weight='snr'", "none, odds"]),
    ],
)
def test_axes_and_baselines_that_cannot_be_used(changes, words):
    message = error_of(**changes)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"better": "smaller"}, ["grid.decide.better='smaller'", "lower or higher"]),
        ({"better": None}, ["grid.decide.better", "lower or higher"]),
        ({"metric": None}, ["grid.decide.metric", "fid"]),
        ({"metric": "fidd"}, ["grid.decide.metric='fidd' is no measure (did you mean fid?)", "accuracy_colour"]),
        ({"practical": "little"}, ["grid.decide.practical", "5%", "'little'"]),
        ({"practical": 10}, ["grid.decide.practical", "below 100%", "10"]),
        ({"expect": {"fourier": "bad"}}, ["grid.decide.expect.fourier='bad'", "not better", "equivalent"]),
        ({"threshold": 3}, ["grid.decide.threshold", "metric, better, practical, expect"]),
    ],
)
def test_decisions_that_cannot_be_used(change, words):
    message = error_of(decide=DECIDE | change)
    assert all(word in message for word in words), message


def test_a_decision_about_speed_needs_it_measured():
    decide = DECIDE | {"metric": "latency_ratio"}
    assert "grid.decide.metric=latency_ratio needs measure.latency.rounds" in error_of(
        "measure.latency.rounds=0", decide=decide
    )
    assert len(expand(with_grid(decide=decide))) == 5


@pytest.mark.parametrize("seeds", ["[]", "[-1]", "[1,1]", "[true]", "[0.5]", "[a]"])
def test_seeds_that_cannot_be_used(seeds):
    with pytest.raises(SettingError, match=r"seeds=.* must be a list of different integers >= 0"):
        expand(settings_from(f"seeds={seeds}"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.mixer=grmf"], ["model.mixer='grmf'", "attention"]),
        (["latent.levels=6"], ["data.size=32", "multiple of", "64"]),
        (["model.heads=3"], ["model.", "heads"]),
        (["data=parquet"], ["data.path is needed"]),
        (["data=folder", "data.path=/nowhere/at/all"], ["data.path does not exist", "/nowhere/at/all"]),
        (["data.validation=0.5"], ["data.validation", "count"]),
        (["stage=vae"], ["stage=vae makes no images", "class, text, aesthetic, distill"]),
        (["stage=class"], ["stage=class", "data=shapes is measured on captions", "stage=text"]),
        (["model.text=labels"], ["model.text=labels", "data=shapes is measured on captions", "model.text=words"]),
        (["stage=distill", "start=class"], ["stage=distill", "data=shapes is measured on captions"]),
        (["stage=distill", "sample.steps=3"], ["sample.steps=3", "student.steps", "allowed: 1, 2, 4"]),
        (["depth.injection=none", "depth.initial=zero"], ["depth.injection=none", "depth.initial=input"]),
        (["depth.share=false", "sample.iterations=2"], ["sample.iterations=2", "depth.share=false"]),
        (["model.mixer=no_such_module:Mixer"], ["model.mixer='no_such_module:Mixer'", "cannot be imported"]),
        (["latent=pretrained"], ["latent.source"]),
        (["latent=pretrained", "latent.source=/nowhere/at/all"], ["latent.source", "/nowhere/at/all"]),
        (["model.text=clip", "model.text_source=/nowhere/at/all"], ["model.text_source", "/nowhere/at/all"]),
        (["measure.what=[duplicate]"], ["measure.what", "duplicate"]),
        (["runtime=onnx", "runtime.precision=bf16"], ["runtime", "bf16"]),
    ],
)
def test_a_plan_finds_what_would_fail_later(overrides, words):
    with pytest.raises(SettingError) as caught:
        plan_of("grid=depth", *overrides)
    assert all(word in str(caught.value) for word in words), caught.value


# -- the grids that are there ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", grids())
def test_every_grid_makes_a_plan_and_its_claim_is_about_its_arms(name):
    settings = settings_from(f"grid={name}", "scale=smoke", "seeds=[0,1]")
    plan, decide = make_plan(settings), settings.grid.decide
    assert settings.grid.name == name and settings.grid.question.endswith("?") and settings.grid.claim
    assert sum(arm.baseline for arm in plan.arms) == 1 and len({arm.name for arm in plan.arms}) == len(plan.arms) > 1
    assert len(plan.trials) == 2 * len(plan.arms)
    known, stray = expectations(decide, plan.arms)
    assert known == decide["expect"] != {} and stray == []
    assert decide["metric"] in (*METRICS, *SPEED) and plan.arms[0].name not in known
    if decide["metric"] in METRICS:
        assert decide["metric"] in settings.measure.quality.metrics and "quality" not in plan.refused


@pytest.mark.parametrize(
    ("axes", "expect", "name"),
    [
        (None, {"furier": "worse"}, "furier"),
        ({"model.mixer": ["grfm", "attention"]}, {"attention": "worse", "fourier": "worse"}, "fourier"),
    ],
)
def test_an_expectation_of_an_arm_that_is_not_there_is_left_out_and_told(axes, expect, name):
    changes = {"decide": DECIDE | {"expect": expect}} | ({"axes": axes} if axes else {})
    settings = with_grid("scale=smoke", match="none", **changes)
    plan = make_plan(settings)
    kept, stray = expectations(settings.grid.decide, plan.arms)
    assert stray == [name] and kept == {k: v for k, v in expect.items() if k != name}
    assert f"grid.decide.expect names {name}, which no arm of this run is: left out." in notes_of(settings, plan)


def test_a_grid_sets_what_its_question_needs_and_the_command_line_beats_it():
    assert settings_from("grid=fourier").model.mixer == "fourier"
    assert settings_from("grid=fourier", "model.mixer=grfm").model.mixer == "grfm"
    assert settings_from("grid=distilled").stage == "distill"


def test_what_a_judge_cannot_say_is_told_in_the_notes(tmp_path):
    (tmp_path / "weights.pt").write_text("x")
    settings = settings_from("grid=depth", "scale=smoke", "judge=inception", f"judge.weights={tmp_path}/weights.pt")
    notes = notes_of(settings, make_plan(settings))
    assert any("weights.pt is not known as a published file" in note for note in notes)
    assert any(note.startswith("No alignment: judge inception reads no captions") for note in notes)
    place = write_rows(tmp_path, "a")
    settings = settings_from("grid=depth", "scale=smoke", "data=parquet", f"data.path={place}", "data.validation=30")
    assert any("show trends only" in note for note in notes_of(settings, make_plan(settings)))
