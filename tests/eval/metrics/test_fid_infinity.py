import math

import numpy as np
import pytest
import torch
from scipy import stats

from eval.metrics.fid import FeatureStatistics, frechet_distance
from eval.metrics.fid_infinity import ExtrapolationWarning, fid_infinity
from iris.randomness import addressed

D = 16
SPECTRUM = torch.arange(1, D + 1, dtype=torch.float64) ** -0.5


def draw(n, seed, scale=1.2, shift=0.05):
    noise = torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise * SPECTRUM * scale + shift


@pytest.fixture(scope="module")
def population():
    """Statistics of the distribution with scale 1 and shift 0 itself, so that the distance to it is known."""
    statistics = FeatureStatistics(D)
    statistics.count = 10**9
    statistics.scatter = torch.diag(SPECTRUM**2) * (statistics.count - 1)
    return statistics


TRUTH = D * 0.05**2 + float((0.2 * SPECTRUM).square().sum())


def test_finds_the_distance_of_the_distributions(population):
    found = [fid_infinity(draw(16 * D, seed), population, sampling_error=0.0).value for seed in range(40)]
    plain = [frechet_distance(draw(16 * D, seed), population) for seed in range(40)]
    error = np.std(found, ddof=1) / math.sqrt(40)
    assert abs(np.mean(found) - TRUTH) < 4 * error
    assert abs(np.mean(found) - TRUTH) < 0.25 * abs(np.mean(plain) - TRUTH)


def test_varies_less_with_the_number_of_samples_than_fid(population):
    counts, seeds = (8 * D, 16 * D, 32 * D, 64 * D), range(8)
    plain = [np.mean([frechet_distance(draw(n, s), population) for s in seeds]) for n in counts]
    limit = [np.mean([fid_infinity(draw(n, s), population, sampling_error=0.0).value for s in seeds]) for n in counts]
    assert plain == sorted(plain, reverse=True)
    assert np.ptp(limit) < 0.5 * np.ptp(plain)


def test_error_is_the_spread_of_redraws(population):
    found = [fid_infinity(draw(16 * D, seed), population) for seed in range(30)]
    spread = np.std([each.value for each in found], ddof=1)
    assert 0.6 < np.mean([each.standard_error for each in found]) / spread < 1.6
    assert np.mean([each.fit_error for each in found]) < 0.8 * spread  # the fit alone does not see the sampling


def test_the_line_is_least_squares(population):
    features = draw(10 * D, 1)
    found = fid_infinity(features, population)
    line = stats.linregress(1 / np.asarray(found.counts), found.values)
    assert found.value == pytest.approx(line.intercept, rel=1e-9)
    assert found.slope == pytest.approx(line.slope, rel=1e-9) and found.slope > 0
    assert found.fit_error == pytest.approx(line.intercept_stderr, rel=1e-9)
    residuals = np.asarray(found.values) - line.intercept - line.slope / np.asarray(found.counts)
    assert found.residual == pytest.approx(np.sqrt(np.mean(residuals**2)), rel=1e-9)
    assert found.standard_error == pytest.approx(math.hypot(found.fit_error, found.sampling_error))


def test_points_are_means_over_disjoint_subsets(population):
    features = draw(200, 2)
    found = fid_infinity(features, population, points=4, seed=5)
    assert found.counts == (50, 100, 150, 200) and found.n == 200 and found.width == D
    assert found.values[-1] == pytest.approx(frechet_distance(features, population), rel=1e-9)
    order = torch.randperm(200, generator=addressed(5, "fid_infinity", 50))
    quarters = [frechet_distance(features[part], population) for part in order.split(50)]
    assert found.values[0] == pytest.approx(np.mean(quarters), rel=1e-9)


def test_subsets_are_seeded_and_leave_the_generators_alone(population):
    features, state = draw(10 * D, 3), (torch.get_rng_state(), np.random.get_state()[1].tolist())
    assert fid_infinity(features, population) == fid_infinity(features, population)
    assert fid_infinity(features, population, seed=1).value != fid_infinity(features, population).value
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == np.random.get_state()[1].tolist()


def test_few_samples_are_flagged_and_too_low(population):
    with pytest.warns(ExtrapolationWarning, match=f"{2 * D} samples of {D} features"):
        few = [fid_infinity(draw(2 * D, seed), population, sampling_error=0.0) for seed in range(20)]
    assert not few[0].reliable and fid_infinity(draw(8 * D, 0), population, sampling_error=0.0).reliable
    assert np.mean([each.value for each in few]) < TRUTH


@pytest.mark.filterwarnings("ignore::eval.metrics.fid_infinity.ExtrapolationWarning")
def test_fewer_samples_than_features_stay_finite(population):
    found = fid_infinity(draw(D - 4, 0), population, sampling_error=0.0)
    assert math.isfinite(found.value) and not found.reliable


def test_refuses(population):
    with pytest.raises(ValueError, match="points"):
        fid_infinity(draw(200, 0), population, points=2)
    with pytest.raises(ValueError, match="3 samples are too few"):
        fid_infinity(draw(3, 0), population)
    with pytest.raises(ValueError, match="wide"):
        fid_infinity(draw(200, 0)[:, :5], population)
    with pytest.raises(ValueError, match="not finite"):
        fid_infinity(draw(200, 0) * math.nan, population)
