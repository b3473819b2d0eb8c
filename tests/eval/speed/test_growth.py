import math

import numpy as np
import pytest

from eval.speed.growth import ALWAYS, NEVER, crossover, fit_exponent, growth_table, measure_growth, predicted_seconds
from eval.speed.workers import Loader

SIZES = (64, 256, 1024, 4096, 16384)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.3, 2.0])
def test_a_power_is_found_exactly(power):
    fit = fit_exponent({size: 0.02 * size**power for size in SIZES}, since=1024)
    assert fit.value == pytest.approx(power) and fit.error < 1e-6 and (fit.points, fit.since) == (3, 1024)


def test_the_standard_error_is_that_of_least_squares():
    draws = np.random.default_rng(0)
    times = {size: size**1.5 * math.exp(draws.normal(0, 0.1)) for size in SIZES}
    fit = fit_exponent(times, since=64)
    x, y = np.log(SIZES), np.log(list(times.values()))
    (slope, constant), covariance = np.polyfit(x, y, 1, cov="unscaled")
    residual = y - slope * x - constant
    assert fit.value == pytest.approx(slope)
    assert fit.error == pytest.approx(math.sqrt(covariance[0, 0] * (residual**2).sum() / (len(x) - 2)))


def test_overhead_and_a_quadratic_term_pull_the_exponent_between_them():
    times = {size: 1.0 + 1e-3 * size + 1e-6 * size**2 for size in SIZES}
    assert fit_exponent(times, since=64).value < fit_exponent(times, since=1024).value < 2
    assert fit_exponent(times, since=64).error > fit_exponent(times, since=1024).error > 0.01


def test_two_sizes_are_no_fit():
    assert fit_exponent({64: 1.0, 256: 4.0}, since=64) is None
    assert fit_exponent({size: size for size in SIZES}, since=4096) is None
    assert fit_exponent(dict.fromkeys(SIZES, 0.0), since=64) is None


def test_crossover_of_a_line_and_a_parabola():
    linear, square = {size: 300.0 * size for size in SIZES}, {size: float(size * size) for size in SIZES}
    found = crossover(linear, square)
    assert found.tokens == pytest.approx(300.0)  # powers are lines in logarithms
    assert crossover(square, linear).where == NEVER and crossover(square, linear).tokens is None
    assert crossover({size: 0.5 * linear[size] for size in SIZES}, linear).where == ALWAYS
    assert crossover(linear, linear).where == NEVER


def test_the_last_crossing_counts():
    reference = dict.fromkeys(SIZES, 1.0)
    times = {64: 0.5, 256: 2.0, 1024: 2.0, 4096: 0.5, 16384: 0.1}
    assert crossover(times, reference).tokens == pytest.approx(2048.0)
    with pytest.raises(ValueError, match="common sizes"):
        crossover({64: 1.0}, {256: 1.0})
    with pytest.raises(ValueError, match="positive"):
        crossover({64: 0.0}, {64: 1.0})


def test_the_next_size_is_predicted_from_the_last_two():
    assert predicted_seconds({}, 64) == 0.0
    assert predicted_seconds({64: 2.0}, 256) == pytest.approx(32.0)  # taken for quadratic
    assert predicted_seconds({64: 2.0, 256: 8.0}, 1024) == pytest.approx(32.0)
    assert predicted_seconds({16: 9.0, 64: 2.0, 256: 32.0}, 1024) == pytest.approx(512.0)
    assert predicted_seconds({64: 2.0, 256: 2.0}, 1024) == pytest.approx(8.0)  # at least linear


def growing(power, turns, tokens):
    return Loader("measured_models:growing", {"power": power, "turns": turns, "tokens": list(tokens)})


def test_real_processes_grow_as_their_loops_do():
    tokens = (64, 256, 1024)
    curves = measure_growth(
        {"square": growing(2, 0.2, tokens), "line": growing(1, 20, tokens)}, tokens, rounds=3, warmup=0
    )
    for curve in curves.values():
        assert list(curve.latency) == list(curve.milliseconds) == list(tokens) and not curve.skipped
        assert all(one.n == 3 and one.processor_ms > 0 for one in curve.latency.values())
        # tensors of ones, of as many numbers as tokens
        assert curve.activations_mb == pytest.approx({size: 4 * size / 1e6 for size in tokens})
    assert all(fit_exponent(curve.milliseconds, since=64).points == 3 for curve in curves.values())
    table = growth_table(curves, "square", since=64)
    assert len(table) == 4 and "1,024" in table[0] and table[2].startswith("| square |") and "±" in table[3]


def test_a_size_that_would_take_too_long_is_skipped_and_the_larger_ones_with_it():
    tokens = (64, 128, 192)
    curves = measure_growth({"slow": growing(2, 1000, tokens)}, tokens, rounds=2, warmup=0, budget_s=0.05)
    (curve,) = curves.values()
    assert 64 in curve.latency and list(curve.skipped) == [128, 192]
    assert "predicted to take" in curve.skipped[128] and curve.skipped[192] == "a smaller size was skipped"
    assert "skipped" in growth_table(curves, "slow", since=64)[2]


@pytest.mark.long
def test_mixers_are_measured_by_tokens():
    given = {"dim": 16, "heads": 2, "sides": [2, 4]}
    curves = measure_growth(
        {name: Loader("eval.models.loading:load_mixer", {"mixer": name, **given}) for name in ("attention", "spatial")},
        (4, 16),
        rounds=2,
        warmup=0,
    )
    for curve in curves.values():
        assert list(curve.latency) == [4, 16] and curve.activations_mb[16] > 3 * curve.activations_mb[4] > 0


def test_bad_settings():
    loaders = {"a": growing(1, 1, (4, 16))}
    for tokens, kwargs in (((), {}), ((16, 4), {}), ((4, 4), {}), ((4,), {"rounds": 1}), ((4,), {"budget_s": 0})):
        with pytest.raises(ValueError, match="tokens ascend, rounds >= 2"):
            measure_growth(loaders, tokens, **kwargs)
    with pytest.raises(ValueError, match="a has no part for 64 tokens"):
        measure_growth(loaders, (4, 64))
