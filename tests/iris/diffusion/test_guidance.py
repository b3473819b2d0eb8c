"""Guidance: formula, interval and its cost, rescaling against diffusers, guided Gaussian flows in closed form."""

import math

import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg

from iris.diffusion.flow import SAMPLERS, integrate, time_grid
from iris.diffusion.guidance import Guidance, evaluations
from iris.errors import SettingError

SHAPE = (2, 3, 4, 4)


def draw(count, seed=0, dtype=torch.float64):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype).unbind(0)


class Halves:
    """A model whose conditional and unconditional velocities are given; it notes how many it was asked for."""

    def __init__(self, conditional, unconditional):
        self.conditional, self.unconditional, self.asked = conditional, unconditional, []

    def __call__(self, z, t, both):
        self.asked.append(2 if both else 1)
        return torch.cat([self.conditional, self.unconditional]) if both else self.conditional


def test_without_guidance_the_model_is_asked_for_one_half():
    conditional, unconditional, z = draw(3)
    model = Halves(conditional, unconditional)
    assert Guidance().velocity(model, z, torch.tensor(0.5)) is conditional
    assert model.asked == [1]


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
def test_guidance_is_its_formula(scale):
    conditional, unconditional, z = draw(3)
    v = Guidance(scale).velocity(Halves(conditional, unconditional), z, torch.tensor(0.5))
    torch.testing.assert_close(v, unconditional + scale * (conditional - unconditional))


def test_default_guidance_is_that_of_finished_trials():
    """Bit for bit: their samples depend on it."""
    conditional, unconditional, z = draw(3, dtype=torch.float32)
    v = Guidance(3.0).velocity(Halves(conditional, unconditional), z, torch.tensor(0.5))
    assert torch.equal(v, torch.lerp(unconditional, conditional, 3.0))


@pytest.mark.parametrize(("start", "end"), [(0.1, 0.3), (0.7, 0.9), (0.0, 1.0)])
def test_outside_the_interval_the_conditional_velocity_alone_is_evaluated(start, end):
    """Bounds are inside, although a grid's 0.3 in float32 lies above Python's, and its 0.7 below."""
    conditional, unconditional, z = draw(3)
    guidance = Guidance(3.0, start, end)
    for t in time_grid(10):
        model = Halves(conditional, unconditional)
        v = guidance.velocity(model, z, t)
        inside = start - 0.01 < t < end + 0.01
        assert model.asked == [2 if inside else 1] and guidance.active(t) == inside
        assert torch.equal(v, torch.lerp(unconditional, conditional, 3.0) if inside else conditional)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize(
    "guidance",
    [Guidance(), Guidance(3.0), Guidance(3.0, 0.2, 0.8), Guidance(3.0, 0.9, 1.0, 0.7), Guidance(1.0, 0.2, 0.8)],
    ids=str,
)
@pytest.mark.parametrize(
    "times",
    [time_grid(1), time_grid(5, 3.0), time_grid(8, 1.0, 0.6), time_grid(4).flip(0)],
    ids=["1", "5 shifted", "8 from 0.6", "4 inverted"],
)
def test_evaluations_are_those_made(sampler, guidance, times):
    conditional, unconditional, z = draw(3)
    model = Halves(conditional, unconditional)
    integrate(lambda z, t: guidance.velocity(model, z, t), z, times, sampler, lambda step: z)
    assert evaluations(sampler, times, guidance) == sum(model.asked)


@pytest.mark.parametrize(("sampler", "each"), [("euler", 4), ("heun", 7), ("midpoint", 8), ("stochastic", 4)])
def test_guidance_everywhere_counts_twice(sampler, each):
    assert evaluations(sampler, time_grid(4), Guidance()) == each
    assert evaluations(sampler, time_grid(4), Guidance(3.0)) == 2 * each


@pytest.mark.parametrize("rescale", [0.3, 1.0])
@pytest.mark.parametrize("t", [0.05, 0.5, 1.0])
def test_rescaling_agrees_with_diffusers_on_the_estimate_of_the_clean_latent(rescale, t):
    conditional, unconditional, z = draw(3)
    t = torch.tensor(t, dtype=torch.float64)
    v = Guidance(5.0, rescale=rescale).velocity(Halves(conditional, unconditional), z, t)
    guided = unconditional + 5 * (conditional - unconditional)
    expected = rescale_noise_cfg(z - t * guided, z - t * conditional, rescale)
    torch.testing.assert_close(z - t * v, expected, rtol=0, atol=1e-9)
    assert (expected - (z - t * guided)).abs().max() > 0.01


def test_full_rescaling_gives_each_image_the_deviation_of_its_conditional_estimate():
    conditional, unconditional, z = draw(3)
    t = torch.tensor(0.8, dtype=torch.float64)
    v = Guidance(5.0, rescale=1.0).velocity(Halves(conditional, unconditional), z, t)
    deviation = lambda velocity: (z - t * velocity).flatten(1).std(1)  # noqa: E731
    torch.testing.assert_close(deviation(v), deviation(conditional))
    assert (deviation(torch.lerp(unconditional, conditional, 5.0)) > 1.5 * deviation(conditional)).all()


def test_rescaling_the_velocity_itself_would_leave_noise_behind():
    """Two-valued pictures known but for their contrast: the guided one-step sample must be the picture, scaled."""
    picture = torch.where(draw(1)[0] > 0, 1.0, -1.0).double()
    (noise,) = draw(1, seed=1)
    t = torch.tensor(1.0, dtype=torch.float64)
    conditional, unconditional = noise - picture, noise - 0.2 * picture
    ours = noise - Guidance(6.0, rescale=1.0).velocity(Halves(conditional, unconditional), noise, t)
    torch.testing.assert_close(ours, picture)
    guided = torch.lerp(unconditional, conditional, 6.0)
    theirs = noise - rescale_noise_cfg(guided, conditional, 1.0)
    assert (theirs.abs() - theirs.abs().mean()).std() > 0.2


def test_rescaling_at_time_zero_changes_nothing():
    conditional, unconditional, z = draw(3)
    v = Guidance(5.0, rescale=1.0).velocity(Halves(conditional, unconditional), z, torch.tensor(0.0))
    assert torch.equal(v, torch.lerp(unconditional, conditional, 5.0))


@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0])
def test_guided_gaussian_flows_end_at_the_extrapolated_mean(scale):
    """With equal deviations the guided velocity is that of the mean m_u + scale (m_c - m_u)."""
    means, deviation = (0.5, -0.2), 0.4

    def velocity(mean, z, t):
        variance = (1 - t) ** 2 * deviation**2 + t**2
        return -mean + (t - (1 - t) * deviation**2) / variance * (z - (1 - t) * mean)

    def model(z, t, both):
        return torch.cat([velocity(mean, z, t) for mean in means[: 1 + both]])

    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    guidance, times = Guidance(scale), torch.linspace(1, 0, 401, dtype=torch.float64)
    z = integrate(lambda z, t: guidance.velocity(model, z, t), noise, times, "heun")
    mean = means[1] + scale * (means[0] - means[1])
    torch.testing.assert_close(z, mean + deviation * noise, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scale": -1.0}, "sample.guidance=-1.0"),
        ({"scale": math.nan}, "sample.guidance=nan"),
        ({"start": 0.6, "end": 0.4}, "sample.guidance_start=0.6.*sample.guidance_end=0.4"),
        ({"end": 1.5}, "sample.guidance_end=1.5"),
        ({"start": -0.1}, "sample.guidance_start=-0.1"),
        ({"rescale": 1.5}, "sample.guidance_rescale=1.5"),
    ],
)
def test_wrong_guidance_is_refused(changes, named):
    with pytest.raises(SettingError, match=named):
        Guidance(**changes)
