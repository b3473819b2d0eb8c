"""What every latent must do. A new line in ``LATENTS`` is tested here."""

import copy

import pytest
import torch
from conformance import (
    check_gradients,
    compiled,
    drawn,
    expected_failures,
    exported,
    latent_cases,
    loss,
    parameter_count,
    relative_error,
)
from torch import nn

from iris.errors import SettingError

SIZES = [(2, 2), (3, 2), (1, 4)]  # of the latent's grid


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", expected_failures(metafunc.function.__name__, latent_cases()))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Where latents that need files find them, written once."""
    return tmp_path_factory.mktemp("latents")


@pytest.fixture
def latent(case, files):
    return case.make(files)


def images(latent, count=2, rows=2, columns=3, seed=0):
    """Smooth colours and noise in [-1, 1], ``rows`` x ``columns`` positions of the latent's grid large."""
    draws = torch.Generator().manual_seed(seed)
    noise = torch.rand(count, 3, rows * latent.factor, columns * latent.factor, generator=draws) - 0.5
    return noise + torch.rand(count, 3, 1, 1, generator=draws) - 0.5


def latents(latent, count=2, rows=2, columns=3, seed=0):
    return torch.randn(count, latent.channels, rows, columns, generator=torch.Generator().manual_seed(seed))


def both_ways(latent, x):
    """Raw latents, log-variances where there is a posterior, and the images made of the latents, not clipped."""
    parts = latent.posterior(x) if hasattr(latent, "posterior") else (latent.analyse(x),)
    return *parts, latent.synthesise(parts[0])


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_shapes(latent, size):
    for count in (1, 3):
        x = images(latent, count, *size)
        z = latent.encode(x)
        assert z.shape == (count, latent.channels, *size) and z.dtype == x.dtype and z.isfinite().all()
        y = latent.decode(z)
        assert y.shape == x.shape and y.isfinite().all() and y.min() >= -1 and y.max() <= 1


def test_grid_is_that_of_encode(latent):
    x = images(latent, 1, 3, 2)
    assert latent.grid(*x.shape[-2:]) == tuple(latent.encode(x).shape[-2:]) == (3, 2)


def test_nothing_is_lost_without_parameters(latent):
    if parameter_count(latent):
        pytest.skip("has parameters")
    x = images(latent)
    torch.testing.assert_close(latent.decode(latent.encode(x)), x, rtol=0, atol=1e-6)
    latent.standardise(images(latent, 40, seed=1))
    torch.testing.assert_close(latent.decode(latent.encode(x)), x, rtol=0, atol=1e-5)


def test_standardise_gives_mean_zero_and_deviation_one(latent):
    x = images(latent, 40) * 0.5 + 0.2
    with torch.no_grad():
        raw = latent.encode(x)
        assert (raw.mean((0, 2, 3)).abs() > 0.01).any() and ((raw.std((0, 2, 3)) - 1).abs() > 0.1).any()
        decoded = latent.decode(raw)
        latent.standardise(x, batch=7)
        z = latent.encode(x)
        torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(latent.channels), rtol=0, atol=2e-3)
        torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(latent.channels), rtol=0, atol=2e-3)
        torch.testing.assert_close(latent.decode(z), decoded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["height", "width"])
def test_size_that_the_factor_does_not_divide_is_refused(latent, side):
    if latent.factor == 1:
        pytest.skip("every size is right")
    x = images(latent, 2)
    x = x[..., 1:, :] if side == "height" else x[..., 1:]
    for refuse in (latent.encode, latent.standardise):
        with pytest.raises(SettingError, match=f"{x.shape[-2]}x{x.shape[-1]}.*{latent.factor}"):
            refuse(x)


def test_batch_elements_are_independent(latent):
    x, z = images(latent, 3), latents(latent, 3)
    for function, batch in ((latent.encode, x), (latent.decode, z)):
        together = function(batch)
        for i in range(3):
            torch.testing.assert_close(function(batch[i : i + 1]), together[i : i + 1], rtol=1e-4, atol=1e-5)
        assert relative_error(together[0], together[1]) > 1e-2


def test_gradients_reach_every_parameter_and_the_input(latent):
    x = images(latent, 3).requires_grad_()
    loss(*both_ways(latent, x)).backward()
    if latent.trained:
        assert parameter_count(latent) and all(p.requires_grad for p in latent.parameters())
        check_gradients(latent, input=x)
    else:
        assert not any(p.requires_grad for p in latent.parameters())
        check_gradients(nn.Identity(), input=x)


def test_weights_that_came_with_it_are_kept(case, latent):
    before = copy.deepcopy(latent.state_dict())
    drawn(latent, seed=5)
    changed = any(not torch.equal(before[name], value) for name, value in latent.state_dict().items())
    assert changed == latent.trained
    assert not latent.frozen or (parameter_count(latent) and not latent.trained)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=["bf16", "fp16"])
def test_autocast_is_close_to_float32(latent, dtype, tolerance):
    x, z = images(latent), latents(latent)
    for function, batch in ((latent.encode, x), (latent.synthesise, z)):
        with torch.autocast("cpu", dtype):
            y = function(batch)
        assert y.isfinite().all() and relative_error(y, function(batch)) < tolerance


def test_same_seed_same_output_other_seed_other_output(case, latent, files):
    x, z = images(latent), latents(latent)
    same, other = case.make(files), case.make(files, seed=1)
    for way, batch in (("encode", x), ("decode", z)):
        expected = getattr(latent, way)(batch)
        assert torch.equal(getattr(latent, way)(batch), expected) and torch.equal(getattr(same, way)(batch), expected)
        assert torch.equal(getattr(other, way)(batch), expected) != latent.trained


def test_training_and_evaluation_agree(latent):
    x, z = images(latent), latents(latent)
    with torch.inference_mode():
        evaluated = [latent.eval().encode(x).clone(), latent.decode(z).clone()]
    for one, two in zip([latent.train().encode(x), latent.decode(z)], evaluated, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_state_dict_round_trip(case, latent, files):
    """Weights, mean and standard deviation."""
    latent.standardise(images(latent, 20) * 0.5 - 0.3)
    other, x, z = case.make(files, seed=1), images(latent), latents(latent)
    assert not torch.equal(other.encode(x), latent.encode(x))
    other.load_state_dict(copy.deepcopy(latent.state_dict()))
    assert torch.equal(other.encode(x), latent.encode(x)) and torch.equal(other.decode(z), latent.decode(z))


def test_compiles(case, latent):
    """torch.compile in one graph, encoder and decoder, forward and backward as without it."""
    results, batch = [], images(latent)
    for run in (compiled(lambda x: both_ways(latent, x), case), lambda x: both_ways(latent, x)):
        latent.zero_grad()
        x = batch.clone().requires_grad_()
        outputs = run(x)
        loss(*outputs).backward()
        results.append([*outputs, x.grad, *(p.grad for p in latent.parameters() if p.requires_grad)])
    for traced, eager in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-5)


class Decoder(nn.Module):
    """A latent's ``decode`` as a module of its own, which is what a phone runs."""

    def __init__(self, latent):
        super().__init__()
        self.latent = latent

    def forward(self, z):
        return self.latent.decode(z)


def test_decoder_exports(latent):
    """torch.export with a free batch size, output as without it."""
    latent.standardise(images(latent, 20))
    with torch.no_grad():
        program = exported(Decoder(latent).eval(), latents(latent))
        for count in (1, 2, 5):
            z = latents(latent, count)
            torch.testing.assert_close(program(z), latent.decode(z), rtol=1e-5, atol=1e-5)
