"""Linear attention against its explicit N x N form in float64, and at sizes where that form would not fit."""

import pytest
import torch
from torch import nn

from iris.errors import SettingError
from iris.nn.mixers.linear_attention import LinearAttention
from iris.randomness import initialise

DIM = 16


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_attention(width=None, heads=2):
    """Linear attention whose biases and scales are away from their initial values, so that each counts."""
    layer = initialise(LinearAttention(DIM, width, heads), 0)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=noise)
    return layer


def in_float64(layer):
    """``layer`` with torch's own norm, which computes in float64 where ours computes in float32."""
    for name in ("query_norm", "key_norm"):
        scale = getattr(layer, name).scale
        norm = nn.RMSNorm(scale.numel(), eps=1e-6)
        norm.weight = scale
        setattr(layer, name, norm)
    return layer.double()


def formula(layer, x):
    """weight_ij = relu(q_i) . relu(k_j), rows divided by their sum: every pair of tokens, in float64."""
    layer, shape, x = layer.double(), x.shape, x.double().flatten(1, 2)
    query, key, value = (x @ layer.qkv.weight.T + layer.qkv.bias).unflatten(-1, (3, layer.heads, -1)).unbind(2)
    query, key = (
        torch.relu(z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale)
        for z, scale in ((query, next(layer.query_norm.parameters())), (key, next(layer.key_norm.parameters())))
    )
    weight = torch.einsum("bihd,bjhd->bhij", query, key)
    weight = weight / (weight.sum(-1, keepdim=True) + 1e-6)
    y = torch.einsum("bhij,bjhd->bihd", weight, value).reshape(*shape[:3], -1)
    return y @ layer.out.weight.T + layer.out.bias


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6), (16, 16), (1, 1)], ids=str)
@pytest.mark.parametrize(("width", "heads"), [(16, 2), (24, 3), (8, 1)])
def test_it_is_the_explicit_form_with_its_gradients(grid, width, heads):
    layer = linear_attention(width, heads)
    x, direction = draw(2, *grid, DIM).double().requires_grad_(), draw(2, *grid, DIM, seed=7).double()
    in_float32 = layer(x.float())
    layer = in_float64(layer)
    y, expected = layer(x), formula(layer, x)
    torch.testing.assert_close(in_float32, expected.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    got, wanted = (torch.autograd.grad((out * direction).sum(), [x, *layer.parameters()]) for out in (y, expected))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_every_parameter_gets_a_gradient():
    layer = linear_attention()
    layer(draw(2, 4, 4, DIM)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 1e-4, name


def test_it_commutes_with_permutations():
    layer, x = linear_attention(), draw(2, 4, 5, DIM)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    expected = layer(x).flatten(1, 2)[:, order].view_as(x)
    torch.testing.assert_close(layer(x.flatten(1, 2)[:, order].view_as(x)), expected, rtol=0, atol=1e-5)


def test_a_query_orthogonal_to_every_key_gets_zero():
    layer = linear_attention()
    with torch.no_grad():
        layer.query_norm.scale.zero_()
    x = draw(1, 3, 3, DIM).requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, layer.out.bias.expand_as(y))
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype):
    layer, x = linear_attention(), draw(2, 8, 8, DIM)
    expected = layer(x)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.1)
    torch.testing.assert_close(layer.to(dtype)(x.to(dtype)).float(), expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_sums_over_many_tokens_stay_finite(dtype):
    """128 x 128 tokens with equal keys: each sum reaches 16,384 times a key, which float16 could not hold."""
    layer, x = linear_attention(), 10 * draw(1, 1, 1, DIM).expand(1, 128, 128, DIM) + draw(1, 128, 128, DIM, seed=1)
    x.requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        y = layer(x)
    assert y.isfinite().all()
    y.float().mean().backward()
    assert x.grad.isfinite().all() and all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(SettingError, match="model.mixer_width=18.*model.heads=4"):
        LinearAttention(DIM, width=18, heads=4)
