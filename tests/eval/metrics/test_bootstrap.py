import math

import numpy as np
import pytest
import torch
from scipy import stats

from eval.metrics.bootstrap import REFUSED, bootstrap_interval, jackknife_interval, paired_difference, wilson_interval
from eval.metrics.fid import FeatureStatistics, frechet_distance, frechet_jackknife
from iris.errors import SettingError


def skewed(n, seed):
    return np.random.default_rng(seed).exponential(size=n)


def test_mean_and_error_are_the_textbook_ones():
    values = skewed(400, 0)
    found = bootstrap_interval(values)
    assert found.value == pytest.approx(values.mean()) and found.n == 400 and found.method == "BCa"
    assert found.standard_error == pytest.approx(values.std(ddof=1) / 20, rel=0.05)
    assert found.low < found.value < found.high
    assert found.high - found.value > found.value - found.low  # skewed as the values are


def test_matches_scipy():
    values = skewed(60, 1)
    found = bootstrap_interval(values, resamples=2000, seed=7, confidence=0.9)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, confidence_level=0.9, method="BCa", random_state=np.random.default_rng(7)
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)


def test_covers_the_mean_as_often_as_it_says():
    intervals = [bootstrap_interval(skewed(80, 100 + i), resamples=999) for i in range(200)]
    assert 0.88 <= np.mean([each.low <= 1 <= each.high for each in intervals]) <= 0.99


def test_many_values_go_by_percentiles_and_agree():
    values = skewed(3000, 2)
    many, few = (bootstrap_interval(part, resamples=2000) for part in (values, values[:1500]))
    assert (many.method, few.method) == ("percentile", "BCa")
    error = values.std() / math.sqrt(3000)
    assert (many.low, many.high) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error
    )


def test_is_seeded_and_leaves_the_generators_alone():
    values, state = skewed(50, 3), np.random.get_state()[1].tolist()
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(torch.from_numpy(values), seed=1)
    assert bootstrap_interval(values, seed=1).low != bootstrap_interval(values, seed=2).low
    assert np.random.get_state()[1].tolist() == state


def test_images_of_one_prompt_count_once():
    means = skewed(40, 4)
    values = (means[:, None] + 0.01 * np.random.default_rng(5).normal(size=(40, 8))).ravel()
    prompts = [f"prompt {i}" for i in range(40) for _ in range(8)]
    grouped, single = bootstrap_interval(values, prompts), bootstrap_interval(values)
    assert grouped.n == 40 and single.n == 320
    assert grouped.value == pytest.approx(single.value)
    assert grouped.standard_error == pytest.approx(single.standard_error * math.sqrt(8), rel=0.15)


def test_pairing_takes_the_prompts_spread_out():
    rng = np.random.default_rng(6)
    prompt = rng.normal(size=200)
    first, second = (prompt + gain + 0.1 * rng.normal(size=200) for gain in (0.0, 0.05))
    paired = paired_difference(first, second)
    assert paired.value == pytest.approx((second - first).mean())
    assert paired.low > 0  # seen when paired,
    apart = math.hypot(*(bootstrap_interval(side).standard_error for side in (first, second)))
    assert paired.value < 1.96 * apart and paired.standard_error < 0.2 * apart  # lost when not
    swapped = paired_difference(second, first)
    assert swapped.value == pytest.approx(-paired.value)


def test_equal_values_are_said_to_be():
    found = bootstrap_interval([0.5] * 10)
    assert (found.low, found.value, found.high, found.method) == (0.5, 0.5, 0.5, "constant")


@pytest.mark.parametrize("statistic", REFUSED)
def test_refuses_fid_and_its_like(statistic):
    with pytest.raises(SettingError, match=f"'{statistic}' cannot be bootstrapped.*jackknife.*allowed here: mean"):
        bootstrap_interval(skewed(50, 0), statistic=statistic)
    with pytest.raises(SettingError, match="jackknife"):
        paired_difference(skewed(50, 0), skewed(50, 1), statistic=statistic)


def test_a_bootstrap_of_fid_would_miss_its_own_value_and_the_jackknife_does_not():
    """The reason for the refusal, shown."""
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(150, 32)))
    reference = FeatureStatistics.of(rng.normal(size=(2000, 32)))
    value, error = frechet_jackknife(features, reference)
    naive = [frechet_distance(features[rng.integers(150, size=150)], reference) for _ in range(100)]
    assert np.quantile(naive, 0.025) > value
    low, high = jackknife_interval(value, error, low=0.0)
    redraws = [frechet_distance(rng.normal(size=(150, 32)), reference) for _ in range(100)]
    assert np.mean([low <= redraw <= high for redraw in redraws]) >= 0.85


def test_jackknife_interval():
    low, high = jackknife_interval(3.0, 0.5, blocks=20)
    assert (low, high) == pytest.approx((3 - 2.093 * 0.5, 3 + 2.093 * 0.5), abs=1e-3)  # t(19), two-sided 95 %
    assert jackknife_interval(0.1, 0.5, low=0.0)[0] == 0 and jackknife_interval(0.9, 0.5, high=1.0)[1] == 1
    assert jackknife_interval(3.0, 0.5, confidence=0.5)[1] < high


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: bootstrap_interval([1.0]), "at least 2 independent values, got 1"),
        (lambda: bootstrap_interval([1.0, 2.0, 3.0], ["a", "a", "a"]), "at least 2 independent values, got 1"),
        (lambda: bootstrap_interval([1.0, math.nan]), "1 of 2 are not finite"),
        (lambda: bootstrap_interval(np.zeros((5, 2))), "features are not bootstrapped"),
        (lambda: bootstrap_interval(skewed(5, 0), ["a"]), "prompts: one for each of the 5 values"),
        (lambda: bootstrap_interval(skewed(5, 0), confidence=95), "confidence"),
        (lambda: bootstrap_interval(skewed(5, 0), resamples=10), "resamples"),
        (lambda: bootstrap_interval(skewed(5, 0), statistic="mode"), "allowed: mean"),
        (lambda: paired_difference(skewed(5, 0), skewed(6, 0)), "got 5 and 6 values"),
        (lambda: jackknife_interval(1.0, math.nan), "finite"),
        (lambda: jackknife_interval(1.0, 0.1, blocks=1), "blocks"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wilson_interval():
    low, high = wilson_interval(0.3, 10)  # Brown, Cai & DasGupta 2001: (0.108, 0.603)
    assert (low, high) == (pytest.approx(0.1078, abs=1e-4), pytest.approx(0.6032, abs=1e-4))
    assert wilson_interval(1.0, 50)[1] == 1.0 and wilson_interval(0.0, 50)[0] == 0.0
    with pytest.raises(ValueError, match="accuracy"):
        wilson_interval(30, 10)
