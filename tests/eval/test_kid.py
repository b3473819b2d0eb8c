import numpy as np
import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from eval import kid as module
from eval.kid import kid


def draw(n, seed, scale=1.0):
    return torch.randn(n, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def test_matches_torchmetrics_on_the_full_set(monkeypatch):
    a, b = draw(300, 1), draw(300, 2, 1.1)
    expected = 1000 * float(poly_mmd(a, b))
    assert kid(a, b)[0] == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(module, "ROWS", 64)
    assert kid(a, b)[0] == pytest.approx(expected, rel=1e-9)


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
