"""Softmax attention against torch's own module and against explicit float64 formulas, for each kind of position."""

import numpy as np
import pytest
import torch
from torch import nn

from iris.errors import SettingError
from iris.nn.mixers.attention import Attention, AttentionOptions, PositionTable
from iris.randomness import initialise

POSITIONS = ("rotary", "learned", "none")
DIM, HEADS = 16, 2

every_position = pytest.mark.parametrize("position", POSITIONS)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention(position="rotary", width=None, heads=HEADS):
    """Attention whose biases, scales and table are away from their initial values, so that each counts."""
    layer = initialise(Attention(DIM, width, heads, AttentionOptions(position)), 0)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim != 2:
                parameter += 0.3 * torch.randn(parameter.shape, generator=noise)
    return layer


def gradients(y, leaves):
    direction = draw(*y.shape, seed=7).to(y.dtype)
    return torch.autograd.grad((y * direction).sum(), leaves)


def test_without_norms_and_positions_it_is_torchs_module():
    layer = attention("none").double()
    layer.query_norm = layer.key_norm = nn.Identity()
    oracle = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    with torch.no_grad():
        for ours, theirs in (
            (layer.qkv.weight, oracle.in_proj_weight),
            (layer.qkv.bias, oracle.in_proj_bias),
            (layer.out.weight, oracle.out_proj.weight),
            (layer.out.bias, oracle.out_proj.bias),
        ):
            theirs.copy_(ours)
    x = draw(2, 3, 5, DIM).double().requires_grad_()
    tokens = x.flatten(1, 2)
    y, expected = layer(x), oracle(tokens, tokens, tokens, need_weights=False)[0].view_as(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    got = gradients(y, [x, *layer.qkv.parameters(), *layer.out.parameters()])
    wanted = gradients(expected, [x, oracle.in_proj_weight, oracle.in_proj_bias, *oracle.out_proj.parameters()])
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def resized(table, h, w):
    """Bilinear interpolation of [n, n, D] at the centres of h x w cells, as weights on the nearest two places."""

    def weights(length, n):
        place = np.clip((np.arange(length) + 0.5) * n / length - 0.5, 0, n - 1)
        return torch.from_numpy(np.stack([np.interp(place, np.arange(n), unit) for unit in np.eye(n)], 1))

    return torch.einsum("hi,wj,ijd->hwd", weights(h, table.shape[0]), weights(w, table.shape[1]), table)


def formula(layer, x, position):
    """Every step in float64 and written out: QK-norm, rotation of complex numbers, explicit softmax."""
    layer, (batch, h, w, _) = layer.double(), x.shape
    x = x.flatten(1, 2)
    placed = x + resized(layer.position.table, h, w).flatten(0, 1) if position == "learned" else x
    rows, bias = layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3)
    query, key, value = (
        (source @ rows[i].T + bias[i]).unflatten(-1, (layer.heads, -1)) for i, source in enumerate((placed, placed, x))
    )
    query = query / (query.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.query_norm.scale
    key = key / (key.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.key_norm.scale
    depth = query.shape[-1]
    if position == "rotary":
        frequency = 100.0 ** (-torch.arange(depth // 4).double() / (depth // 4))
        row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        angle = torch.cat([row.reshape(-1, 1) * frequency, column.reshape(-1, 1) * frequency], -1)[:, None]
        turn = torch.complex(angle.cos(), angle.sin())

        def turned(z):
            z = torch.complex(z[..., : depth // 2], z[..., depth // 2 :]) * turn
            return torch.cat([z.real, z.imag], -1)

        query, key = turned(query), turned(key)
    score = torch.einsum("bihd,bjhd->bhij", query, key) / depth**0.5
    weight = torch.exp(score - score.amax(-1, keepdim=True))
    weight = weight / weight.sum(-1, keepdim=True)
    y = torch.einsum("bhij,bjhd->bihd", weight, value).reshape(batch, h, w, -1)
    return y @ layer.out.weight.T + layer.out.bias


@every_position
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6), (16, 16), (1, 1), (20, 3)], ids=str)
def test_it_is_the_written_out_formula_with_its_gradients(position, grid):
    layer, oracle = attention(position), attention(position)
    x = draw(2, *grid, DIM).requires_grad_()
    y, expected = layer(x), formula(oracle, x.double(), position)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)
    got, wanted = gradients(y, [x, *layer.parameters()]), gradients(expected, [x, *oracle.parameters()])
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * max(1, theirs.abs().max())


def test_the_formula_tells_positions_and_norms_apart():
    x = draw(1, 4, 4, DIM).double()
    outputs = [formula(attention(position), x, position) for position in POSITIONS]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (outputs[i] - outputs[j]).abs().max() > 1e-2
    flat = attention("none")
    nn.init.ones_(flat.query_norm.scale)
    assert (formula(flat, x, "none") - outputs[2]).abs().max() > 1e-2


@every_position
def test_only_attention_without_positions_commutes_with_permutations(position):
    layer, x = attention(position), draw(2, 4, 5, DIM)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = layer(x.flatten(1, 2)[:, order].view_as(x))
    error = (shuffled - layer(x).flatten(1, 2)[:, order].view_as(x)).abs().max()
    assert error < 1e-5 if position == "none" else error > 1e-2


def test_rotary_scores_depend_on_relative_places_alone(monkeypatch):
    """With the same content everywhere, the score of two tokens depends on how many rows and columns lie between."""
    seen = []
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda q, k, v: seen.append(q @ k.mT) or v)
    attention("rotary")(draw(1, 1, 1, DIM).expand(1, 3, 4, DIM))
    score = seen[0][0, 0].view(3, 4, 3, 4)
    for dy in (0, 1, 2):
        for dx in (0, 1, 3):
            same = [score[r, c, r + dy, c + dx].item() for r in range(3 - dy) for c in range(4 - dx)]
            assert max(same) - min(same) < 1e-5
    assert score.std() > 1e-2


def test_the_table_is_resized_bilinearly():
    table = initialise(PositionTable(8), 0)
    assert table.table.std().item() == pytest.approx(0.02, rel=0.1)
    assert table(16, 16) is table.table
    for grid in ((8, 8), (5, 7), (32, 16), (1, 1), (16, 15)):
        expected = resized(table.table.double(), *grid).float()
        torch.testing.assert_close(table(*grid), expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        table.table.fill_(3.0)
    torch.testing.assert_close(table(7, 40), torch.full((7, 40, 8), 3.0))


@every_position
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(position, dtype):
    layer, x = attention(position), draw(2, 5, 6, DIM)
    expected = layer(x)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(layer(x).float(), expected, rtol=0, atol=0.1)
    torch.testing.assert_close(layer.to(dtype)(x.to(dtype)).float(), expected, rtol=0, atol=0.1)


@every_position
def test_it_exports_on_a_new_grid_and_runs_on(position):
    layer, x = attention(position), draw(1, 6, 11, DIM)
    layer(x)
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), layer(x))


def test_width_need_not_be_dim():
    assert attention("learned", width=24)(draw(1, 3, 4, DIM)).shape == (1, 3, 4, DIM)


def test_only_rotary_positions_need_heads_of_a_multiple_of_four():
    with pytest.raises(SettingError, match=r"model.mixer_width=18 .* 4 \* model.heads=12"):
        Attention(DIM, width=18, heads=3)
    for position in ("learned", "none"):
        attention(position, width=18, heads=3)
        with pytest.raises(SettingError, match="model.mixer_width=18 .* model.heads=4"):
            attention(position, width=18, heads=4)


def test_an_unknown_position_is_refused():
    with pytest.raises(SettingError, match="attention.position='alibi' is unknown; allowed: rotary, learned, none"):
        AttentionOptions("alibi")
