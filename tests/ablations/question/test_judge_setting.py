"""The judge of a grid: which settings name it, and what identifies it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from planned import plan_of

from ablations.question.plan import Plan
from iris.errors import SettingError

GRID = ("grid=mixers", "scale=smoke", "grid.match=none", "grid.axes={model.mixer: [grfm]}")


def file_of(folder: Path, content: str) -> str:
    folder.mkdir()
    (folder / "weights.pt").write_text(content)
    return str(folder / "weights.pt")


def plan_by(judge: str, *more: str) -> Plan:
    return plan_of(*GRID, f"judge={judge}", *more)


def keys(plan: Plan) -> list[str]:
    return [trial.key for trial in plan.trials]


def stages(plan: Plan, *kinds: str) -> list[Any]:
    return [stage.key for stage in plan.stages(plan.trials[0]) if not kinds or stage.kind in kinds]


def test_weights_are_known_by_their_hash_not_by_their_place(tmp_path):
    first, moved, other = (file_of(tmp_path / name, text) for name, text in (("a", "x"), ("b", "x"), ("c", "y")))
    one, same, changed = (plan_by("inception", f"judge.weights={path}") for path in (first, moved, other))
    assert keys(one) == keys(same) and stages(one) == stages(same)
    assert keys(one) != keys(changed) and stages(one, "text", "images") == stages(changed, "text", "images")
    assert not set(stages(one, "reference", "features", "quality")) & set(stages(changed))


def test_the_model_and_the_prefix_are_part_of_what_a_judge_is(tmp_path):
    path = file_of(tmp_path / "a", "x")
    small, base = (plan_by("dinov2", f"judge.weights={path}", f"judge.model={size}") for size in ("small", "base"))
    assert keys(small) != keys(base) and not set(stages(small, "reference")) & set(stages(base))
    plain, prefixed = (
        plan_by("clip_vit_b32", f"judge.weights={path}", *more) for more in ([], ["judge.prefix=A photo depicts "])
    )
    assert keys(plain) != keys(prefixed) and prefixed.judge["prefix"] == "A photo depicts "


def test_a_relative_path_names_the_same_judge(tmp_path, monkeypatch):
    file_of(tmp_path / "a", "x")
    monkeypatch.chdir(tmp_path)
    plan = plan_by("inception", "judge.weights=a/weights.pt")
    assert keys(plan) == keys(plan_by("inception", f"judge.weights={tmp_path / 'a' / 'weights.pt'}"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["judge=inception", "judge.weights=/nowhere/x.pt"], "judge.weights=/nowhere/x.pt is no file"),
        (["judge=clip"], "set judge.weights to a tag"),
        (["judge.model=large"], "judge shapes takes no judge.model"),
        (["judge.name=oracle"], "judge.name='oracle' is unknown; allowed: shapes, inception, clip_vit_b32"),
        (["measure.what=[skills]", "judge=inception"], "judge inception reads the attributes of no drawn world"),
    ],
)
def test_a_judge_that_cannot_be_used_stops_the_plan(words, told, tmp_path):
    weights = file_of(tmp_path / "a", "x")
    given = [f"judge.weights={weights}"] if words[-1] == "judge=inception" else []
    with pytest.raises(SettingError, match=told):
        plan_of(*GRID, *words, *given)


def test_judges_may_be_an_axis_and_share_the_images(tmp_path):
    path = file_of(tmp_path / "a", "x")
    plan = plan_of(
        *GRID[:3],
        "grid.axes={}",
        f"grid.points=[{{judge.name: shapes}}, {{judge.name: inception, judge.weights: {path}}}]",
        "grid.baseline={judge.name: shapes}",
    )
    shapes, inception = ({stage.key: stage.kind for stage in trial.chain.stages} for trial in plan.trials)
    shared = {shapes[key] for key in shapes.keys() & inception.keys()}
    assert shared == {"data", "latent", "encoded", "text", "images"} and plan.judge["name"] == "shapes"
