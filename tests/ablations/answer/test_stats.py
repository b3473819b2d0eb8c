"""Intervals, verdicts and claims: known values, and simulations of what they promise."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as quantiles

from ablations.answer import intervals, stats, verdict
from ablations.answer.records import GridOutcome, TrialRecord
from benchmarks import error_rates

ARMS = ["base", "a", "b", "c", "d", "e"]


def draw(
    generator: np.random.Generator, shifts: dict[str, float], seeds: int, sd: float = 0.013, shared: float = 0.0
) -> dict[str, dict[int, float]]:
    """FID-like values: exp(shift + seed effect + noise) * 40; ``shared`` is the sd of the effect common to a seed."""
    common = generator.normal(0, shared, seeds) if shared else np.zeros(seeds)
    return {
        arm: {s: 40 * math.exp(shift + common[s] + generator.normal(0, sd)) for s in range(seeds)}
        for arm, shift in shifts.items()
    }


def outcome(values: dict[str, dict[int, float | None]], decide: dict | None = None) -> GridOutcome:
    records = [
        TrialRecord(
            key=f"{arm}{seed}",
            arm=arm,
            values={"model.mixer": arm},
            seed=seed,
            baseline=arm == "base",
            state="failed" if value is None else "done",
            cached=False,
            settings={},
            curves=(f"stages/text-{arm}{seed}/metrics.jsonl",),
            model=f"stages/text-{arm}{seed}/weights",
            metrics={} if value is None else {"fid": value, "fid_se": 0.5},
            folder=Path("."),
        )
        for arm, seeds in values.items()
        for seed, value in seeds.items()
    ]
    return GridOutcome(
        "g",
        "q?",
        "c",
        "params",
        decide or {"metric": "fid", "better": "lower", "practical": "5%"},
        {"model.mixer": list(values)},
        records,
        {},
        {},
        "python -m ablations.run",
        "unknown",
        {},
    )


def test_two_arms_give_welchs_interval() -> None:
    # Variances 1 and 1, difference -3, df 4: t(0.979) = 2.926 at the level of an arm's own noise.
    result = stats.analyse({"base": {0: 4.0, 1: 5.0, 2: 6.0}, "a": {5: 1.0, 6: 2.0, 7: 3.0}}, "base", scale="linear")
    comparison = result.comparisons["a"]
    half = quantiles.t.ppf(1 - intervals.OWN / 2, 4) * math.sqrt(2 / 3)
    assert 2.9 < half / math.sqrt(2 / 3) < 2.96
    assert (comparison.low, comparison.high) == pytest.approx((-3 - half, -3 + half), rel=1e-5)
    assert (comparison.verdict, comparison.method, result.noise.df) == ("better", "pooled", 4)


def test_pairing_gives_the_interval_of_differences() -> None:
    # Differences 1.0, 1.2, 0.8, 1.0: mean 1, sd 0.163299, df 3.
    base = {0: 10.0, 1: 20.0, 2: 30.0, 3: 40.0}
    other = {0: 11.0, 1: 21.2, 2: 30.8, 3: 41.0}
    result = stats.analyse({"base": base, "a": other}, "base", scale="linear", practical=0.0)
    half = quantiles.t.ppf(1 - intervals.OWN / 2, 3) * 0.163299 / 2
    comparison = result.comparisons["a"]
    assert comparison.method == "paired"
    assert (comparison.low, comparison.high) == pytest.approx((1 - half, 1 + half), rel=1e-4)
    assert result.noise.correlation == pytest.approx(0.9999, abs=1e-4)


def test_the_critical_value_is_dunnetts_where_each_arm_has_many_seeds() -> None:
    """Four arms against one baseline, 10 seeds, 45 df: Dunnett's 5 % point is 2.53 (Bonferroni's 2.61)."""
    theirs = quantiles.dunnett(
        *np.random.default_rng(0).standard_normal((4, 10)), control=np.random.default_rng(1).standard_normal(10)
    )
    theirs = theirs.confidence_interval(0.95)
    ours = intervals.Design((10,) * 5).critical
    assert ours == pytest.approx(2.53, abs=0.03) and ours < quantiles.t.ppf(1 - 0.025 / 4, 45) - 0.05
    table = np.stack([np.random.default_rng(1).standard_normal(10), *np.random.default_rng(0).standard_normal((4, 10))])
    half = intervals.widths(table[None], False).error[0] * ours
    assert half == pytest.approx((theirs.high - theirs.low) / 2, rel=0.02)


@pytest.mark.parametrize(("arms", "seeds"), [(2, 3), (5, 3), (5, 10)])
@pytest.mark.parametrize("case", error_rates.CASES)
def test_false_alarms_are_rare_whatever_the_noise(case: str, arms: int, seeds: int) -> None:
    """At most 6.5 %, and 5 ± 1.5 % where noise is equal; one standard error of a rate is 0.34."""
    found = error_rates.rates(case, arms, seeds, 4000).alarms
    assert found <= 6.5 + 0.7
    if case == "equal noise":
        assert found >= 3.5 - 0.7


def registered(seeds: list[int], *added: str) -> dict:
    departures = [{"what": f"seeds added: {more}", "reason": "", "when": ""} for more in added]
    return {"question": {"seeds": seeds}, "departures": departures}


def test_seeds_that_are_added_are_further_looks_at_a_stricter_level() -> None:
    assert verdict.looks(None) == verdict.looks(registered([0])) == verdict.looks(registered([0], "1, 2")) == 1
    assert verdict.looks(registered([0, 1, 2], "3, 4", "3, 4, 5")) == 3
    values = {arm: {s: 40 * (1 + 0.01 * ((s * 7 + len(arm)) % 5)) for s in range(5)} for arm in ("base", "a", "bb")}
    once, again = (outcome(values) for _ in range(2))
    again = replace(again, registration=registered([0, 1, 2], "3, 4"))
    first, second = verdict.analyse_outcome(once), verdict.analyse_outcome(again)
    assert second.look == 2 and second.detectable() > first.detectable()
    for arm in ("a", "bb"):
        assert (
            second.comparisons[arm].high - second.comparisons[arm].low
            > first.comparisons[arm].high - first.comparisons[arm].low
        )
    said = verdict.judge_outcome(again).sureness
    assert (
        "at look 2 all intervals together are at 98.75%" in said and "look" not in verdict.judge_outcome(once).sureness
    )


def test_three_looks_give_few_false_alarms() -> None:
    """Looks at 3, 5 and 10 seeds, stopping at the first that shows a difference."""
    assert error_rates.three_looks(5, 4000) <= 6.5 + 0.7


@pytest.mark.parametrize(("arms", "seeds"), [(2, 3), (5, 2), (5, 3), (5, 10)])
def test_the_printed_gap_is_seen_four_times_in_five(arms: int, seeds: int) -> None:
    assert 75 <= error_rates.power_at_the_gap(arms, seeds, 4000) <= 85


def test_what_the_benchmark_simulates_is_what_is_printed() -> None:
    """Intervals of ``analyse`` are those of the simulation, with a seed effect and without."""
    draws = np.random.default_rng(3)
    for effect in (0.0, 3.0):
        table = draws.standard_normal((1, 4, 5)) + effect * draws.standard_normal((1, 1, 5))
        difference, half, noise = error_rates.decided(table)
        values = {arm: dict(enumerate(row)) for arm, row in zip("abcd", table[0], strict=True)}
        found = stats.analyse(values, "a", scale="linear", practical=0.0)
        got = [(c.low, c.high) for c in found.comparisons.values()]
        assert got == pytest.approx(np.stack([difference - half, difference + half], -1)[0])
        assert found.noise.sd == pytest.approx(noise[0]) and (found.noise.method == "paired") == bool(effect)


def test_pairing_is_used_where_it_pays() -> None:
    generator = np.random.default_rng(4)
    paired = stats.analyse(draw(generator, dict.fromkeys(ARMS, 0.0), 4, sd=0.002, shared=0.05), "base")
    assert paired.noise.method == "paired" and paired.noise.correlation > 0.9
    methods = [stats.analyse(draw(generator, dict.fromkeys(ARMS, 0.0), 3), "base").noise.method for _ in range(200)]
    assert methods.count("paired") <= 24


def test_a_noisy_arm_is_not_believed_for_the_others_quiet() -> None:
    values = {f"q{i}": {s: 40 + 0.1 * ((i + s) % 3) for s in range(4)} for i in range(4)}
    values |= {"a": {0: 20.0, 1: 60.0, 2: 35.0, 3: 90.0}}
    result = stats.analyse(values, "q0", practical=0.0)
    assert result.comparisons["a"].verdict == "within noise"


@pytest.mark.parametrize(
    ("low", "high", "margin", "word"),
    [
        (-0.04, 0.04, 0.05, "equivalent"),
        (0.06, 0.3, 0.05, "better"),
        (-0.3, -0.06, 0.05, "worse"),
        (0.01, 0.3, 0.05, "not worse"),  # better for sure, but perhaps by less than what matters
        (-0.3, 0.01, 0.05, "not better"),
        (-0.1, 0.2, 0.05, "within noise"),
        (-0.012, -0.008, 0.05, "equivalent"),  # surely worse, by less than what matters
        (0.1, 0.2, 0.0, "better"),
        (-0.2, -0.1, 0.0, "worse"),
        (-0.2, 0.1, 0.0, "within noise"),
        (0.0, 0.0, 0.0, "equivalent"),
    ],
)
def test_words(low: float, high: float, margin: float, word: str) -> None:
    assert stats.word_of(low, high, margin) == word


def test_a_claim_and_the_table_never_disagree() -> None:
    """No word confirms two opposite claims, and none both confirms and contradicts one."""
    words = {stats.BETTER, stats.WORSE, stats.EQUIVALENT, stats.NOT_BETTER, stats.NOT_WORSE, stats.WITHIN_NOISE}
    for expected, (confirmed, contradicted) in verdict.BEARING.items():
        assert (
            not confirmed & contradicted and confirmed | contradicted < words and stats.WITHIN_NOISE not in confirmed
        ), expected
    for one, other in (("better", "not better"), ("worse", "not worse"), ("better", "worse"), ("equivalent", "better")):
        assert not verdict.BEARING[one][0] & verdict.BEARING[other][0]
        assert verdict.BEARING[one][0] <= verdict.BEARING[other][1]


def test_one_seed_is_never_a_verdict() -> None:
    result = stats.analyse({"base": {0: 40.0}, "a": {0: 10.0}}, "base", errors={"base": {0: 0.4}, "a": {0: 0.1}})
    comparison = result.comparisons["a"]
    assert comparison.verdict == "not enough seeds" and comparison.method == "sampling"
    assert comparison.difference == pytest.approx(-0.75)
    assert comparison.low == pytest.approx(0.25 * math.exp(-1.959964 * math.hypot(0.01, 0.01)) - 1)
    assert result.detectable() is None and result.arms["a"].sampling_only
    bare = stats.analyse({"base": {0: 40.0}, "a": {0: 10.0}}, "base").comparisons["a"]
    assert (bare.low, bare.difference) == (None, pytest.approx(-0.75))


def test_a_single_seed_among_many_is_shown_but_not_judged() -> None:
    result = stats.analyse({"base": {0: 40.0, 1: 40.4}, "a": {0: 10.0, 1: None}}, "base")
    assert result.comparisons["a"].verdict == "not enough seeds" and result.comparisons["a"].low is not None


def timed(ratio: float, low: float, high: float) -> dict[str, float]:
    ends = {} if math.isnan(low) else {"latency_ratio_low": low, "latency_ratio_high": high}
    return {"latency_ms": 40 * ratio, "latency_ratio": ratio, "weights_mb": 10 * ratio} | ends


@pytest.mark.parametrize(
    ("ends", "word"),
    [
        ((0.8, 0.78, 0.82), "better"),
        ((0.97, 0.9, 1.04), "not worse"),
        ((1.0, 0.8, 1.3), "within noise"),
        ((0.8, math.nan, math.nan), "not enough rounds"),
    ],
)
def test_speed_is_judged_by_its_own_rounds(ends: tuple[float, float, float], word: str) -> None:
    """Its copies in the trials of three seeds are one measurement, not three that agree."""
    values = {arm: dict.fromkeys(range(3), 40.0) for arm in ("base", "a")}
    given = outcome(values, {"metric": "latency_ms", "better": "lower", "practical": "5%"})
    for record in given.records:
        record.metrics.update(timed(1.0, 1.0, 1.0) if record.baseline else timed(*ends))
    found = verdict.analyse_outcome(given)
    assert found.comparisons["a"].verdict == word and found.noise.sd is None
    if word != "not enough rounds":
        assert (found.comparisons["a"].low, found.comparisons["a"].high) == pytest.approx((ends[1] - 1, ends[2] - 1))
    assert "interleaved rounds" in verdict.judge_outcome(given).sureness
    assert verdict.analyse_outcome(given, "weights_mb").comparisons["a"].verdict == (
        "better" if ends[0] < 0.9 else "equivalent"
    )


def test_failed_and_missing_arms() -> None:
    result = stats.analyse({"base": {0: 40.0, 1: 41.0}, "a": {}, "b": {0: math.nan, 1: None}}, "base", failed=["a"])
    assert (result.comparisons["a"].verdict, result.comparisons["b"].verdict) == ("failed", "not comparable")
    gone = stats.analyse({"base": {}, "a": {0: 1.0, 1: 2.0}}, "base", failed=["base"])
    assert gone.comparisons["a"].verdict == "not comparable"


@pytest.mark.parametrize("wrong", [{"better": "smaller"}, {"scale": "ln"}, {"practical": -1.0}])
def test_bad_settings_are_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match="better|scale|practical"):
        stats.analyse({"base": {0: 1.0}}, "base", **wrong)
    with pytest.raises(ValueError, match="none of the arms"):
        stats.analyse({"base": {0: 1.0}}, "other")


def spread(centre: float, seeds: int = 3) -> dict[int, float | None]:
    return {s: centre * (1 + 0.005 * (s - 1)) for s in range(seeds)}


@pytest.mark.parametrize(
    ("values", "expect", "word"),
    [
        ({"base": spread(40), "a": spread(60)}, None, "supported"),
        ({"base": spread(40), "a": spread(20)}, None, "refuted"),
        ({"base": spread(40), "a": spread(40)}, None, "supported"),  # equivalent is not better
        ({"base": spread(40), "a": spread(40)}, {"a": "worse"}, "refuted"),
        ({"base": spread(40), "a": spread(40)}, {"a": "equivalent"}, "supported"),
        ({"base": spread(40), "a": {0: 30.0, 1: 45.0, 2: 42.0}}, None, "within noise"),
        ({"base": spread(40, 1), "a": spread(60, 1)}, None, "not enough seeds"),
        ({"base": spread(40), "a": {0: None, 1: None}}, None, "not comparable"),
        ({"base": {0: None}, "a": spread(40)}, None, "not comparable"),
        ({"base": spread(40)}, None, "not comparable"),
    ],
)
def test_claims(values: dict, expect: dict | None, word: str) -> None:
    decide = {"metric": "fid", "better": "lower", "practical": 0.05} | ({"expect": expect} if expect else {})
    answer = verdict.judge_outcome(outcome(values, decide))
    assert answer.word == word
    assert answer.sentence.endswith(".") and answer.reading and answer.sureness


def test_a_claim_about_arms_that_are_not_there_is_not_supported() -> None:
    values = {"base": spread(40), "a": spread(60)}
    part = {"metric": "fid", "expect": {"a": "worse"}, "untested": ["b", "c"]}
    answer = verdict.judge_outcome(outcome(values, part))
    assert answer.word == "not comparable" and answer.answers == {"a": "confirmed"}
    assert "it speaks of b and c, which this run does not have. As far as a it is borne out." in answer.sentence
    nothing = verdict.judge_outcome(outcome(values, {"metric": "fid", "expect": {}, "untested": ["attn"]}))
    assert nothing.word == "not comparable" and nothing.answers == {} and "says nothing of the arms" in nothing.reading
    refuted = verdict.judge_outcome(outcome(values, part | {"expect": {"a": "better"}}))
    assert refuted.word == "refuted"


def test_expectations_are_checked() -> None:
    values = {"base": spread(40), "a": spread(60)}
    with pytest.raises(ValueError, match="must be one of better"):
        verdict.judge_outcome(outcome(values, {"metric": "fid", "expect": {"a": "great"}}))
    with pytest.raises(ValueError, match="none of the arms"):
        verdict.judge_outcome(outcome(values, {"metric": "fid", "expect": {"z": "worse"}}))
    with pytest.raises(ValueError, match="decide.practical"):
        verdict.judge_outcome(outcome(values, {"metric": "fid", "practical": "much"}))


def test_seeds_needed_reaches_the_gap() -> None:
    needed = intervals.seeds_needed(0.013, 0.03, 6)
    assert needed is not None and 0.013 * intervals.Design((needed,) * 6).gap <= 0.03
    assert 0.013 * intervals.Design((needed - 1,) * 6).gap > 0.03
    many = intervals.seeds_needed(0.03, 0.03, 6)
    assert many is not None and 0.03 * intervals.Design((many,) * 6).gap == pytest.approx(0.03, rel=0.1)
    assert intervals.seeds_needed(0.5, 0.001, 6) is None


def test_what_is_said_of_sureness_has_its_own_uncertainty() -> None:
    values = {"base": {0: 2.78, 1: 2.15, 2: 2.14}, "a": {0: 2.75, 1: 2.65, 2: 2.09}, "b": {0: 2.75, 1: 2.27, 2: 2.51}}
    said = verdict.judge_outcome(outcome(values)).sureness
    assert "retraining moves FID by 13%" in said and "known as 9.2 to 26%" in said
    gap = 100 * stats.analyse(values, "base").detectable()
    assert f"decides gaps of {gap:.3g}% or more" in said and gap > 5 and "more than 50 seeds" in said
