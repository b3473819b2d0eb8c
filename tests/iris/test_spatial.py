"""The separable spatial pathway against the dense decay matrix it stands for."""

import pytest
import torch
import torch.nn.functional as F

from iris.errors import SettingError
from iris.mixers.spatial import SpatialPathway
from iris.randomness import initialise

GRIDS = [(4, 4), (5, 7), (7, 5), (1, 6), (6, 1), (1, 1)]


def make(dim=8, heads=4, seed=0):
    return initialise(SpatialPathway(dim, heads=heads), seed)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(gamma, h, w):
    """gamma^(|dr| + |dc|) between all pairs of tokens, rows normalised, float64 [N, N]."""
    places = [(r, c) for r in range(h) for c in range(w)]
    matrix = torch.tensor(
        [[gamma ** (abs(r - s) + abs(c - d)) for s, d in places] for r, c in places], dtype=torch.float64
    )
    return matrix / matrix.sum(1, keepdim=True)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_separable_is_the_dense_matrix(grid):
    h, w = grid
    layer, x = make(), draw(2, h, w, 8)
    values = layer.input(x).double().reshape(2, h * w, 4, 2)
    gamma = torch.exp(-F.softplus(layer.theta.double()))
    expected = torch.stack([dense(gamma[k].item(), h, w) @ values[:, :, k] for k in range(4)], 2)
    torch.testing.assert_close(layer(x).double(), expected.reshape(2, h, w, 8), rtol=0, atol=1e-6)


def test_gamma_starts_as_rmts_schedule():
    gamma = torch.exp(-F.softplus(make().theta))
    torch.testing.assert_close(gamma, torch.tensor([0.75, 0.875, 0.9375, 0.96875]), rtol=0, atol=1e-5)


def test_weights_sum_to_one_and_fall_with_distance():
    decay = make().decay(9)
    assert decay.shape == (4, 9, 9)
    torch.testing.assert_close(decay.sum(-1), torch.ones(4, 9))
    assert (decay[:, 0].diff() < 0).all() and (decay[:, 4, 4:].diff() < 0).all()
    torch.testing.assert_close(decay[:, 4, :4].flip(-1), decay[:, 4, 5:])


def test_a_constant_image_stays_constant_up_to_the_corners():
    layer = make()
    x = draw(8).expand(1, 6, 5, 8)
    torch.testing.assert_close(layer(x), layer.input(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("theta", [-50.0, 50.0])
def test_extreme_gammas_are_mean_and_identity(theta):
    layer, x = make(), draw(1, 4, 6, 8)
    with torch.no_grad():
        layer.theta.fill_(theta)
    values = layer.input(x)
    expected = values if theta > 0 else values.mean((1, 2), keepdim=True).expand_as(values)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


def test_gamma_is_learned():
    """The gradient for theta agrees with finite differences."""
    layer, x = make().double(), draw(1, 3, 4, 8).double()
    layer(x).square().sum().backward()
    for k in range(4):
        values = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                layer.theta[k] += step
                values.append(layer(x).square().sum().item())
                layer.theta[k] -= step
        assert layer.theta.grad[k].item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=1e-2)


def test_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(SettingError, match="model.mixer_width=10.*model.heads=4"):
        SpatialPathway(8, width=10, heads=4)
