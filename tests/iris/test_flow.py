"""Rectified flow on Gaussian data, where velocity and path are known in closed form."""

import math

import pytest
import torch

from iris.errors import SettingError
from iris.flow import (
    LOSS_WEIGHTS,
    SAMPLERS,
    evaluations,
    integrate,
    interpolate,
    logit_normal_times,
    time_grid,
    velocity_loss,
)

MEAN, STD = 0.7, 0.4


def gaussian_velocity(z, t):
    """E[eps - z_0 | z_t = z] for z_0 ~ N(MEAN, STD^2)."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    slope = (t - (1 - t) * STD**2) / variance
    return -MEAN + slope * (z - (1 - t) * MEAN)


def orders(sampler, end, shift):
    """log2 of how much the error at time ``end`` shrinks when steps double, three times over."""
    noise = torch.linspace(-3, 3, 13, dtype=torch.float64)
    exact = (1 - end) * MEAN + math.sqrt((1 - end) ** 2 * STD**2 + end**2) * noise
    errors = []
    for steps in (32, 64, 128, 256):
        grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        times = end + (1 - end) * shift * grid / (1 + (shift - 1) * grid)
        errors.append((integrate(gaussian_velocity, noise, times, sampler) - exact).abs().max().item())
    assert errors[-1] < 0.02
    return [math.log2(coarse / fine) for coarse, fine in zip(errors[:-1], errors[1:], strict=True)]


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("midpoint", 3)])
@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("end", [0.2, 0.0])
def test_order_of_convergence_on_gaussian_data(sampler, order, shift, end):
    """At ``end`` 0 Heun's last step is Euler's, which costs no order.

    Midpoint is of second order in general, but the leading term of its error is zero here: per step it is
    h^3 (s_ttt / 24 + f_y s_tt / 8), and the deviation s of a Gaussian path has s_ttt = -3 s_t s_tt / s, f_y = s_t / s.
    """
    assert orders(sampler, end, shift) == pytest.approx([order] * 3, abs=0.2)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_order_of_convergence_in_general(sampler, order):
    """dz/dt = t z has the solution z(0) = z(1) exp(-1/2)."""
    errors = []
    for steps in (64, 128, 256):
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        end = integrate(lambda z, t: t * z, torch.ones(1, dtype=torch.float64), times, sampler)
        errors.append(abs(end.item() - math.exp(-0.5)))
    slopes = [math.log2(coarse / fine) for coarse, fine in zip(errors[:-1], errors[1:], strict=True)]
    assert slopes == pytest.approx([order] * 2, abs=0.2)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_samples_have_the_datas_mean_and_deviation(sampler):
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    z = integrate(gaussian_velocity, noise, time_grid(50), sampler)
    assert z.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert z.std().item() == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_evaluations_are_those_made(sampler, steps):
    calls = []

    def velocity(z, t):
        calls.append(t)
        return z

    integrate(velocity, torch.ones(2), time_grid(steps), sampler)
    assert evaluations(sampler, steps, guided=False) == len(calls)
    assert evaluations(sampler, steps, guided=True) == 2 * len(calls)
    assert all(t > 0 for t in calls)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_straight_path_needs_one_step(sampler):
    clean, noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    z = integrate(lambda z, t: noise - clean, noise, time_grid(1), sampler)
    torch.testing.assert_close(z, clean)


def test_unknown_sampler_is_refused_with_the_allowed_ones():
    with pytest.raises(SettingError) as error:
        integrate(gaussian_velocity, torch.zeros(1), time_grid(2), "ddim")
    assert "ddim" in str(error.value) and all(name in str(error.value) for name in SAMPLERS)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_time_grid_goes_from_one_to_zero(steps, shift):
    grid = time_grid(steps, shift)
    assert len(grid) == steps + 1 and grid[0] == 1 and grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_time_grid_values():
    torch.testing.assert_close(time_grid(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    torch.testing.assert_close(time_grid(2, 3.0), torch.tensor([1.0, 0.75, 0.0]))


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (-3, 1.0), (4, 0.0), (4, -1.0)])
def test_wrong_time_grids_are_refused(steps, shift):
    with pytest.raises(SettingError, match=f"steps={steps}.*shift={shift}"):
        time_grid(steps, shift)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 1.0), (-0.5, 0.6)])
def test_logit_normal_times(mean, std):
    t = logit_normal_times(20_000, torch.Generator().manual_seed(0), mean, std)
    assert (t > 0).all() and (t < 1).all()
    logits = torch.logit(t.double())
    assert logits.mean().item() == pytest.approx(mean, abs=0.01)
    assert logits.std().item() == pytest.approx(std, abs=0.01)


def test_times_are_stratified_and_shuffled():
    count = 64
    t = logit_normal_times(count, torch.Generator().manual_seed(3))
    stratum = (torch.special.ndtr(torch.logit(t.double())) * count).floor()
    assert stratum.sort().values.tolist() == list(range(count))
    assert stratum.tolist() != list(range(count))


def test_each_single_draw_is_logit_normal():
    """Stratifying must not change the distribution of the draw at a fixed place of the batch."""
    draws = torch.Generator().manual_seed(0)
    first = torch.stack([logit_normal_times(4, draws)[0] for _ in range(3000)])
    logits = torch.logit(first)
    assert logits.mean().item() == pytest.approx(0, abs=0.08)
    assert logits.std().item() == pytest.approx(1, abs=0.05)


def test_odds_weight_moves_the_mean_of_the_times_by_one():
    """E[w f(t)] under logit-normal(0, 1) is e^(1/2) E[f(t)] under logit-normal(1, 1)."""
    t = logit_normal_times(200_000, torch.Generator().manual_seed(0))
    moved = logit_normal_times(200_000, torch.Generator().manual_seed(1), mean=1.0)
    weight = LOSS_WEIGHTS["odds"](t)
    assert weight.mean().item() == pytest.approx(1.6487, rel=0.02)
    for f in (torch.square, lambda x: torch.cos(5 * x)):
        assert (weight * f(t)).mean().item() == pytest.approx(1.6487 * f(moved).mean().item(), rel=0.02)


def test_interpolation_ends_at_data_and_noise():
    clean, noise = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    z = interpolate(clean, noise, torch.tensor([0.0, 1.0, 0.25]))
    torch.testing.assert_close(z[0], clean[0])
    torch.testing.assert_close(z[1], noise[1])
    torch.testing.assert_close(z[2], 0.75 * clean[2] + 0.25 * noise[2])


def test_velocity_loss_weighs_each_image_by_its_time():
    clean, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    t = torch.tensor([0.5, 0.75])
    assert velocity_loss(noise - clean, clean, noise, t) == 0
    off = noise - clean + torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    assert velocity_loss(off, clean, noise, t).item() == pytest.approx((1 + 4) / 2, rel=1e-5)
    assert velocity_loss(off, clean, noise, t, "odds").item() == pytest.approx((1 * 1 + 3 * 4) / 2, rel=1e-5)


def test_velocity_is_the_paths_derivative():
    clean, noise = torch.randn(2, 1, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind(0)
    low, high = (interpolate(clean, noise, torch.tensor([t], dtype=torch.float64)) for t in (0.3, 0.4))
    assert velocity_loss((high - low) / 0.1, clean, noise, torch.tensor([0.35])).item() == pytest.approx(0, abs=1e-12)
