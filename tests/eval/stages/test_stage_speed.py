"""Stage speed: models beside one another in fresh processes, kept by models, machine and settings."""

import pytest
from evaluations import evaluation

from eval.speed.workers import Loader
from eval.stages import speed
from eval.stages.speed import Speed, measured

ROUNDS = ("measure.latency.rounds=2", "measure.latency.warmup=0")


def beside(runs, *words, caption="a red circle", machine="", names=("one", "two")):
    """The shipped model with one step and with two."""
    makers = {"one": 1, "two": 2}
    found = {name: evaluation(runs, f"sample.steps={makers[name]}", *ROUNDS, *words) for name in names}
    run = found[names[0]]
    return Speed(run.context, {name: one.maker for name, one in found.items()}, run.measure, caption, machine)


def test_models_are_measured_beside_the_first_and_kept(tmp_path):
    stage = beside(tmp_path)
    stage.make()
    found = stage.result["speed"]
    assert list(found) == ["one", "two"] and found["one"]["latency_ratio"] == 1 and found["two"]["latency_ratio"] > 1
    for one in found.values():
        assert 0 < one["latency_q1_ms"] <= one["latency_ms"] <= one["latency_q3_ms"]
        assert (
            one["weights_mb"] == pytest.approx(found["one"]["weights_mb"]) and one["peak_memory_mb"] > one["weights_mb"]
        )
    again = beside(tmp_path)
    assert again.done and again.key == stage.key and again.result["speed"] == found


def test_what_was_measured_is_known_by_models_machine_and_settings(tmp_path):
    usual = beside(tmp_path).key
    others = [
        beside(tmp_path, machine="another"),
        beside(tmp_path, "measure.latency.rounds=3"),
        beside(tmp_path, "measure.threads=2"),
        beside(tmp_path, "dtype=bfloat16"),
        beside(tmp_path, names=("two", "one")),  # ratios are to the first
        beside(tmp_path, names=("one",)),
    ]
    assert len({usual, *(one.key for one in others)}) == 7
    for same in (
        beside(tmp_path, "measure.samples=5", "judge=inception", "measure.what=latency"),
        beside(tmp_path, "seed=4"),
    ):
        assert same.key == usual


def test_many_models_are_measured_in_groups_with_the_first_in_each(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "TOGETHER", 2)
    log = tmp_path / "log"
    given = {name: {"ms": 1, "name": name, "log": str(log)} for name in ("first", "second", "third")}
    loaders = {name: Loader("measured_models:sleeping", argument) for name, argument in given.items()}
    found = measured(loaders, evaluation(tmp_path, *ROUNDS).measure)
    groups, calls = [["first", "second"], ["first", "third"]], log.read_text().split()
    # three images for memory each, then there and back
    wanted = [[a] * 3 + [b] * 3 + [a, b, b, a] for a, b in groups]
    assert calls == wanted[0] + wanted[1]
    assert set(found) == set(loaders) and all(one["latency_ratio"] > 0 for one in found.values())
