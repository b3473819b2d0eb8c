"""Successive halving of a large grid: short trials first, of which the better arms go on (Jamieson & Talwalkar 2016).

A rung's trials are trials like any other, with fewer steps and a schedule that ends with them; they have keys of their own
and are reused. What is dropped, and why, is told in the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ablations.question.grid import Arm, trials_of
from ablations.question.plan import Plan
from iris.errors import SettingError
from iris.io.files import read_json

SURE = 2.0  # standard errors beyond the last arm that stays, from which an arm is clearly worse


@dataclass(frozen=True)
class Halving:
    """Settings grid.halving.

    Attributes:
        rungs: short rounds before the whole trials.
        keep: share of the arms that a rung keeps; the steps of the rungs grow by its inverse up to train.steps.

    Raises:
        SettingError: a value out of its range.
    """

    rungs: int = 2
    keep: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.rungs, int) or not 1 <= self.rungs <= 8:
            raise SettingError(f"grid.halving.rungs={self.rungs} must be a whole number from 1 to 8")
        if not 0 < self.keep < 1:
            raise SettingError(f"grid.halving.keep={self.keep} must lie between 0 and 1")


def halving_of(given: dict[str, Any] | None) -> Halving | None:
    """The settings, or None: no halving.

    Raises:
        SettingError: an unknown key or a value out of its range.
    """
    if given is None:
        return None
    unknown = given.keys() - {"rungs", "keep"}
    if unknown:
        raise SettingError(f"grid.halving.{min(unknown)} is not a setting; allowed: rungs, keep")
    return Halving(**given)


def rung_plan(plan: Plan, seeds: list[int], fraction: float) -> Plan:
    """A plan's arms with a fraction of their steps."""
    arms = [replace(arm, settings=_shortened(arm.settings, fraction)) for arm in plan.arms]
    return replace(plan, arms=arms, trials=trials_of(arms, seeds, plan.facts))


def _shortened(settings: dict[str, Any], fraction: float) -> dict[str, Any]:
    steps = max(1, round(settings["train"]["steps"] * fraction))
    return settings | {"train": settings["train"] | {"steps": steps}}


def survivors(plan: Plan, decide: dict[str, Any], keep: float) -> tuple[list[Arm], str]:
    """The arms of a finished rung that go on, and in words what was dropped.

    The baseline stays, as do the best ``keep`` of the others, and each whose distance to the last of these is within
    ``SURE`` standard errors of sampling. An arm without a result is dropped.
    """
    metric, sign = decide["metric"], 1 if decide["better"] == "lower" else -1
    scores = {arm.name: _score(plan, arm, metric) for arm in plan.arms}
    rivals = sorted(
        (arm for arm in plan.arms if not arm.baseline and scores[arm.name]), key=lambda arm: sign * scores[arm.name][0]
    )
    kept = rivals[: math.ceil(keep * len(rivals))]
    if kept:
        edge, edge_error = scores[kept[-1].name]
        kept += [
            arm
            for arm in rivals[len(kept) :]
            if sign * (scores[arm.name][0] - edge) <= SURE * math.hypot(scores[arm.name][1], edge_error)
        ]
    names = {arm.name for arm in kept}
    dropped = [arm for arm in plan.arms if not arm.baseline and arm.name not in names]
    return [arm for arm in plan.arms if arm.baseline or arm.name in names], ", ".join(
        _told(arm, scores, metric) for arm in dropped
    )


def _told(arm: Arm, scores: dict[str, tuple[float, float] | None], metric: str) -> str:
    score = scores[arm.name]
    return f"{arm.name} ({metric} {score[0]:.3g})" if score else f"{arm.name} (no result)"


def _score(plan: Plan, arm: Arm, metric: str) -> tuple[float, float] | None:
    """Mean over an arm's seeds and its standard error, of sampling alone where there is one seed."""
    found = [read_json(plan.folder(trial) / "result.json") for trial in plan.trials if trial.arm == arm.name]
    metrics = [
        result["metrics"] for result in found if result and math.isfinite(result["metrics"].get(metric, math.nan))
    ]
    if not metrics:
        return None
    values = [each[metric] for each in metrics]
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, float(metrics[0].get(f"{metric}_se", 0.0))
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, spread / math.sqrt(len(values))


def halve(
    plan: Plan, seeds: list[int], decide: dict[str, Any], halving: Halving, run: Callable[[Plan, str], None]
) -> Iterator[tuple[Plan, str]]:
    """Run the rungs; yields after each the plan of what is left, whole, and what to say of the rung.

    ``run(plan, name)`` runs the trials of a rung and returns when they have ended.
    """
    for rung in range(halving.rungs):
        fraction = halving.keep ** (halving.rungs - rung)
        short = rung_plan(plan, seeds, fraction)
        run(short, f"rung {rung + 1} of {halving.rungs}")
        arms, dropped = survivors(short, decide, halving.keep)
        names = {arm.name for arm in arms}
        plan = replace(
            plan,
            arms=[arm for arm in plan.arms if arm.name in names],
            trials=[trial for trial in plan.trials if trial.arm in names],
        )
        yield (
            plan,
            (
                f"Successive halving, rung {rung + 1} of {halving.rungs}, {fraction:.0%} of the steps: {len(arms)} of "
                f"{len(short.arms)} arms went on (the baseline, the best {halving.keep:.0%} of the others, and what lies within "
                f"{SURE:g} standard errors of the last of these)" + (f"; dropped: {dropped}." if dropped else ".")
            ),
        )
