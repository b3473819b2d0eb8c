"""From a command line to checked settings: what composes, and how a mistake is told."""

from __future__ import annotations

import dataclasses

import pytest

from ablations.question.compose import CONF, GROUPS, composed, options, settings_of
from ablations.question.settings import Settings, build, flatten
from iris.errors import SettingError


def settings_from(*overrides: str) -> Settings:
    """Settings of a command line."""
    return settings_of(composed(list(overrides)))[0]


def error_of(*overrides: str) -> str:
    """What a command line that cannot be used is answered."""
    with pytest.raises(SettingError) as caught:
        settings_from(*overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_overrides_compose():
    settings = settings_from("grid=mixers", "train.steps=2000", "seeds=[0,1,2]", "model.dim=128", "data=shapes2")
    assert (settings.grid.name, settings.train.steps, settings.seeds) == ("mixers", 2000, [0, 1, 2])
    assert settings.model.dim == 128
    assert (settings.data.name, settings.data.size) == ("shapes2", 64)


def test_settings_and_plain_values_agree():
    settings, values = settings_of(composed(["train.learning_rate=1"]))
    assert isinstance(settings.train.learning_rate, float) and settings.train.learning_rate == 1.0
    assert dataclasses.asdict(settings) == values


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_has_options(group):
    assert options(group) == sorted(path.stem for path in (CONF / group).iterdir() if path.suffix == ".yaml") != []


@pytest.mark.parametrize("choice", [f"{group}={option}" for group in GROUPS for option in options(group)])
def test_every_file_of_every_group_composes(choice):
    group, _, option = choice.partition("=")
    settings, values = settings_of(composed([choice]))
    assert isinstance(settings, Settings)
    if group in ("grid", "data", "latent", "judge", "launcher"):  # whose files carry their own name
        assert values[group]["name"] == option


def test_the_scale_beats_the_groups_and_the_command_line_beats_the_scale():
    smoke = settings_from("scale=smoke", "sample=heun", "data=shapes2")
    assert (smoke.model.dim, smoke.train.steps, smoke.sample.steps, smoke.data.train) == (32, 12, 2, 512)
    assert (smoke.sample.sampler, smoke.data.size, smoke.train.batch) == ("heun", 64, 16)
    for order in (["scale=smoke", "model.dim=48", "data.train=99"], ["model.dim=48", "data.train=99", "scale=smoke"]):
        settings = settings_from(*order)
        assert (settings.model.dim, settings.data.train, settings.train.steps) == (48, 99, 12)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=5", ["train.stepz is not a setting", "did you mean train.steps?", "train.batch"]),
        ("trian.steps=5", ["trian.steps is not a setting", "did you mean train.steps?"]),
        ("seed=5", ["seed is not a setting", "did you mean seeds?", "runs_dir"]),
        ("model.size=5", ["model.size is not a setting", "model.dim", "model.mixer"]),
        (
            "grid.axes.model.mixer=[grfm]",
            ["grid.axes.model.mixer is not a setting by itself", "'grid.axes={model.mixer: …}'"],
        ),
        ("grid.decide.metrik=fid", ["grid.decide.metrik is not a setting", "did you mean grid.decide.metric?"]),
    ],
)
def test_an_unknown_key_is_named_with_what_is_allowed(override, words):
    message = error_of(override)
    assert all(word in message for word in [*words, "allowed:"]), message


@pytest.mark.parametrize(
    ("override", "suggested", "allowed"),
    [
        ("grid=mixer", "mixers", ["depth", "latents", "loss_weight", "mixers", "pathways"]),
        ("scale=smok", "smoke", ["default", "gpu", "smoke"]),
        ("data=shape", "shapes", ["folder", "parquet", "shapes", "shapes2"]),
        ("latent=haaar", "haar", ["haar", "wavelet_vae"]),
        ("launcher=cluster", None, ["inline", "local", "slurm"]),
        ("grid=", None, ["mixers"]),
    ],
)
def test_an_unknown_option_of_a_group(override, suggested, allowed):
    message, group = error_of(override), override.partition("=")[0]
    assert message.startswith(f"{group}=") and "is unknown" in message
    assert (f"did you mean {suggested}?" if suggested else "allowed:") in message
    listed = message.rpartition("allowed: ")[2].split(", ")
    assert set(allowed) <= set(listed) == set(options(group))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps=many", ["train.steps='many'", "int"]),
        ("train.steps=2.5", ["train.steps=2.5", "int"]),
        ("train.steps=true", ["train.steps=True", "int"]),
        ("train.steps=null", ["train.steps=None", "int"]),
        ("train.steps=", ["train.steps=''", "int"]),
        ("train.clip=no_number", ["train.clip='no_number'", "float"]),
        ("dry_run=3", ["dry_run=3", "bool"]),
        ("seeds=3", ["seeds=3", "list"]),
        ("model.mixer=[grfm]", ["model.mixer=", "str"]),
        ("threads=many", ["threads='many'", "int or null"]),
        ("train=quick", ["train='quick' is unknown", "flow"]),
    ],
)
def test_a_value_of_the_wrong_type(override, words):
    message = error_of(override)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps=-5", ["train.steps=-5", "at least 1"]),
        ("train.steps=0", ["train.steps=0", "at least 1"]),
        ("train.learning_rate=0", ["train.learning_rate=0", "above 0"]),
        ("train.learning_rate=nan", ["train.learning_rate=nan", "finite"]),
        ("train.caption_dropout=1.5", ["train.caption_dropout=1.5", "at most 1"]),
        ("data.max_bad=-0.1", ["data.max_bad=-0.1", "at least 0"]),
        ("data.size=4", ["data.size=4", "at least 8"]),
        ("launcher.workers=0", ["launcher.workers=0", "at least 1"]),
        ("threads=0", ["threads=0", "at least 1"]),
        ("measure.latency_rounds=1", ["measure.latency_rounds=1", "2 or more, or 0"]),
        ("train.optimiser=adam", ["train.optimiser='adam'", "did you mean adamw?", "muon, adamw"]),
        ("sample.sampler=ddim", ["sample.sampler='ddim'", "euler, heun, midpoint, stochastic"]),
        ("grid.match=speed", ["grid.match='speed'", "params, flops, latency, none"]),
    ],
)
def test_a_value_out_of_range(override, words):
    message = error_of(override)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("mixers", ["'mixers'", "key=value"]),
        ("train.steps", ["'train.steps'", "key=value"]),
        ("+x=1", ["'+x=1'", "neither added nor removed", "x=value"]),
        ("++train.steps=1", ["'++train.steps=1'", "train.steps=value"]),
        ("~train.steps=1", ["'~train.steps=1'", "neither added nor removed"]),
        ("seeds=[0,1", ["seeds=[0,1"]),
        ("train.steps=${nothing}", ["nothing"]),
    ],
)
def test_what_is_no_setting_at_all(override, words):
    message = error_of(override)
    assert all(word in message for word in words), message


def test_build_names_a_missing_key_and_a_value_that_is_no_group():
    values = settings_of(composed([]))[1]
    without = {**values, "train": {k: v for k, v in values["train"].items() if k != "clip"}}
    with pytest.raises(SettingError, match=r"train\.clip is missing"):
        build(Settings, without)
    with pytest.raises(SettingError, match="model=64 must be a group of settings"):
        build(Settings, {**values, "model": 64})


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}
