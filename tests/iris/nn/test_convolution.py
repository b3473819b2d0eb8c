"""Depthwise convolution against scipy and a dense convolution; how far it sees; its scale. And no mixing at all."""

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F

from iris.errors import SettingError
from iris.nn.mixers.convolution import Convolution3, Convolution7
from iris.nn.mixers.identity import Identity
from iris.randomness import initialise

DIM = 8

every_kernel = pytest.mark.parametrize("kind", [Convolution3, Convolution7])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def convolution(kind, dim=DIM, **options):
    layer = initialise(kind(dim, **options), 0)
    with torch.no_grad():
        for part in (layer.input, layer.depthwise, layer.out):
            part.bias.normal_(generator=torch.Generator().manual_seed(1))
    return layer


@every_kernel
@pytest.mark.parametrize("grid", [(8, 8), (5, 9), (1, 6), (2, 2), (1, 1)], ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_it_is_scipys_correlation_with_zeros_around(kind, grid):
    layer, x = convolution(kind, width=12), draw(2, *grid, DIM)
    weights = {name: parameter.detach().double().numpy() for name, parameter in layer.named_parameters()}
    y = x.double().numpy() @ weights["input.weight"].T + weights["input.bias"]
    for c in range(12):
        kernel = weights["depthwise.weight"][None, c, 0]
        y[..., c] = scipy.ndimage.correlate(y[..., c], kernel, mode="constant") + weights["depthwise.bias"][c]
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    expected = y @ weights["out.weight"].T + weights["out.bias"]
    torch.testing.assert_close(layer(x), torch.from_numpy(expected).float(), rtol=0, atol=1e-5)


@every_kernel
def test_its_gradients_are_those_of_a_dense_convolution(kind):
    layer = convolution(kind).double()
    x, direction = draw(2, 5, 6, DIM).double().requires_grad_(), draw(2, 5, 6, DIM, seed=2).double()
    dense = torch.diag_embed(layer.depthwise.weight[:, 0].permute(1, 2, 0)).permute(2, 3, 0, 1)
    y = F.conv2d(F.pad(layer.input(x).permute(0, 3, 1, 2), [kind.reach] * 4), dense, layer.depthwise.bias)
    expected = layer.out(F.gelu(y.permute(0, 2, 3, 1), approximate="tanh"))
    leaves = [x, *layer.parameters()]
    got, wanted = (torch.autograd.grad((out * direction).sum(), leaves) for out in (layer(x), expected))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@every_kernel
def test_it_sees_exactly_as_far_as_its_reach(kind):
    layer, x = convolution(kind), draw(1, 9, 10, DIM).requires_grad_()
    for row, column in ((0, 0), (4, 5), (8, 2)):
        (influence,) = torch.autograd.grad(layer(x)[0, row, column].abs().sum(), x)
        rows, columns = (torch.arange(9) - row).abs()[:, None], (torch.arange(10) - column).abs()
        assert torch.equal(influence.abs().sum(-1)[0] > 0, torch.maximum(rows, columns) <= kind.reach)


@every_kernel
@pytest.mark.parametrize("constant", [False, True], ids=["white", "constant"])
def test_the_scale_of_its_input_is_kept_at_the_start(kind, constant):
    layer = initialise(kind(64), 0)
    x = draw(64, 1, 1, 64).expand(64, 12, 12, 64) if constant else draw(16, 12, 12, 64)
    with torch.no_grad():
        y = layer.input(x)
        inside = layer.depthwise(y.permute(0, 3, 1, 2))[:, :, 3:-3, 3:-3]
        assert 0.8 < inside.std() / y.std() < 1.25
        assert 0.4 < layer(x).std() / x.std() < 1


@every_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(kind, dtype):
    layer, x = convolution(kind), draw(2, 5, 6, DIM)
    expected = layer(x)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(layer(x).float(), expected, rtol=0, atol=0.1)
    torch.testing.assert_close(layer.to(dtype)(x.to(dtype)).float(), expected, rtol=0, atol=0.1)


@every_kernel
def test_width_that_heads_do_not_divide_is_refused(kind):
    with pytest.raises(SettingError, match="model.mixer_width=18.*model.heads=4"):
        kind(DIM, width=18, heads=4)


def test_the_identity_gives_back_what_it_gets():
    layer, x = initialise(Identity(DIM, width=18, heads=4), 0), draw(2, 3, 4, DIM)
    assert torch.equal(layer(x), x)
    assert not list(layer.parameters()) and Identity.reach == 0 and not Identity.resizable
