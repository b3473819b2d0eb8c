"""RG-LRU against its formula in float64 and against Hugging Face's implementation; the four scan directions."""

import math

import pytest
import torch

from iris.errors import SettingError
from iris.mixers.recurrence import RGLRU, RecurrencePathway, merge_directions, split_directions
from iris.randomness import initialise

WIDTH, BLOCKS, LENGTH = 8, 2, 21


def make(seed=0, width=WIDTH, blocks=BLOCKS):
    unit = initialise(RGLRU(width, blocks), seed)
    with torch.no_grad():  # biases that start at zero would not be tested
        for gate in (unit.input_gate, unit.recurrence_gate):
            gate.bias.normal_(generator=torch.Generator().manual_seed(seed))
    return unit


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_the_formula(unit, x):
    """Griffin's equations with Python floats (float64), one token and channel at a time."""
    batch, length, width = x.shape
    block = width // unit.input_gate.blocks
    value = lambda gate, n, t, c: sigmoid(  # noqa: E731
        gate.bias[c].item()
        + sum(
            x[n, t, c // block * block + k].item() * gate.weight[c // block, k, c % block].item() for k in range(block)
        )
    )
    out = torch.zeros(batch, length, width, dtype=torch.float64)
    for n in range(batch):
        for c in range(width):
            state = 0.0
            for t in range(length):
                log_a = -8 * value(unit.recurrence_gate, n, t, c) * math.log1p(math.exp(unit.decay[c].item()))
                gated = value(unit.input_gate, n, t, c) * x[n, t, c].item()
                if t == 0:
                    state = gated
                else:
                    state = math.exp(log_a) * state + math.sqrt(1 - math.exp(2 * log_a)) * gated
                out[n, t, c] = state
    return out


@pytest.mark.parametrize("length", [1, 2, 16, LENGTH])
def test_rglru_is_its_formula(length):
    unit, x = make(), draw(2, length, WIDTH)
    torch.testing.assert_close(unit(x).double(), by_the_formula(unit, x), rtol=0, atol=1e-5)


def test_rglru_agrees_with_transformers():
    module = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    from transformers import RecurrentGemmaConfig

    width, blocks, length = 64, 4, 33
    unit, x = make(width=width, blocks=blocks), draw(2, length, width)
    config = RecurrentGemmaConfig(
        hidden_size=width, lru_width=width, num_attention_heads=blocks, num_key_value_heads=1, num_hidden_layers=1,
        intermediate_size=2 * width, vocab_size=8,
    )
    other = module.RecurrentGemmaRglru(config)
    with torch.no_grad():
        other.recurrent_param.copy_(unit.decay)
        for theirs, ours in (("input_gate", unit.input_gate), ("recurrent_gate", unit.recurrence_gate)):
            getattr(other, f"{theirs}_weight").copy_(ours.weight)
            getattr(other, f"{theirs}_bias").copy_(ours.bias.view(blocks, -1))
    other.recurrent_states = None  # it keeps the state of its last call
    positions = torch.arange(length).expand(2, -1)
    theirs, ours = other(x, positions), unit(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    parameters = [(unit.decay, other.recurrent_param), (unit.input_gate.weight, other.input_gate_weight),
                  (unit.recurrence_gate.weight, other.recurrent_gate_weight)]
    weights = draw(2, length, width, seed=3)
    got = torch.autograd.grad((ours * weights).sum(), [p for p, _ in parameters])
    expected = torch.autograd.grad((theirs * weights).sum(), [p for _, p in parameters])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_the_first_token_is_not_scaled_down():
    unit, x = make(), draw(3, 4, WIDTH)
    expected = torch.sigmoid(unit.input_gate(x)) * x
    torch.testing.assert_close(unit(x)[:, 0], expected[:, 0])
    assert (unit(x)[:, 1] - expected[:, 1]).abs().max() > 1e-2


def test_decay_starts_as_the_paper_states():
    """sigmoid(-L)^8 is uniform in [0.9, 0.999]."""
    unit = initialise(RGLRU(4096, 4), 0)
    start = torch.sigmoid(-unit.decay) ** 8
    assert 0.9 - 1e-4 <= start.min() < 0.903 and 0.996 < start.max() <= 0.999 + 1e-4
    assert start.mean().item() == pytest.approx(0.9495, abs=2e-3)
    assert start.std().item() == pytest.approx(0.099 / math.sqrt(12), rel=0.05)


@pytest.mark.parametrize("decay", [-60.0, 30.0])
def test_gradients_stay_finite_at_extreme_decays(decay):
    unit, x = make(), draw(1, 40, WIDTH).requires_grad_()
    with torch.no_grad():
        unit.decay.fill_(decay)
    y = unit(x)
    y.square().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in unit.parameters())


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (5, 3), (1, 6), (6, 1)], ids=str)
def test_merge_undoes_split(grid):
    x = draw(2, *grid, 8)
    assert torch.equal(merge_directions(split_directions(x), *grid), x)
    y = draw(2, grid[0] * grid[1], 8, seed=1)
    assert torch.equal(split_directions(merge_directions(y, *grid)), y)


def test_directions_are_rows_and_columns_both_ways():
    h, w = 2, 3
    number = torch.arange(h * w).view(1, h, w, 1).expand(1, h, w, 4)
    sequences = split_directions(number)[0].T.tolist()
    assert sequences == [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 3, 1, 4, 2, 5], [5, 2, 4, 1, 3, 0]]


def test_each_direction_sees_what_is_behind_it():
    """A change in one token reaches, in each quarter of the channels, the tokens that follow it in that order."""
    h, w, width = 3, 4, 8
    pathway = initialise(RecurrencePathway(width, heads=2), 0)
    x = draw(1, h, w, width)
    before = pathway.lru(split_directions(pathway.input(x)))
    other = x.clone()
    other[0, 1, 2] += 1
    moved = merge_directions(pathway.lru(split_directions(pathway.input(other))) - before, h, w)[0].abs() > 1e-6
    reached = [quarter.any(-1) for quarter in moved.chunk(4, -1)]
    place = torch.arange(h * w).view(h, w)
    column_place = torch.arange(h * w).view(w, h).T
    assert torch.equal(reached[0], place >= place[1, 2])
    assert torch.equal(reached[1], place <= place[1, 2])
    assert torch.equal(reached[2], column_place >= column_place[1, 2])
    assert torch.equal(reached[3], column_place <= column_place[1, 2])


def test_a_constant_image_is_not_amplified():
    """Without the norm the gain of a constant input is up to sqrt((1 + a)/(1 - a)), 45 at a = 0.999."""
    pathway = initialise(RecurrencePathway(16, heads=2), 0)
    x = torch.ones(1, 16, 16, 16)
    assert pathway(x).square().mean().sqrt() < 3


def test_width_that_directions_do_not_divide_is_refused():
    with pytest.raises(SettingError, match="model.mixer_width=6.*scan directions"):
        RecurrencePathway(16, width=6, heads=2)
