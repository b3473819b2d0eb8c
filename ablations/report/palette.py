"""One look an arm: colour, marker and dash, the same in every figure and in the tables."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ablations.answer.records import GridOutcome
from ablations.answer.stats import Analysis
from ablations.answer.verdict import arms_of, baseline_of, metric_label

INK, MUTED, RULE, PAPER = "#1f2328", "#667080", "#d5d9df", "#ffffff"
# Okabe & Ito's colour-blind safe set, the baseline in ink; each with the lighter twin used on a dark page.
HUES = (INK, "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DARK_HUES = ("#eceff3", "#4ba3dc", "#f0894a", "#2fc79a", "#e39cc5", "#f2bc4b", "#9ad7f7")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 3)))
LABELLED = 8  # up to this many arms a figure names each point; beyond it gives the row number of the table
DRAWN = 40  # up to this many arms a report draws each; of more, the baseline and the best


@dataclass(frozen=True)
class ArmStyle:
    """How an arm is drawn; ``number`` is its row in the key table, from 1."""

    number: int
    hue: int
    marker: str
    dash: object

    @property
    def colour(self) -> str:
        """The colour on paper."""
        return HUES[self.hue]


def arm_styles(outcome: GridOutcome) -> dict[str, ArmStyle]:
    """Style of each arm, the baseline first.

    With two axes of at most six values the colour tells the first and marker and dash tell the second; else each arm
    takes the next colour, and the next marker and dash when the colours are used up.
    """
    arms, baseline = arms_of(outcome), baseline_of(outcome)
    axes = list(outcome.axes)
    if len(axes) == 2 and len(arms) > 2:
        seen: list[dict[str, int]] = [{}, {}]
        places = []
        for trials in arms.values():
            place = [s.setdefault(str(trials[0].values.get(axis)), len(s)) for s, axis in zip(seen, axes, strict=True)]
            places.append(place)
        if len(seen[0]) < len(HUES) and len(seen[1]) <= len(DASHES):
            return {
                arm: ArmStyle(i + 1, first, MARKERS[second], DASHES[second])
                for i, (arm, (first, second)) in enumerate(zip(arms, places, strict=True))
            }
    styles, rank = {}, 0
    for i, arm in enumerate(arms):
        if arm == baseline:
            styles[arm] = ArmStyle(i + 1, 0, MARKERS[0], DASHES[0])
            continue
        turn, hue = divmod(rank, len(HUES) - 1)
        # Markers change with every arm, so that a figure can be read without its colours.
        styles[arm] = ArmStyle(i + 1, hue + 1, MARKERS[(rank + 1) % len(MARKERS)], DASHES[turn % len(DASHES)])
        rank += 1
    return styles


def drawn_arms(outcome: GridOutcome, analysis: Analysis) -> list[str]:
    """The arms that figures draw one by one, in the order of the records: all, or the baseline and the best of many."""
    arms, sign = list(arms_of(outcome)), 1 if analysis.better == "lower" else -1
    if len(arms) <= DRAWN:
        return arms
    means = {arm: analysis.arms[arm].mean for arm in arms if arm != analysis.baseline}
    ranked = sorted(means, key=lambda arm: math.inf if means[arm] is None else sign * means[arm])
    chosen = {analysis.baseline, *ranked[: DRAWN - 1]}
    return [arm for arm in arms if arm in chosen]


def left_out(outcome: GridOutcome, analysis: Analysis) -> str:
    """A sentence on the arms that ``drawn_arms`` leaves out; empty when it leaves out none."""
    count, drawn = len(arms_of(outcome)), len(drawn_arms(outcome, analysis))
    if count == drawn:
        return ""
    return f" Of {count} arms the baseline and the best {drawn - 1} in {metric_label(analysis.metric)} are drawn."


def css_variables() -> tuple[str, str]:
    """CSS declarations of the hues on a light and on a dark page."""
    light, dark = ("".join(f"--hue-{i}:{hue};" for i, hue in enumerate(hues)) for hues in (HUES, DARK_HUES))
    return light, dark
