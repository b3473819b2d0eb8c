"""Arms and trials of a grid: what is varied, what is fair, and what makes a trial the same as another."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

from ablations.question.compose import composed, options, settings_of
from ablations.question.grid import TOLERANCE, Arm, expand, expectations, key_of, match_arms, trials_of
from ablations.question.plan import flops, make_plan, parameters
from ablations.question.settings import Settings, build
from iris.errors import SettingError

FACTS = {"data": "d" * 16, "judge": "j" * 64}
DECIDE = {"metric": "fid", "better": "lower", "practical": "5%", "expect": {}}


def settings_from(*overrides: str) -> tuple[Settings, dict[str, Any]]:
    return settings_of(composed(list(overrides)))


def with_grid(*overrides: str, **changes: Any) -> tuple[Settings, dict[str, Any]]:
    """Settings whose grid is changed where a command line cannot."""
    values = copy.deepcopy(settings_from(*overrides)[1])
    values["grid"] |= {"decide": DECIDE} | changes
    return build(Settings, values), values


def error_of(*overrides: str, **changes: Any) -> str:
    with pytest.raises(SettingError) as caught:
        expand(*with_grid(*overrides, **changes))
    return str(caught.value)


def keys_of(*overrides: str, facts: dict[str, str] = FACTS) -> list[str]:
    settings, values = settings_from(*overrides)
    arms = expand(settings, values)
    return [trial.key for trial in trials_of(arms, settings.seeds, {arm.name: facts for arm in arms})]


# -- arms -----------------------------------------------------------------------------------------------------------


def test_arms_are_the_product_of_the_axes_with_the_baseline_first():
    axes = {"model.mixer": ["attention", "grfm"], "model.iterations": [1, 2, 4]}
    settings, values = with_grid(axes=axes, baseline={"model.mixer": "grfm", "model.iterations": 2})
    before = copy.deepcopy(values)
    arms = expand(settings, values)
    points = [(arm.values["model.mixer"], arm.values["model.iterations"]) for arm in arms]
    assert points[0] == ("grfm", 2) and arms[0].name == "mixer=grfm iterations=2"
    assert points[1:] == [("attention", 1), ("attention", 2), ("attention", 4), ("grfm", 1), ("grfm", 4)]
    assert [arm.baseline for arm in arms] == [True] + 5 * [False]
    for arm, (mixer, iterations) in zip(arms, points, strict=True):
        assert (arm.settings["model"]["mixer"], arm.settings["model"]["iterations"]) == (mixer, iterations)
        assert arm.settings["train"] == values["train"]
    assert values == before


def test_a_baseline_outside_the_product_is_added():
    arms = expand(*with_grid(axes={"model.iterations": [1, 2]}, baseline={"model.iterations": 8}))
    assert [(arm.name, arm.baseline) for arm in arms] == [("8", True), ("1", False), ("2", False)]


def test_a_baseline_may_leave_axes_out():
    arms = expand(*with_grid(axes={"model.iterations": [4, 2], "train.batch": [8, 16]}, baseline={"train.batch": 16}))
    assert arms[0].values == {"model.iterations": 4, "train.batch": 16} and len(arms) == 4


def test_arms_of_the_command_line_grids():
    for name in options("grid"):
        settings, values = settings_from(f"grid={name}")
        arms = expand(settings, values)
        assert sum(arm.baseline for arm in arms) == 1 and len({arm.name for arm in arms}) == len(arms) > 1


def test_one_trial_an_arm_and_seed():
    settings, values = settings_from("grid=mixers", "seeds=[3,5]")
    arms = expand(settings, values)
    trials = trials_of(arms, settings.seeds, {arm.name: FACTS for arm in arms})
    assert len(trials) == len({trial.key for trial in trials}) == 2 * len(arms) == 10
    assert [trial.seed for trial in trials] == [3] * 5 + [5] * 5
    assert all(trial.settings["seed"] == trial.seed and len(trial.key) == 12 for trial in trials)
    assert [trial.arm for trial in trials if trial.baseline] == ["grfm", "grfm"]


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
        ({"practical": "little"}, ["grid.decide.practical", "5%", "'little'"]),
        ({"expect": {"fourier": "bad"}}, ["grid.decide.expect.fourier='bad'", "not better", "equivalent"]),
        ({"threshold": 3}, ["grid.decide.threshold", "metric, better, practical, expect"]),
    ],
)
def test_decisions_that_cannot_be_used(change, words):
    message = error_of(decide=DECIDE | change)
    assert all(word in message for word in words), message


def test_a_decision_about_speed_needs_it_measured():
    decide = DECIDE | {"metric": "latency_ratio"}
    assert "grid.decide.metric=latency_ratio needs measure.latency_rounds" in error_of(
        "measure.latency_rounds=0", decide=decide
    )
    assert len(expand(*with_grid(decide=decide))) == 5


@pytest.mark.parametrize("seeds", ["[]", "[-1]", "[1,1]", "[true]", "[0.5]", "[a]"])
def test_seeds_that_cannot_be_used(seeds):
    settings, values = settings_from(f"seeds={seeds}")
    with pytest.raises(SettingError, match=r"seeds=.* must be a list of different integers >= 0"):
        expand(settings, values)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.mixer=grmf"], ["model.mixer='grmf'", "attention"]),
        (["latent.levels=6"], ["data.size=32", "multiple of 64"]),
        (["model.heads=3"], ["model.", "heads"]),
        (["data=parquet"], ["data.path is needed"]),
        (["data=folder", "data.path=/nowhere/at/all"], ["data.path does not exist", "/nowhere/at/all"]),
        (["data.validation=0.5"], ["data.validation", "count"]),
    ],
)
def test_a_plan_finds_what_would_fail_later(overrides, words):
    with pytest.raises(SettingError) as caught:
        make_plan(*settings_from("grid=depth", *overrides))
    assert all(word in str(caught.value) for word in words), caught.value


# -- fair swaps -----------------------------------------------------------------------------------------------------


def check_matched(arms: list[Arm], what: str, cost: Any) -> None:
    """Every arm within 1 % of the baseline, and its words true."""
    target = cost(arms[0].settings)
    assert arms[0].matched is None and arms[0].settings["model"]["mixer_width"] is None
    for arm in arms[1:]:
        error = cost(arm.settings) / target - 1
        if arm.settings["model"]["mixer"] == "identity":
            assert arm.matched == f"has no size to change: {error:+.2%} {what}"
            continue
        width = arm.settings["model"]["mixer_width"]
        assert abs(error) <= TOLERANCE[what] == 0.01
        heads = arm.settings["model"]["heads"]
        assert width % (4 * heads if arm.settings["model"]["mixer"] == "attention" else heads) == 0
        dim = arm.settings["model"]["dim"]
        assert arm.matched == f"mixer_width {width} (model.dim {dim}): {error:+.2%} {what}"


@pytest.mark.parametrize("dim", [64, 128])
def test_matched_parameters_of_all_mixers(dim):
    settings, values = settings_from("grid=mixers", f"model.dim={dim}")
    arms = match_arms(expand(settings, values), "params", parameters)
    assert [arm.name for arm in arms] == values["grid"]["axes"]["model.mixer"]
    check_matched(arms, "params", parameters)


def test_matched_operations():
    axes = {"model.mixer": ["grfm", "fourier"]}
    settings, values = with_grid(axes=axes, baseline={"model.mixer": "grfm"}, match="flops")
    check_matched(match_arms(expand(settings, values), "flops", flops), "flops", flops)


def test_nothing_is_matched_where_nothing_is_asked():
    arms = expand(*settings_from("grid=depth"))
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
    arms = expand(*with_grid(axes={"model.mixer": ["grfm", "stubborn_mixers:Bare"]}, baseline={"model.mixer": "grfm"}))
    assert match_arms(arms, "params", parameters)[1].matched.startswith("has no size to change: -")
    arms = expand(
        *with_grid(axes={"model.mixer": ["grfm", "stubborn_mixers:Stubborn"]}, baseline={"model.mixer": "grfm"})
    )
    with pytest.raises(SettingError, match="comes no closer than"):
        match_arms(arms, "params", parameters)


def test_a_match_that_is_impossible_says_so():
    settings, values = settings_from("grid=mixers", "model.dim=64", "model.heads=16")
    with pytest.raises(SettingError) as caught:
        match_arms(expand(settings, values), "params", parameters)
    message = str(caught.value)
    for word in ("grid.match=params", "mixer_width=", "model.heads", "grid.match=none"):
        assert word in message


@pytest.mark.parametrize("scale", options("scale"))
@pytest.mark.parametrize("name", options("grid"))
def test_every_grid_makes_a_plan(name, scale):
    settings, values = settings_from(f"grid={name}", f"scale={scale}", "seeds=[0,1]")
    plan = make_plan(settings, values)
    assert len(plan.trials) == 2 * len(plan.arms) and all(
        facts["judge"] == plan.judge["sha256"] for facts in plan.facts.values()
    )
    if settings.grid.match == "params":
        check_matched(plan.arms, "params", parameters)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("measure.samples=4097", ["measure.samples=4097", "data.validation=4096"]),
        ("measure.heldout_samples=1025", ["measure.heldout_samples=1025", "data.heldout=1024"]),
    ],
)
def test_more_samples_than_captions_are_refused(override, words):
    """They would be cut without a word, and FID at another count is another number."""
    with pytest.raises(SettingError) as caught:
        make_plan(*settings_from("grid=mixers", override))
    assert all(word in str(caught.value) for word in words)


# -- identity -------------------------------------------------------------------------------------------------------


def test_keys_are_stable_and_independent_of_order():
    assert keys_of("grid=mixers", "train.steps=7") == keys_of("train.steps=7", "grid=mixers")
    settings, values = settings_from()
    arm = expand(settings, values)[0].settings
    shuffled = {group: dict(reversed(arm[group].items())) for group in reversed(arm)}
    assert key_of(arm, 0, FACTS) == key_of(shuffled, 0, FACTS)


@pytest.mark.parametrize(
    "override",
    [
        "launcher=slurm",
        "launcher=inline",
        "launcher.workers=7",
        "threads=5",
        "runs_dir=elsewhere",
        "reports_dir=there",
        "train.checkpoint_seconds=1",
        "measure.latency_rounds=5",
        "measure.latency_warmup=9",
        "dry_run=true",
        "data.path=moved",
    ],
)
def test_how_a_trial_is_run_does_not_change_its_key(override):
    assert keys_of("grid=mixers", override) == keys_of("grid=mixers")


@pytest.mark.parametrize(
    "override",
    [
        "seeds=[1]",
        "train.steps=1001",
        "train.learning_rate=0.005",
        "model.dim=128",
        "data.size=64",
        "data.seed=1",
        "latent.steps=601",
        "sample.guidance=1.0",
        "measure.samples=100",
    ],
)
def test_what_a_result_depends_on_changes_every_key(override):
    assert not set(keys_of("grid=mixers", override)) & set(keys_of("grid=mixers"))


@pytest.mark.parametrize("fact", ["data", "judge"])
def test_other_data_or_another_judge_change_every_key(fact):
    assert not set(keys_of(facts=FACTS | {fact: "other"})) & set(keys_of())


def test_an_arm_has_the_same_key_in_every_grid():
    mixers = dict(zip([a.name for a in expand(*settings_from("grid=mixers"))], keys_of("grid=mixers"), strict=True))
    depth = dict(zip([a.name for a in expand(*settings_from("grid=depth"))], keys_of("grid=depth"), strict=True))
    assert mixers["grfm"] == depth["4"]


def test_moved_files_keep_their_keys_and_changed_files_do_not(tmp_path: Path):
    from datasets import Dataset

    first, moved, changed = (tmp_path / folder / "rows.parquet" for folder in ("first", "moved", "changed"))
    for path, word in ((first, "a"), (changed, "b")):
        path.parent.mkdir()
        Dataset.from_dict({"image": [b"x"] * 3, "text": [word] * 3}).to_parquet(path)
    shutil.copytree(first.parent, moved.parent)

    def keys(path: Path) -> list[str]:
        plan = make_plan(*settings_from("grid=depth", "data=parquet", f"data.path={path}"))
        return [trial.key for trial in plan.trials]

    assert keys(first) == keys(first)
    assert keys(first) != keys(changed)
    assert keys(first) == keys(moved)


def test_arms_that_differ_in_data_do_not_share_their_data(tmp_path: Path):
    settings, values = with_grid(f"runs_dir={tmp_path}", axes={"data.train": [100, 200]}, baseline={}, match="none")
    plan = make_plan(settings, values)
    assert len({plan.stages(trial).data_key for trial in plan.trials}) == 2


@pytest.mark.parametrize(
    ("axes", "expect", "name"),
    [
        (None, {"furier": "worse"}, "furier"),
        ({"model.mixer": ["grfm", "attention"]}, {"attention": "worse", "fourier": "worse"}, "fourier"),
    ],
)
def test_an_expectation_of_an_arm_that_is_not_there_is_left_out_and_told(axes, expect, name):
    changes = {"decide": DECIDE | {"expect": expect}} | ({"axes": axes} if axes else {})
    settings, values = with_grid(**changes)
    kept, stray = expectations(settings.grid.decide, make_plan(settings, values).arms)
    assert stray == [name] and kept == {k: v for k, v in expect.items() if k != name}


# -- the settings of parts ------------------------------------------------------------------------------------------


def test_a_grid_sets_what_its_question_needs_and_the_command_line_beats_it():
    assert settings_from("grid=fourier")[0].model.mixer == "fourier"
    assert settings_from("grid=fourier", "model.mixer=grfm")[0].model.mixer == "grfm"
    assert settings_from("grid=elastic")[0].measure.iterations == [1, 2, 4, 8, 16]


def test_a_setting_that_a_mixer_does_not_read_changes_no_key():
    plain, stock = (
        dict(zip(("grfm", "attention", "fourier", "recurrence", "spatial"), keys_of(*overrides), strict=True))
        for overrides in ([], ["fourier.form=stock"])
    )
    assert {name for name in plain if plain[name] != stock[name]} == {"grfm", "fourier"}
    assert keys_of("latent.front=unshuffle") == keys_of() != keys_of("latent=conv_vae") != keys_of("latent=haar")
    assert keys_of("latent=haar", "latent.kl_weight=1") == keys_of("latent=haar")
    assert keys_of("depth.norm=sandwich") != keys_of()


def test_an_outside_mixer_is_known_by_its_code(tmp_path, monkeypatch):
    source = (
        "from torch import nn\nclass Mean(nn.Module):\n    def __init__(self, dim, width=None):\n"
        "        super().__init__()\n        self.out = nn.Linear(dim, width or dim)\n"
    )
    (tmp_path / "keyed_mixer.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    _settings, values = settings_from("grid=depth", "model.mixer=keyed_mixer:Mean")
    before = key_of(values, 0, FACTS)
    (tmp_path / "keyed_mixer.py").write_text(source + "# changed\n")
    assert key_of(values, 0, FACTS) != before


def test_pretrained_parts_are_known_by_their_weights_not_their_place():
    values = settings_from("latent=pretrained", "latent.source=here")[1]
    moved = settings_from("latent=pretrained", "latent.source=there")[1]
    facts = FACTS | {"latent": "w" * 64}
    assert key_of(values, 0, facts) == key_of(moved, 0, facts) != key_of(values, 0, FACTS | {"latent": "v" * 64})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["fourier.form=afno"], ["fourier.form='afno'", "phase, modrelu, stock, dct"]),
        (["depth.injection=none", "depth.initial=zero"], ["depth.injection=none", "depth.initial=input"]),
        (["depth.share=maybe"], ["depth.share='maybe'", "bool"]),
        (["train.time=cosine"], ["train.time='cosine'", "logit_normal, uniform, mode"]),
        (["measure.iterations=[0]"], ["measure.iterations=[0]", "at least 1"]),
        (["measure.iterations=[2]", "depth.share=false"], ["measure.iterations=[2]", "depth.share=false"]),
        (["model.mixer=no_such_module:Mixer"], ["model.mixer='no_such_module:Mixer'", "cannot be imported"]),
        (["latent=pretrained"], ["latent.source"]),
        (["latent=pretrained", "latent.source=/nowhere/at/all"], ["latent.source", "/nowhere/at/all"]),
        (["model.text=clip", "model.text_source=/nowhere/at/all"], ["model.text_source", "/nowhere/at/all"]),
    ],
)
def test_a_plan_finds_parts_that_cannot_be(overrides, words):
    with pytest.raises(SettingError) as caught:
        make_plan(*settings_from("grid=depth", *overrides))
    assert all(word in str(caught.value) for word in words), str(caught.value)
