"""What a grid's axes, joined axes, conditions, exclusions, points and included grids give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planned import plan_of, settings_from

from ablations.question import settings as question
from ablations.question.axes import points_of, values_by_setting
from ablations.question.grid import expand
from ablations.question.settings import Grid
from iris.errors import SettingError

KNOWN = {
    "model.mixer": "grfm",
    "model.dim": 64,
    "model.heads": 4,
    "fourier.form": "phase",
    "train.steps": 900,
    "judge.name": "shapes",
}


def points(**parts: Any) -> list[dict[str, Any]]:
    return points_of(Grid(**parts), KNOWN)


@pytest.fixture
def write_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes a file of a folder of grids that stands for the product's own."""
    monkeypatch.setattr(question, "GRIDS", tmp_path)

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.yaml").write_text(text)
        question.grids.cache_clear()

    yield write
    question.grids.cache_clear()


def test_joined_axes_move_together_and_multiply_with_the_others():
    found = points(axes={"model.mixer": ["grfm", "attention"]}, zip=[{"model.dim": [64, 96], "model.heads": [4, 6]}])
    assert found == [
        {"model.mixer": mixer, "model.dim": dim, "model.heads": heads}
        for mixer in ("grfm", "attention")
        for dim, heads in ((64, 4), (96, 6))
    ]


def test_a_condition_takes_an_axis_away_and_what_is_left_counts_once():
    found = points(
        axes={"model.mixer": ["grfm", "attention"], "fourier.form": ["phase", "dct"]},
        when={"fourier.form": {"model.mixer": ["grfm", "fourier"]}},
    )
    assert found == [
        {"model.mixer": "grfm", "fourier.form": "phase"},
        {"model.mixer": "grfm", "fourier.form": "dct"},
        {"model.mixer": "attention"},
    ]


def test_a_condition_may_look_at_a_setting_that_is_no_axis():
    assert points(axes={"model.dim": [64, 96]}, when={"model.dim": {"model.mixer": "attention"}}) == [{}]


def test_exclusions_hold_for_one_value_or_several():
    axes = {"model.mixer": ["grfm", "attention"], "model.dim": [32, 64, 96]}
    left = points(
        axes=axes,
        exclude=[{"model.mixer": "attention", "model.dim": [64, 96]}, {"model.dim": 32, "model.mixer": "grfm"}],
    )
    assert [(point["model.mixer"], point["model.dim"]) for point in left] == [
        ("grfm", 64),
        ("grfm", 96),
        ("attention", 32),
    ]


def test_points_are_added_after_the_product():
    found = points(axes={"model.dim": [64]}, points=[{"model.mixer": "conv3", "train.steps": 10}])
    assert found == [{"model.dim": 64}, {"model.mixer": "conv3", "train.steps": 10}]
    assert values_by_setting(found) == {"model.dim": [64], "model.mixer": ["conv3"], "train.steps": [10]}


def test_points_alone_are_a_grid():
    assert points(points=[{"model.dim": 64}, {"model.dim": 96}]) == [{"model.dim": 64}, {"model.dim": 96}]


def test_another_grid_joins_with_its_own_rules_and_shared_points_count_once(write_grid):
    write_grid("other", "axes: {model.dim: [64, 96, 128]}\nexclude: [{model.dim: 128}]\nsettings: {model: {dim: 8}}")
    write_grid("more", "include: [other]\npoints: [{model.heads: 2}]")
    assert points(axes={"model.dim": [96, 32]}, include=["more"]) == [
        {"model.dim": 96},
        {"model.dim": 32},
        {"model.heads": 2},
        {"model.dim": 64},
    ]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, "grid.axes is empty"),
        ({"axes": {"model.dims": [1]}}, r"grid.axes: model.dims is not a trial setting \(did you mean model.dim\?\)"),
        ({"axes": {"model.dim": []}}, "grid.axes.model.dim=.. must be a list of values"),
        ({"axes": {"model.dim": [1, 1]}}, "lists a value twice"),
        ({"axes": {"model.dim": 1}}, "grid.axes.model.dim=1 must be a list of values"),
        (
            {"zip": [{"model.dim": [1, 2], "model.heads": [1]}]},
            r"grid.zip\[0\]: its lists have different lengths: model.dim 2, model.heads 1",
        ),
        ({"zip": [["model.dim"]]}, r"grid.zip\[0\].* must map settings to lists"),
        ({"axes": {"model.dim": [1]}, "zip": [{"model.dim": [2]}]}, "model.dim is an axis already"),
        (
            {"axes": {"model.dim": [1]}, "when": {"model.heads": {"model.dim": 1}}},
            "grid.when: model.heads is no axis; allowed: model.dim",
        ),
        (
            {"axes": {"model.dim": [1]}, "exclude": [{"model.width": 1}]},
            "grid.exclude: model.width is not a trial setting",
        ),
        ({"axes": {"model.dim": [1]}, "exclude": [{"model.dim": 1}]}, "no trial is left"),
        ({"axes": {"model.dim": [1]}, "points": [{"model.dim": 1}]}, r"grid.points\[0\].* is in the grid already"),
        ({"include": ["mixer"]}, r"grid.include: mixer is no grid \(did you mean mixers\?\)"),
    ],
)
def test_grids_that_cannot_be_used(parts, words):
    with pytest.raises(SettingError, match=words):
        points(**parts)


def test_an_axis_may_be_given_on_the_command_line_in_place_of_the_grids_own():
    settings = settings_from(
        "grid=mixers",
        "grid.axes={model.iterations: [2, 4], depth.injection: [concat, add]}",
        "grid.baseline={model.iterations: 4}",
        "grid.match=none",
    )
    names = [arm.name for arm in expand(settings)]
    assert names == [
        "iterations=4 injection=concat",
        "iterations=2 injection=concat",
        "iterations=2 injection=add",
        "iterations=4 injection=add",
    ]


def test_two_arms_that_are_one_trial_are_refused_by_name():
    with pytest.raises(
        SettingError,
        match="mixer=attention decay=learned and mixer=attention decay=fixed are the same trial, "
        "spatial.decay changes nothing there",
    ):
        plan_of("grid=mixers", "grid.axes={model.mixer: [grfm, attention], spatial.decay: [learned, fixed]}")


def test_grids_that_are_joined_share_their_common_trial():
    plan = plan_of("grid=mixers", "grid.include=[depth]", "grid.match=none", "scale=smoke")
    names = [trial.arm for trial in plan.trials]
    assert names[:5] == [f"mixer={mixer}" for mixer in ("grfm", "attention", "fourier", "recurrence", "spatial")]
    assert "iterations=4" not in names and "iterations=2" in names  # grfm is trained with 4
    assert len({trial.key for trial in plan.trials}) == len(names) == len(plan.arms)
