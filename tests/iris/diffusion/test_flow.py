"""Rectified flow: times, loss weights and samplers, against closed forms on Gaussian data, diffusers and SciPy."""

import itertools
import math

import numpy
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from scipy import integrate as scipy_integrate
from scipy import special, stats

from iris.diffusion.flow import (
    LOSS_WEIGHTS,
    SAMPLERS,
    TimeSampling,
    evaluation_times,
    integrate,
    interpolate,
    resolution_shift,
    time_grid,
    velocity_loss,
)
from iris.errors import SettingError

MEAN, STD = 0.7, 0.4
ODE_SAMPLERS = ("euler", "heun", "midpoint")
KINDS = [
    TimeSampling(),
    TimeSampling(mean=1.0, std=0.6),
    TimeSampling("uniform"),
    TimeSampling("mode"),
    TimeSampling("mode", scale=-0.8),
    TimeSampling(shift=3.0),
    TimeSampling("mode", shift=0.4),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian_velocity(z, t):
    """E[eps - z_0 | z_t = z] for z_0 ~ N(MEAN, STD^2)."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    slope = (t - (1 - t) * STD**2) / variance
    return -MEAN + slope * (z - (1 - t) * MEAN)


def gaussian_path(noise, t):
    """Where the flow that ends at ``noise`` is at time t."""
    return (1 - t) * MEAN + math.sqrt((1 - t) ** 2 * STD**2 + t**2) * noise


def curved_velocity(z, t):
    """A velocity that is linear in neither z nor t."""
    return torch.sin(2 * z) * (1 + t) - t**2 * z + 0.3


# Times


def test_default_times_are_those_of_finished_trials():
    """Bit for bit: their results depend on these draws."""
    for count in (1, 3, 64):
        draws = seeded(count)
        strata = (torch.randperm(count, generator=draws) + torch.rand(count, generator=draws)) / count
        normal = math.sqrt(2) * torch.erfinv((2 * strata - 1).clamp(-1 + 1e-6, 1 - 1e-6))
        assert torch.equal(TimeSampling().draw(count, seeded(count)), torch.sigmoid(0.0 + 1.0 * normal))
    ends = torch.sigmoid(math.sqrt(2) * torch.erfinv(torch.tensor([-1 + 1e-6, 1 - 1e-6])))
    assert torch.equal(TimeSampling().at(torch.tensor([0.0, 1.0])), ends)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 1.0), (-0.5, 0.6)])
def test_logit_normal_times_have_scipys_quantiles(mean, std):
    uniform = numpy.linspace(0.001, 0.999, 101)
    t = TimeSampling("logit_normal", mean, std).at(torch.from_numpy(uniform))
    numpy.testing.assert_allclose(t, special.expit(stats.norm.ppf(uniform, mean, std)), rtol=1e-9)


@pytest.mark.parametrize("scale", [1.29, 1.75, -0.8, 0.0])
def test_mode_times_agree_with_diffusers(scale, monkeypatch):
    uniform = torch.linspace(0.001, 0.999, 101)
    monkeypatch.setattr(torch, "rand", lambda **unused: uniform)
    theirs = compute_density_for_timestep_sampling("mode", len(uniform), mode_scale=scale)
    torch.testing.assert_close(TimeSampling("mode", scale=scale).at(uniform), theirs, rtol=0, atol=1e-6)


def test_logit_normal_and_uniform_times_agree_with_diffusers(monkeypatch):
    uniform = torch.linspace(0.001, 0.999, 101)
    monkeypatch.setattr(torch, "rand", lambda **unused: uniform)
    monkeypatch.setattr(torch, "normal", lambda mean, std, **unused: mean + std * torch.special.ndtri(uniform))
    theirs = compute_density_for_timestep_sampling("logit_normal", len(uniform), logit_mean=0.5, logit_std=0.6)
    torch.testing.assert_close(TimeSampling(mean=0.5, std=0.6).at(uniform), theirs, rtol=0, atol=1e-6)
    theirs = compute_density_for_timestep_sampling("none", len(uniform))
    torch.testing.assert_close(TimeSampling("uniform").at(uniform), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("times", KINDS, ids=str)
def test_times_are_stratified_and_shuffled(times):
    count = 64
    drawn = times.draw(count, seeded(3))
    edges = times.at(torch.linspace(0, 1, count + 1)).sort().values
    stratum = torch.searchsorted(edges, drawn)
    assert stratum.sort().values.tolist() == list(range(1, count + 1))
    assert stratum.tolist() != sorted(stratum.tolist()) and stratum.tolist() != sorted(stratum.tolist(), reverse=True)


@pytest.mark.parametrize("times", KINDS, ids=str)
def test_each_single_draw_has_the_distribution(times):
    """Stratifying must not change the distribution of the draw at a fixed place of the batch."""
    draws = seeded(5)
    first = numpy.array([times.draw(4, draws)[0] for _ in range(2000)])
    whole = times.at(torch.linspace(0, 1, 100_001)).numpy()
    assert stats.ks_2samp(first, whole).pvalue > 0.01


@pytest.mark.parametrize(
    "times",
    [
        *KINDS,
        TimeSampling(mean=60.0),
        TimeSampling(mean=-60.0),
        TimeSampling(shift=1e9),
        TimeSampling("uniform", shift=1e-9),
    ],
    ids=str,
)
def test_no_time_is_zero_or_one(times):
    t = times.at(torch.tensor([0.0, 1e-9, 0.5, 1 - 1e-7, 1.0]))
    assert (t > 0).all() and (t < 1).all()


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_shift_adds_its_logarithm_to_the_logit(shift):
    """So logit-normal(0, 1) becomes logit-normal(ln shift, 1)."""
    uniform = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    moved = TimeSampling(mean=math.log(shift)).at(uniform)
    torch.testing.assert_close(TimeSampling(shift=shift).at(uniform), moved, rtol=0, atol=1e-12)
    even = torch.logit(TimeSampling("uniform", shift=shift).at(uniform))
    torch.testing.assert_close(even, torch.logit(uniform) + math.log(shift), rtol=0, atol=1e-12)


def test_resolution_shift_keeps_the_noise_of_a_mean_over_tokens():
    """A flat picture seen on n tokens at time t is known to within t / ((1 - t) sqrt(n)); so on m, shifted."""
    large, small, t = 4096, 256, torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    shift = resolution_shift(large, small)
    assert shift == 4
    moved = TimeSampling("uniform", shift=shift).at(t)
    torch.testing.assert_close(moved / ((1 - moved) * math.sqrt(large)), t / ((1 - t) * math.sqrt(small)))
    with pytest.raises(SettingError, match="tokens=0"):
        resolution_shift(0, 256)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kind": "cosmap"}, "train.time='cosmap'.*logit_normal, uniform, mode"),
        ({"std": 0.0}, "train.time_std=0.0"),
        ({"std": math.nan}, "train.time_std=nan"),
        ({"mean": math.inf}, "train.time_mean=inf"),
        ({"shift": 0.0}, "train.time_shift=0.0"),
        ({"scale": 1.76}, r"train.time_scale=1.76.*1.752"),
        ({"scale": -1.1}, "train.time_scale=-1.1"),
    ],
)
def test_wrong_time_sampling_is_refused(changes, named):
    with pytest.raises(SettingError, match=named):
        TimeSampling(**changes)


def test_mode_times_are_monotone_up_to_the_largest_scale_allowed():
    uniform = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for scale in (-1.0, 2 / (math.pi - 2)):
        assert (TimeSampling("mode", scale=scale).at(uniform).diff() <= 0).all()


# Loss weights


def weigh(name, t, gamma=5.0):
    return LOSS_WEIGHTS[name](t, gamma)


def test_odds_weight_moves_the_mean_of_the_times_by_one():
    """E[w f(t)] under logit-normal(0, 1) is e^(1/2) E[f(t)] under logit-normal(1, 1)."""
    t = TimeSampling().draw(1_000_000, seeded(0))
    moved = TimeSampling(mean=1.0).draw(1_000_000, seeded(1))
    weight = weigh("odds", t)
    assert weight.mean().item() == pytest.approx(1.6487, rel=0.01)
    for f in (torch.square, lambda x: torch.cos(5 * x)):
        assert (weight * f(t)).mean().item() == pytest.approx(1.6487 * f(moved).mean().item(), rel=0.01)


def test_odds_weight_leaves_an_effective_sample_of_one_in_e():
    weight = weigh("odds", TimeSampling().draw(1_000_000, seeded(0))).double()
    assert (weight.sum() ** 2 / weight.square().sum()).item() / len(weight) == pytest.approx(1 / math.e, rel=0.02)


def test_odds_weight_is_accurate_and_finite_near_one():
    t = torch.tensor([0.25, 0.5, 0.999, 1 - 2e-6])
    torch.testing.assert_close(weigh("odds", t).double(), torch.exp(torch.logit(t.double())), rtol=1e-6, atol=0)
    assert weigh("odds", torch.tensor([1.0], dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_papers_weight_of_the_noises_and_of_the_pictures_error(gamma):
    """Both losses of the paper, from estimates of eps and z_0 made from the same velocity."""
    clean, noise, off = torch.randn(3, 200, 2, 3, 3, generator=seeded(), dtype=torch.float64).unbind(0)
    t = TimeSampling("uniform").draw(200, seeded(1)).double()
    z, predicted = interpolate(clean, noise, t), noise - clean + off
    at = t.view(-1, 1, 1, 1)
    snr = (1 - t) ** 2 / t**2
    noise_error = ((z + (1 - at) * predicted - noise) ** 2).mean((1, 2, 3))
    clean_error = ((z - at * predicted - clean) ** 2).mean((1, 2, 3))
    loss = velocity_loss(predicted, clean, noise, t, "min_snr", gamma)
    torch.testing.assert_close(loss, (snr.clamp(max=gamma) / snr * noise_error).mean())
    torch.testing.assert_close(loss, (snr.clamp(max=gamma) * clean_error).mean())


def test_velocity_loss_weighs_each_image_by_its_time():
    clean, noise = torch.randn(2, 2, 3, 4, 4, generator=seeded()).unbind(0)
    t = torch.tensor([0.5, 0.75])
    assert velocity_loss(noise - clean, clean, noise, t) == 0
    off = noise - clean + torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    assert velocity_loss(off, clean, noise, t).item() == pytest.approx((1 + 4) / 2, rel=1e-5)
    assert velocity_loss(off, clean, noise, t, "odds").item() == pytest.approx((1 * 1 + 3 * 4) / 2, rel=1e-5)
    expected = (0.25 * 1 + 0.0625 * 4) / 2
    assert velocity_loss(off, clean, noise, t, "min_snr").item() == pytest.approx(expected, rel=1e-5)


def test_wrong_weights_are_refused():
    zero, t = torch.zeros(1, 1, 1, 1), torch.tensor([0.5])
    with pytest.raises(SettingError, match="train.loss_weight='snr'.*none, odds, min_snr"):
        velocity_loss(zero, zero, zero, t, "snr")
    with pytest.raises(SettingError, match="train.min_snr_gamma=0"):
        velocity_loss(zero, zero, zero, t, "min_snr", 0)


def test_interpolation_ends_at_data_and_noise():
    clean, noise = torch.randn(2, 3, 2, 4, 4, generator=seeded()).unbind(0)
    z = interpolate(clean, noise, torch.tensor([0.0, 1.0, 0.25]))
    torch.testing.assert_close(z[0], clean[0])
    torch.testing.assert_close(z[1], noise[1])
    torch.testing.assert_close(z[2], 0.75 * clean[2] + 0.25 * noise[2])


def test_velocity_is_the_paths_derivative():
    clean, noise = torch.randn(2, 1, 1, 2, 2, generator=seeded(), dtype=torch.float64).unbind(0)
    low, high = (interpolate(clean, noise, torch.tensor([t], dtype=torch.float64)) for t in (0.3, 0.4))
    assert velocity_loss((high - low) / 0.1, clean, noise, torch.tensor([0.35])).item() == pytest.approx(0, abs=1e-12)


# Time grids


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("start", [1.0, 0.6])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_time_grid_falls_from_start_to_zero(steps, start, shift):
    grid = time_grid(steps, shift, start)
    assert len(grid) == steps + 1 and grid[0] == torch.tensor(start) and grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_time_grid_values():
    torch.testing.assert_close(time_grid(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), rtol=0, atol=0)
    torch.testing.assert_close(time_grid(4, 3.0), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))
    torch.testing.assert_close(time_grid(3, 1.0, 0.6), torch.tensor([0.6, 0.4, 0.2, 0.0]))


def test_a_grid_that_starts_on_a_longer_grid_is_its_end():
    for shift in (0.5, 1.0, 3.0):
        whole = time_grid(10, shift)
        torch.testing.assert_close(time_grid(6, shift, whole[4].item()), whole[4:])


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (-3, 1.0), (4, 0.0), (4, -1.0), (4, math.nan)])
def test_wrong_time_grids_are_refused(steps, shift):
    with pytest.raises(SettingError, match=f"steps={steps}.*shift={shift}"):
        time_grid(steps, shift)


@pytest.mark.parametrize("start", [0.0, 1.1, -0.5, math.nan])
def test_wrong_starts_are_refused(start):
    with pytest.raises(SettingError, match=f"start={start}"):
        time_grid(4, start=start)


def test_diffusers_default_grid_wastes_the_last_of_four_steps():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == pytest.approx([1, 0.667, 0.334, 0.001, 0], abs=1e-3)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    assert scheduler.sigmas[3].item() == pytest.approx(3 * 0.003 / (1 + 2 * 0.003), rel=0.01)  # 0.001 shifted twice
    noise = torch.linspace(-3, 3, 13)
    default, three, four = (
        integrate(gaussian_velocity, noise, times)
        for times in (torch.tensor([1, 0.667, 0.334, 0.001, 0]), time_grid(3), time_grid(4))
    )
    error = lambda z: (z - gaussian_path(noise, 0)).abs().max().item()  # noqa: E731
    assert error(default) == pytest.approx(error(three), rel=0.01)
    assert error(four) < 0.9 * error(default)


# Samplers


def orders(sampler, end, shift):
    """log2 of how much the error at time ``end`` shrinks when steps double, three times over."""
    noise = torch.linspace(-3, 3, 13, dtype=torch.float64)
    errors = []
    for steps in (64, 128, 256, 512):
        grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        times = end + (1 - end) * shift * grid / (1 + (shift - 1) * grid)
        error = integrate(gaussian_velocity, noise, times, sampler) - gaussian_path(noise, end)
        errors.append(error.abs().max().item())
    assert errors[-1] < 0.01
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("midpoint", 3)])
@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("end", [0.2, 0.0])
def test_order_of_convergence_on_gaussian_data(sampler, order, shift, end):
    """At ``end`` 0 Heun's last step is Euler's, which costs no order.

    Midpoint is of second order in general, but the leading term of its error is zero here: per step it is
    h^3 (s_ttt / 24 + f_y s_tt / 8), and the deviation s of a Gaussian path has s_ttt = -3 s_t s_tt / s, f_y = s_t / s.
    """
    assert orders(sampler, end, shift) == pytest.approx([order] * 3, abs=0.1)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
@pytest.mark.parametrize("inverted", [False, True])
def test_order_of_convergence_in_general(sampler, order, inverted):
    """dz/dt = t z: the solution changes by the factor exp(±1/2)."""
    errors = []
    for steps in (64, 128, 256):
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        times = times.flip(0) if inverted else times
        end = integrate(lambda z, t: t * z, torch.ones(1, dtype=torch.float64), times, sampler)
        errors.append(abs(end.item() - math.exp(0.5 if inverted else -0.5)))
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert slopes == pytest.approx([order] * 2, abs=0.1)


@pytest.mark.parametrize(("sampler", "tolerance"), [("euler", 6e-3), ("heun", 2e-5), ("midpoint", 2e-5)])
@pytest.mark.parametrize("span", [(1.0, 0.0), (0.0, 1.0), (0.6, 0.0)])
def test_the_end_is_scipys(sampler, tolerance, span):
    z = numpy.linspace(-2, 2, 9)
    times = torch.linspace(*span, 401, dtype=torch.float64)
    ours = integrate(curved_velocity, torch.from_numpy(z), times, sampler)
    velocity = lambda t, y: curved_velocity(torch.from_numpy(y), t).numpy()  # noqa: E731
    theirs = scipy_integrate.solve_ivp(velocity, span, z, rtol=1e-10, atol=1e-12).y[:, -1]
    assert numpy.abs(ours.numpy() - theirs).max() < tolerance
    assert numpy.abs(theirs - z).max() > 0.5


def by_diffusers(scheduler, noise, velocity=curved_velocity, **options):
    """The end point, and how many evaluations it took."""
    z = noise
    for timestep in scheduler.timesteps:
        z = scheduler.step(velocity(z, timestep / 1000), timestep, z, return_dict=False, **options)[0]
    return z, len(scheduler.timesteps)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_euler_agrees_with_diffusers(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=time_grid(steps)[:-1].tolist())
    torch.testing.assert_close(scheduler.sigmas, time_grid(steps, shift), rtol=0, atol=1e-6)
    noise = torch.linspace(-2, 2, 9)
    theirs, count = by_diffusers(scheduler, noise)
    torch.testing.assert_close(integrate(curved_velocity, noise, time_grid(steps, shift)), theirs, rtol=0, atol=1e-6)
    assert count == len(evaluation_times("euler", time_grid(steps)))


@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_agrees_with_diffusers(steps, shift):
    """Its scheduler takes no sigmas: they are put in, each but the first and the last twice, as it keeps them.

    (On its default grid float32 alone parts the two by 2e-5: it divides by the 0.001 that it ends with.)
    """
    scheduler, times = FlowMatchHeunDiscreteScheduler(), time_grid(steps, shift)
    scheduler.set_timesteps(steps)
    assert scheduler.sigmas.shape == (2 * steps,)
    scheduler.sigmas = torch.cat([times[:1], times[1:-1].repeat_interleave(2), times[-1:]])
    scheduler.timesteps = 1000 * scheduler.sigmas[:-1]
    noise = torch.linspace(-2, 2, 9)
    theirs, count = by_diffusers(scheduler, noise)
    torch.testing.assert_close(integrate(curved_velocity, noise, times, "heun"), theirs, rtol=0, atol=1e-6)
    assert count == len(evaluation_times("heun", times)) == 2 * steps - 1


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_stochastic_sampler_agrees_with_diffusers(steps):
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=time_grid(steps)[:-1].tolist())
    noise, draws = torch.linspace(-2, 2, 9), seeded(4)
    theirs, count = by_diffusers(scheduler, noise, generator=seeded(4))
    fresh = lambda step: torch.randn(9, generator=draws)  # noqa: E731
    ours = integrate(curved_velocity, noise, time_grid(steps), "stochastic", fresh)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert count == len(evaluation_times("stochastic", time_grid(steps)))


@pytest.mark.parametrize("sampler", ODE_SAMPLERS)
def test_samples_have_the_datas_mean_and_deviation(sampler):
    noise = torch.randn(4000, generator=seeded())
    z = integrate(gaussian_velocity, noise, time_grid(50), sampler)
    assert z.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert z.std().item() == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_consistency_model_sampled_stochastically_gives_the_data(steps):
    """z - t v being where the path from z ends, every step lands on the data's distribution."""

    def velocity(z, t):
        end = MEAN + STD * (z - (1 - t) * MEAN) / torch.sqrt((1 - t) ** 2 * STD**2 + t**2)
        return (z - end) / t

    noise, draws = torch.randn(20_000, generator=seeded()), seeded(1)
    z = integrate(velocity, noise, time_grid(steps), "stochastic", lambda step: torch.randn(20_000, generator=draws))
    assert z.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert z.std().item() == pytest.approx(STD, abs=0.01)
    assert steps == 1 or abs(numpy.corrcoef(z, noise)[0, 1]) < 0.9


@pytest.mark.parametrize("sampler", ODE_SAMPLERS)
def test_inversion_finds_the_noise(sampler):
    """Up to the data and back: each way ends where the closed form says."""
    noise, times = torch.linspace(-2, 2, 9, dtype=torch.float64), time_grid(400).double()
    clean = gaussian_path(noise, 0)
    found = integrate(gaussian_velocity, clean, times.flip(0), sampler)
    assert (found - noise).abs().max() < (0.05 if sampler == "euler" else 2e-4)
    back = integrate(gaussian_velocity, found, times, sampler)
    assert (back - clean).abs().max() < (0.05 if sampler == "euler" else 1e-4)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_evaluation_times_are_those_of_integration(sampler, steps):
    each = {"euler": steps, "heun": 2 * steps - 1, "midpoint": 2 * steps, "stochastic": steps}[sampler]
    seen, ones = [], torch.ones(2)
    integrate(lambda z, t: seen.append(t.item()) or z, ones, time_grid(steps), sampler, lambda step: ones)
    assert evaluation_times(sampler, time_grid(steps)) == seen and len(seen) == each
    assert all(t > 0 for t in seen)


def test_evaluation_times_of_each_sampler():
    grid = time_grid(2)
    assert evaluation_times("euler", grid) == [1, 0.5] == evaluation_times("stochastic", grid)
    assert evaluation_times("heun", grid) == [1, 0.5, 0.5]
    assert evaluation_times("heun", grid.flip(0)) == [0, 0.5, 0.5, 1]
    assert evaluation_times("midpoint", grid) == [1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("sampler", ODE_SAMPLERS)
def test_a_straight_path_needs_one_step(sampler):
    clean, noise = torch.randn(2, 5, generator=seeded()).unbind(0)
    z = integrate(lambda z, t: noise - clean, noise, time_grid(1), sampler)
    torch.testing.assert_close(z, clean)


def test_after_each_step_the_latent_can_be_replaced():
    """As inpainting does: the known part is put back at the noise level reached, and at the end is what is known."""
    known, noise = torch.full((1, 1, 2, 4), 2.0), torch.randn(1, 1, 2, 4, generator=seeded())
    mask = torch.zeros_like(known)
    mask[..., 2:] = 1
    seen = []

    def after(step, t, z):
        seen.append((step, t.item()))
        return mask * z + (1 - mask) * interpolate(known, noise, t)

    for sampler in ODE_SAMPLERS:
        z = integrate(gaussian_velocity, noise, time_grid(4), sampler, after=after)
        plain = integrate(gaussian_velocity, noise, time_grid(4), sampler)
        assert torch.equal(z[..., :2], known[..., :2]) and torch.equal(z[..., 2:], plain[..., 2:])
    assert seen == [(0, 0.75), (1, 0.5), (2, 0.25), (3, 0.0)] * 3


def test_noise_is_asked_for_by_step_and_not_for_the_last():
    """So an image's noise can be addressed by image and step: then it does not depend on the batch it is in."""
    asked = []

    def fresh(images, step):
        asked.append(step)
        return torch.stack([torch.randn(3, generator=seeded(100 * i + step)) for i in images])

    start = torch.randn(2, 3, generator=seeded())
    both = integrate(curved_velocity, start, time_grid(3), "stochastic", lambda step: fresh((0, 1), step))
    second = integrate(curved_velocity, start[1:], time_grid(3), "stochastic", lambda step: fresh((1,), step))
    assert torch.equal(both[1:], second) and asked == [0, 1, 0, 1]


def test_wrong_integrations_are_refused():
    start = torch.zeros(1)
    with pytest.raises(SettingError, match="sampler='ddim'.*euler, heun, midpoint, stochastic"):
        integrate(gaussian_velocity, start, time_grid(2), "ddim")
    with pytest.raises(SettingError, match="sampler='stochastic' needs noise_at"):
        integrate(gaussian_velocity, start, time_grid(2), "stochastic")
    for times in ([1.0, 0.5, 0.5, 0.0], [0.0, 0.5, 0.5, 1.0], [0.0, 1.0, 0.5]):
        with pytest.raises(SettingError, match="must fall or rise"):
            integrate(gaussian_velocity, start, torch.tensor(times))
    integrate(gaussian_velocity, start, time_grid(1), "stochastic")  # one step adds no noise
