"""Intervals, verdicts and claims: known values, and simulations of what they promise."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from ablations.answer import stats, verdict
from ablations.answer.records import GridOutcome, TrialRecord

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


def test_pooled_variance_by_hand() -> None:
    variance, df = stats.pooled_variance([[1, 3], [10, 10, 13], [7]])
    assert df == 3
    assert variance == pytest.approx((2 + 6) / 3)
    assert stats.pooled_variance([[1], [2]]) == (None, 0)


def test_two_arms_give_the_textbook_t_interval() -> None:
    # Pooled two-sample t, df 4: t(0.975) = 2.776445; variances 1 and 1, difference -3.
    result = stats.analyse({"base": {0: 4.0, 1: 5.0, 2: 6.0}, "a": {5: 1.0, 6: 2.0, 7: 3.0}}, "base", scale="linear")
    comparison = result.comparisons["a"]
    half = 2.776445 * math.sqrt(2 / 3)
    assert (comparison.low, comparison.high) == pytest.approx((-3 - half, -3 + half), rel=1e-5)
    assert comparison.p_value == pytest.approx(0.02131, abs=2e-5)
    assert (comparison.verdict, comparison.method, result.noise.df) == ("better", "pooled", 4)


def test_pairing_gives_the_paired_t_interval() -> None:
    # Differences 1.0, 1.2, 0.8, 1.0: mean 1, sd 0.163299, df 3: t(0.975) = 3.182446.
    base = {0: 10.0, 1: 20.0, 2: 30.0, 3: 40.0}
    other = {0: 11.0, 1: 21.2, 2: 30.8, 3: 41.0}
    result = stats.analyse({"base": base, "a": other}, "base", scale="linear", practical=0.0)
    half = 3.182446 * 0.163299 / 2
    comparison = result.comparisons["a"]
    assert comparison.method == "paired"
    assert (comparison.low, comparison.high) == pytest.approx((1 - half, 1 + half), rel=1e-4)
    assert result.noise.correlation == pytest.approx(0.9999, abs=1e-4)


@pytest.mark.parametrize(
    ("seeds", "arms", "comparisons", "percent"),
    [
        (2, 2, 1, 7.4),
        (3, 2, 1, 4.0),
        (5, 2, 1, 2.6),
        (2, 6, 1, 4.4),
        (3, 6, 1, 3.2),
        (2, 6, 5, 6.2),
        (3, 6, 5, 4.2),
        (5, 6, 5, 3.0),
    ],
)
def test_detectable_gap_agrees_with_the_published_simulation(
    seeds: int, arms: int, comparisons: int, percent: float
) -> None:
    gap = stats.detectable_gap(1.3 * math.sqrt(2 / seeds), arms * (seeds - 1), comparisons)
    assert gap == pytest.approx(percent, rel=0.04)


@pytest.mark.parametrize("shared", [0.0, 0.03])
def test_intervals_cover_together(shared: float) -> None:
    """All five intervals hold the truth at once in at least 95 % of grids, with and without a shared seed effect."""
    generator = np.random.default_rng(1)
    shifts = {arm: 0.02 * i for i, arm in enumerate(ARMS)}
    hits = 0
    for _ in range(400):
        result = stats.analyse(draw(generator, shifts, 3, shared=shared), "base")
        hits += all(c.low <= math.expm1(shifts[arm]) <= c.high for arm, c in result.comparisons.items())
    assert 0.93 <= hits / 400 <= 0.995  # Bonferroni: a little above 95 %; sampling error of the rate: 0.011


def test_the_detectable_gap_is_seen_four_times_in_five() -> None:
    generator = np.random.default_rng(2)
    gap = stats.detectable_gap(0.013 * math.sqrt(2 / 3), 12, 5)
    found = sum(
        stats.analyse(draw(generator, dict.fromkeys(ARMS, 0.0) | {"a": gap}, 3), "base", practical=0.0)
        .comparisons["a"]
        .verdict
        == "worse"
        for _ in range(400)
    )
    assert 0.74 <= found / 400 <= 0.87


def test_seed_noise_alone_seldom_makes_a_difference() -> None:
    generator = np.random.default_rng(3)
    wrong = sum(
        any(
            c.verdict in ("better", "worse")
            for c in stats.analyse(
                draw(generator, dict.fromkeys(ARMS, 0.0), 3), "base", practical=0.0
            ).comparisons.values()
        )
        for _ in range(400)
    )
    assert wrong / 400 <= 0.075


def test_pairing_is_used_where_it_pays() -> None:
    generator = np.random.default_rng(4)
    paired = stats.analyse(draw(generator, dict.fromkeys(ARMS, 0.0), 4, sd=0.002, shared=0.05), "base")
    assert paired.noise.method == "paired" and paired.noise.correlation > 0.9
    methods = [stats.analyse(draw(generator, dict.fromkeys(ARMS, 0.0), 3), "base").noise.method for _ in range(200)]
    assert methods.count("paired") <= 24


def test_unequal_spreads_are_not_pooled() -> None:
    values = {"base": {0: 40.0, 1: 40.1, 2: 39.9, 3: 40.05}, "a": {0: 20.0, 1: 60.0, 2: 35.0, 3: 90.0}}
    result = stats.analyse(values, "base")
    assert result.comparisons["a"].method == "unequal" and result.comparisons["a"].verdict == "within noise"


def test_words() -> None:
    assert stats.verdict_word(-0.04, 0.04, 0.05, "lower") == "equivalent"
    assert stats.verdict_word(-0.3, -0.1, 0.05, "lower") == "better"
    assert stats.verdict_word(-0.3, -0.1, 0.05, "higher") == "worse"
    assert stats.verdict_word(-0.1, 0.2, 0.05, "lower") == "within noise"


def test_one_seed_is_never_a_verdict() -> None:
    result = stats.analyse({"base": {0: 40.0}, "a": {0: 10.0}}, "base", errors={"base": {0: 0.4}, "a": {0: 0.1}})
    comparison = result.comparisons["a"]
    assert comparison.verdict == "not enough seeds" and comparison.method == "sampling"
    assert comparison.difference == pytest.approx(-0.75)
    assert comparison.low == pytest.approx(0.25 * math.exp(-1.959964 * math.hypot(0.01, 0.01)) - 1)
    assert result.detectable is None and result.arms["a"].sampling_only
    bare = stats.analyse({"base": {0: 40.0}, "a": {0: 10.0}}, "base").comparisons["a"]
    assert (bare.low, bare.difference) == (None, pytest.approx(-0.75))


def test_a_single_seed_among_many_is_shown_but_not_judged() -> None:
    result = stats.analyse({"base": {0: 40.0, 1: 40.4}, "a": {0: 10.0, 1: None}}, "base")
    assert result.comparisons["a"].verdict == "not enough seeds" and result.comparisons["a"].low is not None


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


def test_expectations_are_checked() -> None:
    values = {"base": spread(40), "a": spread(60)}
    with pytest.raises(ValueError, match="must be one of better"):
        verdict.judge_outcome(outcome(values, {"metric": "fid", "expect": {"a": "great"}}))
    with pytest.raises(ValueError, match="none of the arms"):
        verdict.judge_outcome(outcome(values, {"metric": "fid", "expect": {"z": "worse"}}))
    with pytest.raises(ValueError, match="decide.practical"):
        verdict.judge_outcome(outcome(values, {"metric": "fid", "practical": "much"}))


def test_seeds_needed_reaches_the_gap() -> None:
    needed = stats.seeds_needed(0.013, 0.03, 6, 5)
    assert needed == 5 or needed == 6
    assert stats.seeds_needed(0.5, 0.001, 6, 5) is None
