"""From a grid's records to the answer: every arm against the baseline, and what that says of the claim.

A claim is a sentence; what is tested is written down beside it. ``decide.expect`` maps an arm (its name, or the value
of an axis) to what the claim says of it compared with the baseline: better, worse, equivalent, not better, not worse.
Without it the claim is read as "no arm is better than the baseline".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ablations.answer import stats
from ablations.answer.intervals import level_of, seeds_needed
from ablations.answer.records import GridOutcome, TrialRecord
from ablations.answer.stats import Analysis
from ablations.question.decide import EXPECTATIONS, SPEED, fraction
from ablations.question.registration import SEEDS_ADDED

SUPPORTED, REFUTED, WITHIN_NOISE = "supported", "refuted", "within noise"
NOT_ENOUGH_SEEDS, NOT_COMPARABLE = "not enough seeds", "not comparable"
# What a claim says of an arm -> the words that confirm it, and those that contradict it.
BEARING = {
    "better": ({stats.BETTER}, {stats.NOT_BETTER, stats.EQUIVALENT, stats.WORSE}),
    "worse": ({stats.WORSE}, {stats.NOT_WORSE, stats.EQUIVALENT, stats.BETTER}),
    "equivalent": ({stats.EQUIVALENT}, {stats.BETTER, stats.WORSE}),
    "not better": ({stats.NOT_BETTER, stats.EQUIVALENT, stats.WORSE}, {stats.BETTER}),
    "not worse": ({stats.NOT_WORSE, stats.EQUIVALENT, stats.BETTER}, {stats.WORSE}),
}
# What no seed changes; of it one measurement is there, or a calculation.
MEASURED_ONCE = (*SPEED, "params_m", "gflops")
HIGHER_IS_BETTER = ("clip_score", "accuracy_", "heldout_accuracy_", "precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class ClaimVerdict:
    """The answer to a grid's question."""

    word: str  # supported | refuted | within noise | not enough seeds | not comparable
    sentence: str  # one plain sentence
    sureness: str  # how sure, and what this design could have seen
    reading: str  # how the claim was read
    answers: dict[str, str]  # arm -> confirmed | contradicted | undecided | no seeds | no value


def better_direction(metric: str) -> str:
    """ "higher" for scores, accuracies and speeds, "lower" for every other measure."""
    return "higher" if metric.startswith(HIGHER_IS_BETTER) else "lower"


def metric_label(metric: str) -> str:
    """A metric's name in a sentence: "FID", "CLIP score", "colour accuracy"."""
    if metric in ("fid", "kid"):
        return metric.upper()
    heldout, name = metric.startswith("heldout_"), metric.removeprefix("heldout_")
    if name.startswith("accuracy_"):
        skill = name.removeprefix("accuracy_")
        what = "accuracy in all skills" if skill == "all" else f"{skill} accuracy"
        return f"{what}{' on held-out pairs' if heldout else ''}"
    return {"clip_score": "CLIP score"}.get(metric) or metric.removesuffix("_ms").removesuffix("_mb").replace("_", " ")


def arms_of(outcome: GridOutcome) -> dict[str, list[TrialRecord]]:
    """Trials by arm, the baseline first, then in the order of the records; seeds ascending."""
    arms: dict[str, list[TrialRecord]] = {}
    for record in sorted(outcome.records, key=lambda r: not r.baseline):
        arms.setdefault(record.arm, []).append(record)
    return {arm: sorted(trials, key=lambda r: r.seed) for arm, trials in arms.items()}


def baseline_of(outcome: GridOutcome) -> str:
    """The baseline arm's name. Raises ValueError when no record is one."""
    for record in outcome.records:
        if record.baseline:
            return record.arm
    raise ValueError(f"grid {outcome.name} has no baseline trial among its {len(outcome.records)} records")


def analyse_outcome(outcome: GridOutcome, metric: str | None = None) -> Analysis:
    """Compares the arms of a grid in one metric (default: ``decide.metric``)."""
    name = metric or str(outcome.decide["metric"])
    arms = arms_of(outcome)
    decided = name == outcome.decide.get("metric")
    better = str(outcome.decide.get("better", better_direction(name))) if decided else better_direction(name)
    done = {arm: [t for t in trials if t.state == "done"] for arm, trials in arms.items()}
    judge = next(iter(arms.values()))[0].settings.get("judge")  # figures of two judges are not compared
    done = {arm: [t for t in trials if t.settings.get("judge") == judge] for arm, trials in done.items()}
    if name in MEASURED_ONCE:
        return _measured(done, outcome, name, better)
    return stats.analyse(
        {arm: {t.seed: t.metrics.get(name) for t in trials} for arm, trials in done.items()},
        baseline_of(outcome),
        metric=name,
        better=better,
        practical=fraction(outcome.decide.get("practical", 0.0)),
        errors={
            arm: {t.seed: t.metrics[f"{name}_se"] for t in trials if t.metrics.get(f"{name}_se") is not None}
            for arm, trials in done.items()
        },
        failed=[arm for arm, trials in done.items() if not trials],
        look=looks(outcome.registration),
    )


def looks(registration: Mapping[str, Any] | None) -> int:
    """How often a question's data were looked at while seeds were added, by its registration; one seed shows nothing."""
    if registration is None:
        return 1
    added = sum(entry["what"].startswith(SEEDS_ADDED) for entry in registration["departures"])
    return max(1, added + (len(registration["question"]["seeds"]) >= 2))


def _measured(done: dict[str, list[TrialRecord]], outcome: GridOutcome, name: str, better: str) -> Analysis:
    """Speed and memory belong to a network: all trials of an arm carry the same figures."""
    baseline = baseline_of(outcome)
    known = {arm: trials[0].metrics if trials else {} for arm, trials in done.items()}
    values = {arm: metrics.get(name) for arm, metrics in known.items()}
    ratios, base = {}, values[baseline]
    for arm, metrics in known.items():
        if name.startswith("latency"):
            ends = (metrics.get("latency_ratio_low"), metrics.get("latency_ratio_high"))
        else:
            ends = (values[arm] / base,) * 2 if values[arm] and base else (None, None)
        if None not in ends:
            ratios[arm] = ends
    return stats.analyse_measured(
        values,
        ratios,
        baseline,
        metric=name,
        better=better,
        practical=fraction(outcome.decide.get("practical", 0.0)),
        failed=[arm for arm, trials in done.items() if not trials],
    )


def expectations(outcome: GridOutcome) -> dict[str, str]:
    """What the claim says of each arm against the baseline. Raises ValueError for a word or an arm that is unknown."""
    baseline = baseline_of(outcome)
    given: Mapping[str, Any] = outcome.decide.get("expect") or {}
    named = {arm: {arm, *(str(v) for v in trials[0].values.values())} for arm, trials in arms_of(outcome).items()}
    for key, word in given.items():
        if word not in EXPECTATIONS:
            raise ValueError(f"decide.expect.{key} must be one of {', '.join(EXPECTATIONS)}, got {word!r}")
        if not any(str(key) in names for names in named.values()):
            raise ValueError(f"decide.expect names {key!r}, which is none of the arms: {', '.join(named)}")
    expected = {}
    for arm, names in named.items():
        if arm == baseline:
            continue
        words = [word for key, word in given.items() if str(key) == arm] or [
            w for k, w in given.items() if str(k) in names
        ]
        if words or not (given or outcome.decide.get("untested")):
            expected[arm] = words[0] if words else "not better"
    return expected


def _answer(analysis: Analysis, arm: str, expected: str) -> str:
    """Whether one arm bears the claim out: by the word for it and nothing else, so that table and claim cannot differ."""
    word = analysis.comparisons[arm].verdict
    if word == stats.NOT_ENOUGH_SEEDS:
        return "no seeds"
    if word == stats.NOT_ENOUGH_ROUNDS:
        return "undecided"
    if word in (stats.FAILED, stats.NOT_COMPARABLE):
        return "no value"
    confirmed, contradicted = BEARING[expected]
    return "confirmed" if word in confirmed else "contradicted" if word in contradicted else "undecided"


def _listing(names: list[str], most: int = 4) -> str:
    shown = names if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _reading(outcome: GridOutcome, expected: dict[str, str], analysis: Analysis) -> str:
    by_word: dict[str, list[str]] = {}
    for arm, word in expected.items():
        by_word.setdefault(word, []).append(arm)
    parts = [
        f"{_listing(arms)} {'is' if len(arms) == 1 else 'are'} {_than(word)} {analysis.baseline}"
        for word, arms in by_word.items()
    ]
    if not expected:
        parts = ["it says nothing of the arms of this run"]
    elif not outcome.decide.get("expect"):
        parts = [f"no arm is better than {analysis.baseline}"]
    practical = 100 * fraction(outcome.decide.get("practical", 0.0))
    return (
        f"The claim was read as: in {metric_label(analysis.metric)}, {'; '.join(parts)}. Better and worse mean by more than "
        f"{practical:.3g}%, equivalent by less. Costs are reported beside it and take no part in this verdict."
    )


def _than(word: str) -> str:
    return f"{word} to" if word == stats.EQUIVALENT else f"{word} than"


def _sentence(word: str, groups: dict[str, list[str]], analysis: Analysis) -> str:
    base, metric = analysis.baseline, metric_label(analysis.metric)
    if word == REFUTED:
        found: dict[str, list[str]] = {}
        for arm in groups["contradicted"]:
            found.setdefault(analysis.comparisons[arm].verdict, []).append(arm)
        parts = [f"{_listing(arms)} {'is' if len(arms) == 1 else 'are'} {_than(v)} {base}" for v, arms in found.items()]
        return f"Against the claim, in {metric} {_listing(parts)}."
    if word == SUPPORTED:
        return f"In {metric} every arm stands to {base} as the claim says."
    if word == NOT_ENOUGH_SEEDS:
        means = {arm: summary.mean for arm, summary in analysis.arms.items() if summary.mean is not None}
        best = (min if analysis.better == "lower" else max)(means, key=lambda arm: means[arm])
        return (
            f"The {'lowest' if analysis.better == 'lower' else 'highest'} {metric} observed is that of {best}, but one "
            "trained network an arm cannot tell a better arm from a lucky seed."
        )
    if word == WITHIN_NOISE:
        rivals = _listing(groups["undecided"])
        return f"In {metric} the noise of this design is too large to say how {rivals} compare{'s' if len(groups['undecided']) == 1 else ''} with {base}."
    if analysis.arms[base].mean is None:
        return f"The baseline {base} has no {metric}, so nothing can be compared with it."
    missing = groups["no value"]
    return (
        f"The claim was not tested in full: no {metric} from {_listing(missing)}."
        if missing
        else f"Nothing was trained beside {base}, so there is nothing to compare."
    )


def _untested(outcome: GridOutcome, groups: Mapping[str, list[str]]) -> str:
    """Of a claim about arms that this run does not have."""
    absent = _listing([str(name) for name in outcome.decide["untested"]])
    text = f"The claim was not tested in full: it speaks of {absent}, which this run does not have."
    borne = groups.get("confirmed", [])
    return f"{text} As far as {_listing(borne)} it is borne out." if borne else text


def _sureness(outcome: GridOutcome, analysis: Analysis) -> str:
    """How sure the verdict is: seeds, noise, the gap this design could have seen, and what would settle it."""
    noise = analysis.noise
    if noise.method == "rounds":
        return (
            "Measured on one network an arm, since no seed changes it. Times are taken in interleaved rounds, and the interval "
            "is that of the median ratio of a round (99% each). Other figures are exact. They hold for this machine."
        )
    if noise.sd is None or noise.range is None:
        return (
            "With one seed an arm there is no estimate of how far retraining alone moves the result; intervals hold "
            "sampling error only. Train at least three seeds an arm."
        )
    size = 1.0 if analysis.scale == "log" else abs(analysis.arms[analysis.baseline].mean or 0.0) or 1.0
    spread = "one standard deviation"
    if noise.method == "paired":
        spread += ", beside what all arms share at equal seeds"
    known = " to ".join(f"{100 * sd / size:.2g}" for sd in noise.range)
    text = f"{analysis.seeds} seeds an arm; retraining moves {metric_label(analysis.metric)} by "
    text += f"{100 * noise.sd / size:.2g}% ({spread}; by so few trials it is known as {known}%)"
    if analysis.look > 1:
        text += (
            f". Seeds were added after a look: at look {analysis.look} all intervals together are at "
            f"{100 * (1 - level_of(analysis.look)):.4g}%"
        )
    gap = analysis.detectable()
    if gap is None:
        return f"{text}."
    low, high = (100 * (analysis.detectable(sd) or 0.0) / size for sd in noise.range)
    text += (
        f". This design decides gaps of {100 * gap / size:.3g}% or more (80% power; {low:.3g} to {high:.3g}%, as the "
    )
    text += f"noise is known){_advice(analysis, size)}"
    return f"{text}."


def _advice(analysis: Analysis, size: float) -> str:
    """Seeds with which a gap of twice the margin would be decided, with a range as the noise is known; "" if it is."""
    noise, margin = analysis.noise, analysis.working_margin
    count = 1 + sum(bool(c.seeds) for c in analysis.comparisons.values())
    if not margin or noise.range is None:
        return ""
    least, needed, most = (
        seeds_needed(sd, margin, max(count, 2), noise.method == "paired")
        for sd in (noise.range[0], noise.sd or 0.0, noise.range[1])
    )
    target = math.expm1(2 * margin) if analysis.scale == "log" else 2 * margin / size
    if needed is None:
        return f"; to decide {100 * target:.3g}%, more than 50 seeds an arm would be needed"
    if needed <= analysis.seeds:
        return ""
    return f"; to decide {100 * target:.3g}%, train about {needed} seeds an arm ({least} to {most or 'more than 50'})"


def judge_outcome(outcome: GridOutcome, analysis: Analysis | None = None) -> ClaimVerdict:
    """The verdict on the grid's claim.

    Refuted when one arm surely contradicts it, supported when every arm surely bears it out, "not enough seeds" when an
    arm has a single seed, "not comparable" when an arm (or the baseline) has no value, else "within noise".
    """
    analysis = analysis or analyse_outcome(outcome)
    expected = expectations(outcome)
    answers = {arm: _answer(analysis, arm, word) for arm, word in expected.items()}
    groups: dict[str, list[str]] = {}
    for arm, answer in answers.items():
        groups.setdefault(answer, []).append(arm)
    if "contradicted" in groups:
        word = REFUTED
    elif answers and set(groups) == {"confirmed"}:
        word = NOT_COMPARABLE if outcome.decide.get("untested") else SUPPORTED
    elif "no seeds" in groups:
        word = NOT_ENOUGH_SEEDS
    elif "undecided" in groups:
        word = WITHIN_NOISE
    else:
        word = NOT_COMPARABLE
    groups.setdefault("no value", [])
    return ClaimVerdict(
        word,
        _untested(outcome, groups)
        if word == NOT_COMPARABLE and outcome.decide.get("untested")
        else _sentence(word, groups, analysis),
        _sureness(outcome, analysis),
        _reading(outcome, expected, analysis),
        answers,
    )
