"""RG-LRU against its formula in float64 and against Hugging Face's implementation; scan directions and resets."""

import itertools
import math

import pytest
import torch

from iris.errors import SettingError
from iris.nn.mixers.recurrence import RGLRU, RecurrenceOptions, RecurrencePathway, merge_directions, split_directions
from iris.randomness import initialise

WIDTH, BLOCKS, LENGTH = 8, 2, 21
GRIDS = [(4, 4), (3, 5), (5, 3), (1, 6), (6, 1), (1, 1)]
DECAYS, SCANS, RESETS = ("paper", "code"), ("cross4", "raster2"), ("sequence", "row")
OPTIONS = [RecurrenceOptions(*o) for o in itertools.product(DECAYS, SCANS, RESETS)]

every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"{o.decay}-{o.scan}-{o.reset}")


def make(seed=0, width=WIDTH, blocks=BLOCKS, decay="paper"):
    unit = initialise(RGLRU(width, blocks, decay), seed)
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
        hidden_size=width,
        lru_width=width,
        num_attention_heads=blocks,
        num_key_value_heads=1,
        num_hidden_layers=1,
        intermediate_size=2 * width,
        vocab_size=8,
    )
    other = module.RecurrentGemmaRglru(config)
    with torch.no_grad():
        other.recurrent_param.copy_(unit.decay)
        for theirs, ours in (("input_gate", unit.input_gate), ("recurrent_gate", unit.recurrence_gate)):
            getattr(other, f"{theirs}_weight").copy_(ours.weight)
            getattr(other, f"{theirs}_bias").copy_(ours.bias.view(blocks, -1))
    other.recurrent_states = None  # it keeps the state of its last call
    positions = torch.arange(length).expand(2, -1)
    x_theirs, x_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    theirs, ours = other(x_theirs, positions), unit(x_ours)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    pairs = [(x_ours, x_theirs), (unit.decay, other.recurrent_param)]
    for mine, yours in (("input_gate", "input_gate"), ("recurrence_gate", "recurrent_gate")):
        gate = getattr(unit, mine)
        pairs += [(gate.weight, getattr(other, f"{yours}_weight")), (gate.bias, getattr(other, f"{yours}_bias"))]
    weights = draw(2, length, width, seed=3)
    got = torch.autograd.grad((ours * weights).sum(), [p for p, _ in pairs])
    expected = torch.autograd.grad((theirs * weights).sum(), [p for _, p in pairs])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b.view_as(a), rtol=0, atol=1e-5 * b.abs().max().item() + 1e-5)


def in_float64(unit, x):
    """The same equations as torch operations in float64, whose gradients are autograd's through the loop."""
    named = {name: p.detach().double().requires_grad_() for name, p in unit.named_parameters()}
    gates = {}
    for gate in ("input_gate", "recurrence_gate"):
        mixed = torch.block_diag(*named[f"{gate}.weight"])
        gates[gate] = torch.sigmoid(x @ mixed + named[f"{gate}.bias"])
    a = torch.sigmoid(-named["decay"]) ** (8 * gates["recurrence_gate"])
    gated = gates["input_gate"] * x
    states = [gated[:, 0]]
    for t in range(1, x.shape[1]):
        states.append(a[:, t] * states[-1] + torch.sqrt(1 - a[:, t] ** 2) * gated[:, t])
    return torch.stack(states, 1), named


@pytest.mark.parametrize("decay", ["paper", "code"])
def test_gradients_are_those_of_a_float64_loop(decay):
    unit, x = make(decay=decay), draw(2, LENGTH, WIDTH).requires_grad_()
    x64, weights = x.detach().double().requires_grad_(), draw(2, LENGTH, WIDTH, seed=4)
    expected, named = in_float64(unit, x64)
    got = unit(x)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, theirs in [(x.grad, x64.grad)] + [(p.grad, named[name].grad) for name, p in unit.named_parameters()]:
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


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


def test_decay_starts_as_the_code_has_it():
    """sigmoid(-L)^2 is uniform in [0.9^2, 0.999^2]."""
    unit = initialise(RGLRU(2**16, 2**14, "code"), 0)
    start = torch.sigmoid(-unit.decay.detach().double()) ** 2
    low, high = 0.9**2, 0.999**2
    assert low - 1e-5 <= start.min() < low + 1e-4 and high - 1e-4 < start.max() <= high + 1e-5
    assert start.mean().item() == pytest.approx((low + high) / 2, abs=8e-4)  # a uniform root would be 0.0017 lower
    assert start.std().item() == pytest.approx((high - low) / math.sqrt(12), rel=0.01)


@pytest.mark.parametrize(("decay", "expected"), [("paper", (0.951, 0.974, 0.997)), ("code", (0.671, 0.817, 0.977))])
def test_decay_at_a_neutral_gate(decay, expected):
    """5 %, 50 % and 95 % of a = sigmoid(-L)^(8/2) over channels."""
    unit = initialise(RGLRU(8192, 4, decay), 0)
    found = (torch.sigmoid(-unit.decay.detach().double()) ** 4).quantile(torch.tensor([0.05, 0.5, 0.95]).double())
    assert found.tolist() == pytest.approx(expected, abs=6e-3)


@pytest.mark.parametrize("decay", [-60.0, 30.0])
def test_gradients_stay_finite_at_extreme_decays(decay):
    unit, x = make(), draw(1, 40, WIDTH).requires_grad_()
    with torch.no_grad():
        unit.decay.fill_(decay)
    y = unit(x)
    y.square().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in unit.parameters())


@every_grid
@pytest.mark.parametrize("directions", [2, 4])
def test_merge_undoes_split(grid, directions):
    x = draw(2, *grid, 8)
    assert torch.equal(merge_directions(split_directions(x, directions), *grid, directions), x)
    y = draw(2, grid[0] * grid[1], 8, seed=1)
    assert torch.equal(split_directions(merge_directions(y, *grid, directions), directions), y)


def test_directions_are_rows_and_columns_both_ways():
    h, w = 2, 3
    number = torch.arange(h * w).view(1, h, w, 1).expand(1, h, w, 4)
    sequences = split_directions(number)[0].T.tolist()
    assert sequences == [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 3, 1, 4, 2, 5], [5, 2, 4, 1, 3, 0]]
    assert split_directions(number[..., :2], 2)[0].T.tolist() == sequences[:2]


VIEWS = [  # a grid as each direction meets it: its raster order is the order of the scan
    lambda x: x,
    lambda x: x.flip(1, 2),
    lambda x: x.transpose(1, 2),
    lambda x: x.transpose(1, 2).flip(1, 2),
]
BACK = [VIEWS[0], VIEWS[1], VIEWS[2], lambda x: x.flip(1, 2).transpose(1, 2)]


@every_grid
@pytest.mark.parametrize("scan", ["cross4", "raster2"])
def test_a_scan_is_the_one_direction_scan_of_flips_and_transposes(grid, scan):
    """Exactly: each direction's channels are those of one plain raster scan over the turned grid."""
    pathway = initialise(RecurrencePathway(8, heads=2, recurrence=RecurrenceOptions(scan=scan)), 0)
    x, count = pathway.input(draw(2, *grid, 8)), pathway.directions
    states = merge_directions(pathway.lru(split_directions(x, count)), *grid, count)
    for number, got in enumerate(states.chunk(count, -1)):
        turned = VIEWS[number](x)
        expected = BACK[number](pathway.lru(turned.flatten(1, 2)).unflatten(1, turned.shape[1:3]))
        assert torch.equal(got, expected.chunk(count, -1)[number])


@every_grid
@pytest.mark.parametrize("scan", ["cross4", "raster2"])
def test_a_row_reset_makes_every_line_its_own_sequence(grid, scan):
    """Each row (and each column) gives the states that it gives alone, in a batch of one line."""
    pathway = initialise(RecurrencePathway(8, heads=2, recurrence=RecurrenceOptions(scan=scan, reset="row")), 0)
    (h, w), count = grid, pathway.directions
    x = pathway.input(draw(2, h, w, 8))
    states = merge_directions(pathway.lru(split_directions(x, count), (w, h)[: count // 2]), h, w, count)
    rows = slice(0, 16 // count)

    def alone(line):
        return merge_directions(pathway.lru(split_directions(line, count)), *line.shape[1:3], count)

    for r in range(h):
        torch.testing.assert_close(states[:, r : r + 1, :, rows], alone(x[:, r : r + 1])[..., rows], rtol=0, atol=1e-6)
    for c in range(w) if scan == "cross4" else ():
        torch.testing.assert_close(states[:, :, c : c + 1, 4:], alone(x[:, :, c : c + 1])[..., 4:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)], ids=str)
def test_with_a_row_reset_a_token_changes_its_own_row_and_column_only(grid):
    pathway = initialise(RecurrencePathway(8, heads=2, recurrence=RecurrenceOptions(reset="row")), 0)
    h, w = grid

    def states(x):
        return merge_directions(pathway.lru(split_directions(pathway.input(x)), (w, h)), h, w)[0]

    x = draw(1, h, w, 8)
    other = x.clone()
    other[0, 1, 2] += 1
    moved = (states(other) != states(x)).unflatten(-1, (4, 2)).any(-1)  # h, w, direction
    place = torch.zeros(h, w, 4, dtype=torch.bool)
    place[1, 2:, 0] = place[1, :3, 1] = place[1:, 2, 2] = place[:2, 2, 3] = True
    assert torch.equal(moved, place)
    y = pathway(x)[0] != pathway(other)[0]
    assert not y[0, [0, 1, 3]].any() and y[1].any() and y[0, 2].any()


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


def longest_line(options, h, w):
    return h * w if options.reset == "sequence" else max(h, w) if options.scan == "cross4" else w


@every_option
def test_every_parameter_gets_a_gradient_on_any_grid(options):
    for grid in GRIDS:
        pathway = initialise(RecurrencePathway(12, width=8, heads=2, recurrence=options), 0)
        y = pathway(draw(2, *grid, 12))
        assert y.shape == (2, *grid, 8) and y.isfinite().all()
        y.square().sum().backward()
        for name, parameter in pathway.named_parameters():
            assert parameter.grad.isfinite().all(), name
            decides_decay = "decay" in name or "recurrence_gate" in name  # and lines of one token forget nothing
            assert parameter.grad.abs().max() > 0 or (decides_decay and longest_line(options, *grid) == 1), name


@every_option
def test_options_change_the_output_and_nothing_else(options):
    """All have the same parameters; none but the default gives the default's output."""
    x, default = draw(1, 4, 5, 8), RecurrenceOptions()
    pathway, other = (initialise(RecurrencePathway(8, heads=4, recurrence=o), 0) for o in (options, default))
    assert {n: p.shape for n, p in pathway.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    assert torch.equal(pathway(x), other(x)) == (options == default)


@every_option
def test_half_precision_is_close(options):
    pathway, x = initialise(RecurrencePathway(16, heads=2, recurrence=options), 0), draw(2, 5, 7, 16)
    expected = pathway(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(pathway(x).float(), expected, rtol=0, atol=0.1)
    y = pathway.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.1)


def test_decays_of_a_bfloat16_module_stay_in_float32():
    """bfloat16 has four values in [0.99, 1): the state of a long constant input would be off by a factor."""
    unit, x = initialise(RGLRU(64, 4), 0), torch.ones(1, 512, 64)
    with torch.no_grad():
        unit.recurrence_gate.weight.zero_()
        unit.decay.copy_(unit.decay.bfloat16())
        unit.input_gate.weight.zero_()
    expected = unit(x)
    torch.testing.assert_close(unit.bfloat16()(x.bfloat16()).float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("heads", "scan", "blocks"), [(1, "cross4", 4), (4, "cross4", 4), (3, "cross4", 12), (1, "raster2", 2)]
)
def test_gate_blocks_never_span_two_directions(heads, scan, blocks):
    pathway = RecurrencePathway(24, heads=heads, recurrence=RecurrenceOptions(scan=scan))
    assert pathway.lru.input_gate.blocks == pathway.lru.recurrence_gate.blocks == blocks


def test_width_that_directions_do_not_divide_is_refused():
    with pytest.raises(SettingError, match="model.mixer_width=6.*4 scan directions"):
        RecurrencePathway(16, width=6, heads=2)
    with pytest.raises(SettingError, match="model.mixer_width=9.*2 scan directions"):
        RecurrencePathway(16, width=9, heads=3, recurrence=RecurrenceOptions(scan="raster2"))
    RecurrencePathway(16, width=6, heads=2, recurrence=RecurrenceOptions(scan="raster2"))


@pytest.mark.parametrize(("name", "allowed"), [("decay", DECAYS), ("scan", SCANS), ("reset", RESETS)])
def test_unknown_options_are_refused_with_the_allowed_ones(name, allowed):
    with pytest.raises(SettingError, match=f"recurrence.{name}='x'.*{', '.join(allowed)}"):
        RecurrenceOptions(**{name: "x"})
