"""Speed and memory of a grid's arms: which trials stand for them, and what was measured before."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from planned import plan_of
from rich.console import Console

from ablations.launch.inline import Inline
from ablations.question.plan import Plan
from ablations.session.arm_speed import ArmSpeed
from ablations.session.watch import Watch
from iris.io.files import write_json

MEASURED = {"latency_ms": 7.0, "latency_ratio": 1.0, "contended": ""}


def planned(runs: Path, *words: str) -> Plan:
    return plan_of("grid=depth", "scale=smoke", "seeds=[0,1]", f"runs_dir={runs}", *words)


def speed_of(plan: Plan) -> ArmSpeed:
    watch = Watch("depth", console=Console(file=io.StringIO()))
    return ArmSpeed(plan, Inline(plan.runs / "logs"), watch, lambda: None, None)


def finish(plan: Plan) -> None:
    """Give every trial a result."""
    for trial in plan.trials:
        plan.folder(trial).mkdir(parents=True, exist_ok=True)
        write_json(plan.folder(trial) / "result.json", {})


def keep(plan: Plan, name: str, **networks: dict) -> None:
    """A measurement as the stage speed leaves it."""
    place = plan.runs / "stages" / f"speed-{name}"
    place.mkdir(parents=True)
    write_json(place / "result.json", {"speed": networks, "environment": {}})


@pytest.fixture
def plan(tmp_path) -> Plan:
    return planned(tmp_path)


def test_without_a_finished_trial_there_is_nothing_to_measure(plan):
    speed = speed_of(plan)
    assert speed.measure() == {} == speed.measure(stored=True) and speed.notes == []


def test_no_rounds_are_told(tmp_path):
    plan = planned(tmp_path, "measure.latency.rounds=0")
    finish(plan)
    speed = speed_of(plan)
    assert speed.measure() == {} and speed.notes == ["Speed and memory were not measured: measure.latency.rounds is 0."]


def test_what_was_not_measured_together_is_told(plan):
    finish(plan)
    networks = [trial.chain.network for trial in plan.trials]
    keep(plan, "some", **{networks[0]: MEASURED, networks[1]: MEASURED})
    speed = speed_of(plan)
    assert speed.measure(stored=True) == {} and "were not measured together yet" in speed.notes[0]


def test_what_was_measured_is_that_of_each_arms_network(plan):
    finish(plan)
    networks = {trial.arm: trial.chain.network for trial in plan.trials}
    assert len(set(networks.values())) == len(plan.arms) == 4  # seeds share theirs
    values = {network: MEASURED | {"latency_ms": float(n)} for n, network in enumerate(networks.values())}
    values[networks["2"]]["contended"] = "other processes used 12% of a core; the range is 9% (limit 5%)"
    values[networks["4"]]["contended"] = "the range is 31% (limit 5%)"  # told once, the worst
    keep(plan, "all", **values)
    speed = speed_of(plan)
    found = speed.measure(stored=True)
    assert {arm: of["latency_ms"] for arm, of in found.items()} == {arm: float(n) for n, arm in enumerate(networks)}
    assert not any("contended" in of for of in found.values())
    said = "The machine was not quiet while speed was measured: other processes used 12% of a core; the range is 31% (limit 5%)."
    assert speed.notes == [said]
