import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from cleanfid import fid as cleanfid
from torch_fidelity import metric_fid
from torchmetrics.image.fid import FrechetInceptionDistance

from eval.metrics.fid import FeatureStatistics, RankDeficientWarning, frechet_distance, frechet_jackknife


def draw(n, d, seed, scale=1.0, shift=0.0):
    """Features with a decaying spectrum and a mean away from zero, float64 [n, d]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64) / math.sqrt(d)
    spectrum = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) * spectrum * scale) @ mix + 0.5 + shift


@pytest.fixture(scope="module")
def pair():
    return draw(700, 48, 1), draw(900, 48, 2, scale=1.2, shift=0.05)


def by_torchmetrics(a, b):
    class Identity(torch.nn.Module):
        num_features = a.shape[1]

        def forward(self, x):
            return x.flatten(1)

    metric = FrechetInceptionDistance(feature=Identity(), normalize=True, input_img_size=(1, 1, a.shape[1]))
    metric.set_dtype(torch.float64)
    for features, real in ((a, False), (b, True)):
        metric.update(features.view(len(features), 1, 1, -1), real=real)
    return float(metric.compute())


def by_cleanfid(a, b):
    a, b = a.numpy(), b.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return float(cleanfid.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T)))


def by_torch_fidelity(a, b):
    statistics = (metric_fid.fid_features_to_statistics(features) for features in (a, b))
    return metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[metric_fid.KEY_METRIC_FID]


@pytest.mark.filterwarnings("ignore::eval.metrics.fid.RankDeficientWarning")
@pytest.mark.parametrize("library", [by_torchmetrics, by_cleanfid, by_torch_fidelity])
@pytest.mark.parametrize("seed", [1, 3])
@pytest.mark.parametrize("n,m", [(700, 900), (40, 900), (40, 45)], ids=["full rank", "n below d", "both below d"])
def test_matches_the_libraries(library, seed, n, m):
    a, b = draw(n, 48, seed), draw(m, 48, seed + 1, scale=1.2, shift=0.05)
    ours = frechet_distance(a, b)
    assert math.isfinite(ours)
    assert ours == pytest.approx(library(a, b), rel=1e-5)


def test_matches_the_matrix_root(pair):
    a, b = (x.numpy() for x in pair)
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_distance(*pair) == pytest.approx(expected, rel=1e-10)


def test_known_gaussians():
    """Equal isotropic shapes: |shift|^2 + d (s - 1)^2, exactly, when the samples have exactly these moments."""
    x = draw(400, 6, 3)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    assert frechet_distance(x, 1.5 * x + 2) == pytest.approx(6 * 4 + 6 * 0.25, rel=1e-10)


def test_same_features_are_at_distance_zero(pair):
    assert abs(frechet_distance(pair[0], pair[0])) < 1e-9
    few = draw(20, 48, 4)
    with pytest.warns(RankDeficientWarning):
        assert abs(frechet_distance(few, few)) < 1e-9


@pytest.mark.filterwarnings("ignore::eval.metrics.fid.RankDeficientWarning")
@pytest.mark.parametrize("n,m", [(30, 40), (30, 300), (300, 30)])
def test_rank_deficient_forms_agree(n, m):
    a, b = draw(n, 64, 5), draw(m, 64, 6)
    centred = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b)]
    trace = 2 * scipy.linalg.svdvals((centred[0] @ centred[1].T).numpy()).sum()
    expected = float((a.mean(0) - b.mean(0)).square().sum() + sum(c.square().sum() for c in centred)) - trace
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, FeatureStatistics.of(b)) == pytest.approx(expected, rel=1e-9)


def test_dead_features_stay_finite(pair):
    a, b = (x.clone() for x in pair)
    a[:, :10], b[:, 5:15] = 0, 0
    assert math.isfinite(frechet_distance(a, b))
    assert frechet_distance(torch.zeros(100, 8), torch.zeros(100, 8)) == 0


def test_rank_deficiency_is_flagged(pair):
    with pytest.warns(RankDeficientWarning, match="48 samples of 48"):
        frechet_distance(pair[0][:48], pair[1])
    assert FeatureStatistics.of(pair[0][:48]).rank_deficient and not FeatureStatistics.of(pair[0]).rank_deficient


def test_order_and_batches_do_not_matter(pair):
    a, b = pair
    batched = FeatureStatistics(48)
    for batch in a[torch.randperm(len(a), generator=torch.Generator().manual_seed(0))].split(33):
        batched.update(batch)
    for other in (batched, FeatureStatistics.of(a[:1]).update(a[1:])):
        assert other.count == len(a)
        torch.testing.assert_close(other.mean, a.mean(0), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(other.covariance, torch.cov(a.T), rtol=1e-10, atol=1e-13)
        assert frechet_distance(other, b) == pytest.approx(frechet_distance(a, b), rel=1e-11)


def test_features_far_from_zero_keep_their_digits(pair):
    far = [x + 1e5 for x in pair]
    assert frechet_distance(*far) == pytest.approx(frechet_distance(*pair), rel=1e-7)


def test_taking_samples_out_undoes_adding_them(pair):
    rest = FeatureStatistics.of(pair[0]).without(pair[0][:100])
    expected = FeatureStatistics.of(pair[0][100:])
    torch.testing.assert_close(rest.mean, expected.mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(rest.scatter, expected.scatter, rtol=1e-11, atol=1e-11)


def test_jackknife_error_is_the_spread_of_redraws():
    reference = FeatureStatistics.of(draw(4000, 12, 1000))
    values, errors = zip(
        *(frechet_jackknife(draw(300, 12, seed, scale=1.3), reference) for seed in range(40)), strict=True
    )
    ratio = np.mean(errors) / np.std(values, ddof=1)
    assert 0.6 < ratio < 1.6, ratio


@pytest.mark.filterwarnings("ignore::eval.metrics.fid.RankDeficientWarning")
@pytest.mark.parametrize("n,d", [(120, 20), (52, 50), (30, 50)])
def test_jackknife_leaves_blocks_out(n, d):
    a, b = draw(n, d, 7), draw(400, d, 8)
    value, error = frechet_jackknife(a, b, blocks=10)
    replicates = [frechet_distance(a[torch.arange(n) % 10 != i], b) for i in range(10)]
    assert value == frechet_distance(a, b)
    assert error == pytest.approx(math.sqrt(9) * np.std(replicates), rel=1e-6)


def test_statistics_survive_a_file(pair, tmp_path):
    saved = FeatureStatistics.of(pair[0], {"judge": "shapes", "judge_sha256": "ab", "image_size": 32})
    saved.save(tmp_path / "sub" / "real.npz")
    loaded = FeatureStatistics.load(tmp_path / "sub" / "real.npz")
    assert loaded.metadata == saved.metadata and loaded.count == saved.count
    assert frechet_distance(loaded, pair[1]) == frechet_distance(saved, pair[1])
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["real.npz"]
    (tmp_path / "broken.npz").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="broken.npz"):
        FeatureStatistics.load(tmp_path / "broken.npz")


def test_refuses_what_cannot_be_compared(pair):
    a, b = pair
    with pytest.raises(ValueError, match="48 and 47 wide"):
        frechet_distance(a, b[:, :47])
    with pytest.raises(ValueError, match="judge differs"):
        frechet_distance(FeatureStatistics.of(a, {"judge": "shapes"}), FeatureStatistics.of(b, {"judge": "inception"}))
    with pytest.raises(ValueError, match="at least 2 samples"):
        frechet_distance(a[:1], b)
    with pytest.raises(ValueError, match="2 of 700 .* not finite"):
        frechet_distance(torch.cat([a[:-2], a[-2:] * math.nan]), b)
    with pytest.raises(ValueError, match=r"must be \[N, D\]"):
        frechet_distance(a.view(-1), b)
    with pytest.raises(ValueError, match="blocks"):
        frechet_jackknife(a[:10], b, blocks=6)
