"""The settings of ``python -m ablations.run``: what its own words choose, and how a mistake is told."""

from __future__ import annotations

from typing import Any

import pytest
from planned import settings_from

from ablations.question.settings import TREE, Settings, grids
from eval.settings import TREE as EVAL
from iris.errors import SettingError
from iris.settings import flatten, load_yaml
from iris.stages.settings import TREE as TRAINING


def error_of(*words: str) -> str:
    """What a command line that cannot be used is answered."""
    with pytest.raises(SettingError) as caught:
        settings_from(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_words_compose():
    settings = settings_from("grid=mixers", "train.steps=2000", "seeds=[0,1,2]", "model.dim=128", "data=shapes2")
    assert (settings.grid.name, settings.train.steps, settings.seeds) == ("mixers", 2000, [0, 1, 2])
    assert (settings.model.dim, settings.data.name) == (128, "shapes2")


@pytest.mark.parametrize("word", TREE.words)
def test_every_option_of_every_group_builds(word):
    assert TREE.options(word)
    for option in TREE.options(word):
        settings = TREE.build([f"{word}={option}"])
        assert isinstance(settings, Settings)
        if word in ("grid", "latent", "judge", "launcher", "runtime"):  # which carry their own name
            assert getattr(settings, word).name == option


def leaves(values: dict[str, Any], *groups: str) -> dict[str, Any]:
    """The settings of some groups by their dotted names."""
    return flatten({group: values[group] for group in groups})


def test_the_groups_mean_what_they_mean_to_the_other_commands():
    """So that a grid takes what they made: of training all, of measuring all but how many images of which measures."""
    ours, training, measuring = (tree.compose([]) for tree in (TREE, TRAINING, EVAL))
    shared = [
        name for name in training if name in ours and name not in ("seed", "runs_dir", "threads", "stage", "start")
    ]
    changed = {k for k, v in leaves(training, *shared).items() if leaves(ours, *shared)[k] != v}
    assert changed == {"compute.validate_every"}  # a trial is looked at when it is finished
    groups = ("data", "judge", "measure", "sample")
    changed = {k for k, v in leaves(measuring, *groups).items() if leaves(ours, *groups)[k] != v}
    assert changed == {"measure.heldout", "measure.quality.metrics"}
    for group in groups:
        assert TREE.groups[group] == EVAL.groups[group]


def test_a_scale_reaches_over_training_measuring_and_launching():
    smoke, gpu = settings_from("scale=smoke"), settings_from("scale=gpu")
    assert (smoke.model.dim, smoke.train.steps, smoke.measure.samples, smoke.measure.heldout) == (32, 12, 96, 32)
    assert (gpu.model.dim, gpu.measure.samples, gpu.launcher.gpus_per_trial) == (384, 10000, 1)
    assert TREE.options("scale") == TRAINING.options("scale")


def test_the_scale_beats_the_groups_and_the_command_line_beats_the_scale():
    for words in (
        ["scale=smoke", "sample=heun", "data=shapes2", "model.dim=48", "measure.samples=9"],
        ["measure.samples=9", "model.dim=48", "data=shapes2", "sample=heun", "scale=smoke"],
    ):
        settings = settings_from(*words)
        assert (settings.sample.sampler, settings.sample.steps, settings.data.name) == ("heun", 2, "shapes2")
        assert (settings.model.dim, settings.measure.samples, settings.data.train) == (48, 9, 512)


def test_a_grid_is_read_from_its_file_with_what_it_sets_beside_its_axes():
    assert grids()["fourier"]["model"] == {"mixer": "fourier"} and "settings" not in grids()["fourier"]["grid"]
    assert {name: sets["grid"]["name"] for name, sets in grids().items()} == {name: name for name in grids()}


def test_a_grids_decision_is_set_word_by_word():
    settings = settings_from("grid=mixers", "grid.decide.practical=10%", "grid.decide.metric=kid")
    assert settings.grid.decide | {"expect": None} == {
        "metric": "kid",
        "better": "lower",
        "practical": "10%",
        "expect": None,
    }
    assert settings_from("grid=mixers").grid.decide["practical"] == "5%"  # nobody else's
    assert settings_from("grid=mixers", "grid.axes.model.mixer=[grfm,conv3]").grid.axes == {
        "model.mixer": ["grfm", "conv3"]
    }


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("seed=5", ["seed=5", "seeds=[5]"]),
        ("sed=5", ["sed is not a setting", "did you mean seed?", "runs_dir"]),
        ("trian.steps=5", ["trian.steps is not a setting", "did you mean train.steps?"]),
        ("latent.steps=5", ["latent.steps is not a setting", "did you mean latent.stages?"]),
        ("grid.axes.model.dim=[64]", ["is not a setting by itself", "'grid.axes={model.dim: …}'"]),
        ("grid.decide.metrik=fid", ["grid.decide.metrik is not a setting", "did you mean grid.decide.metric?"]),
        ("grid=mixer", ["grid='mixer' is unknown", "did you mean mixers?", "depth", "precision"]),
        ("grid=", ["grid='' is unknown", "mixers"]),
        ("scale=smok", ["did you mean smoke?", "default, gpu"]),
        ("grid.name=../../x", ["grid.name='../../x' names a folder", "letters, digits"]),
        ("launcher=cluster", ["launcher='cluster' is unknown", "inline, local, slurm"]),
        ("launcher.workers=0", ["launcher.workers=0", "at least 1"]),
        ("launcher.gpus_per_trial=2", ["launcher.gpus_per_trial=2", "launcher=local", "0, 1", "launcher=slurm"]),
        ("launcher.interrupt=stop", ["launcher.interrupt='stop'", "ask, detach, cancel"]),
        ("threads=0", ["threads=0", "at least 1"]),
        ("threads=many", ["threads='many'", "int or null"]),
        ("grid.match=speed", ["grid.match='speed'", "params, flops, latency, none"]),
        ("action=stop", ["action='stop'", "run, status, cancel, retry, report"]),
        ("measure.latency.rounds=1", ["measure.latency.rounds=1", "2 or more, or 0"]),
        ("runtime.precision=int8", ["runtime.precision=int8", "runtime.name=onnx"]),
        ("track.models_mb=-1", ["track.models_mb=-1", "at least 0"]),
        ("mixers", ["'mixers' is no setting", "grid=mixers"]),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(word, told):
    message = error_of(word)
    assert all(part in message for part in told), message


def test_what_is_shown_is_read_back_the_same():
    for name in grids():
        values = TREE.compose([f"grid={name}"])
        assert load_yaml(TREE.dump(values)) == values


def test_threads_are_the_cores_shared_by_the_workers(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    for words, threads in (
        ([], 4),
        (["launcher.workers=3"], 2),
        (["launcher.workers=9"], 1),
        (["threads=7"], 7),
        (["launcher=inline"], 8),
        (["launcher=slurm"], 4),
        (["launcher=slurm", "threads=7"], 7),
    ):
        settings = settings_from(*words)
        assert settings.launcher.threads_of(settings.threads) == threads, words


def test_on_slurm_a_trial_has_a_process_for_each_gpu_of_each_node():
    for words, processes in (
        (["launcher.nodes=2"], 1),
        (["launcher=slurm"], 1),
        (["launcher=slurm", "launcher.gpus_per_trial=4", "launcher.nodes=2"], 8),
        (["launcher=slurm", "launcher.gpus_per_trial=0", "launcher.nodes=2"], 2),
    ):
        assert settings_from(*words).launcher.processes == processes, words
