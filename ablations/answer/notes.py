"""Warnings that belong in a grid's report, from its settings and plan."""

from __future__ import annotations

from ablations.question.grid import expectations
from ablations.question.plan import Plan
from ablations.question.settings import Settings
from iris.stages.encoded import Encoded


def notes_of(settings: Settings, plan: Plan) -> list[str]:
    """What a reader must know before believing the figures."""
    notes, judge = [], plan.judge
    stray = expectations(settings.grid.decide, plan.arms)[1]
    if stray:
        notes.append(f"grid.decide.expect names {', '.join(stray)}, which no arm of this run is: left out.")
    if judge["worlds"] and settings.data.name not in judge["worlds"]:
        notes.append(
            f"Judge {judge['name']} was trained on {', '.join(judge['worlds'])}: on data {settings.data.name} its FID "
            "and KID show trends only."
        )
    if not judge["verified"]:
        notes.append(
            f"Judge {judge['name']}: {judge['weights_file']} is not known as a published file (sha256 "
            f"{judge['sha256']}), so what is called FID here is {judge['metric_name']}."
        )
    notes += [f"No {name}: {why}." for name, why in plan.refused.items()]
    return notes + _unusable_rows(plan)


def _unusable_rows(plan: Plan) -> list[str]:
    encoded = [stage for stage in plan.trials[0].chain.stages if isinstance(stage, Encoded)]
    found = {stage.source.split: stage.result.get("bad", []) for stage in encoded}
    return [
        f"{len(rows)} unusable rows of {split} were skipped: {', '.join(map(str, rows[:5]))}."
        for split, rows in found.items()
        if rows
    ]
