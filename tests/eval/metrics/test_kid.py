import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid
from torch_fidelity import metric_kid
from torchmetrics.image.kid import poly_mmd

from eval.metrics import kid as module
from eval.metrics.kid import kid, kid_interval


def draw(n, seed, scale=1.0):
    return torch.randn(n, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def by_torchmetrics(a, b):
    return 1000 * float(poly_mmd(a, b))


def by_cleanfid(a, b):
    state = np.random.get_state()
    try:  # it draws one subset of all samples, from the global generator
        return 1000 * cleanfid.kernel_distance(a.numpy(), b.numpy(), num_subsets=1, max_subset_size=len(a))
    finally:
        np.random.set_state(state)


def by_torch_fidelity(a, b):
    found = metric_kid.kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=len(a), verbose=False)
    return 1000 * found[metric_kid.KEY_METRIC_KID_MEAN]


@pytest.mark.parametrize("library", [by_torchmetrics, by_cleanfid, by_torch_fidelity])
@pytest.mark.parametrize("seed", [1, 3])
@pytest.mark.parametrize("n", [300, 20], ids=["n above d", "n below d"])
def test_matches_the_libraries_on_the_full_set(library, seed, n):
    a, b = draw(n, seed), draw(n, seed + 1, 1.1)
    assert kid(a, b, blocks=10)[0] == pytest.approx(library(a, b), rel=1e-9)


def test_rows_held_at_a_time_do_not_matter(monkeypatch):
    a, b = draw(300, 1), draw(280, 2, 1.1)
    expected = kid(a, b)
    monkeypatch.setattr(module, "ROWS", 64)
    assert kid(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n,m", [(100, 100), (300, 100)])
def test_interval_covers_zero_for_equal_distributions(n, m):
    intervals = [kid_interval(draw(n, 1000 + 2 * i), draw(m, 1001 + 2 * i)) for i in range(200)]
    assert np.mean([low <= 0 <= high for low, high in intervals]) >= 0.9


def test_interval_tells_other_distributions_from_zero():
    for i in range(20):
        low, high = kid_interval(draw(200, 2 * i, 1.4), draw(200, 2 * i + 1))
        assert 0 < low < high


def test_matches_the_definition_at_unequal_sizes():
    a, b = draw(40, 1), draw(70, 2)
    kernel = lambda x, y: (x @ y.T / 24 + 1) ** 3  # noqa: E731
    xx, yy = kernel(a, a).fill_diagonal_(0), kernel(b, b).fill_diagonal_(0)
    expected = xx.sum() / (40 * 39) + yy.sum() / (70 * 69) - 2 * kernel(a, b).mean()
    assert kid(a, b)[0] == pytest.approx(1000 * float(expected), rel=1e-9)


def test_error_leaves_blocks_out():
    a, b = draw(53, 1), draw(70, 2)
    replicates = [kid(a[torch.arange(53) % 5 != i], b)[0] for i in range(5)]
    assert kid(a, b, blocks=5)[1] == pytest.approx(2 * np.std(replicates), rel=1e-9)


def test_error_is_the_spread_of_redraws_and_the_value_unbiased():
    b = draw(2000, 1000)
    values, errors = zip(*(kid(draw(200, seed, 1.2), b) for seed in range(40)), strict=True)
    assert 0.6 < np.mean(errors) / np.std(values, ddof=1) < 1.6
    same = [kid(draw(100, seed), draw(100, 500 + seed))[0] for seed in range(60)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(60)


def test_is_the_same_every_time_and_leaves_the_generators_alone():
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert kid(draw(50, 1), draw(50, 2)) == kid(draw(50, 1), draw(50, 2))
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == np.random.get_state()[1].tolist()


def test_refuses_bad_features():
    a = draw(50, 1)
    with pytest.raises(ValueError, match="24 and 23 wide"):
        kid(a, a[:, :23])
    with pytest.raises(ValueError, match="blocks"):
        kid(a[:10], a, blocks=20)
    with pytest.raises(ValueError, match="reference.*not finite"):
        kid(a, a / 0)
