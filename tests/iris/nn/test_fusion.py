"""How GRFM's pathways are fused, for each gate and each subset of pathways, against the formula."""

import itertools

import pytest
import torch

from iris.errors import SettingError
from iris.nn.mixers.grfm import GATES, GRFM, PATHWAYS, Concatenation, FusionOptions
from iris.randomness import initialise

DIM = 8
SUBSETS = [s for k in (1, 2, 3) for s in itertools.combinations(PATHWAYS, k)]
GRIDS = [(4, 4), (3, 5), (1, 6), (1, 1)]

every_gate = pytest.mark.parametrize("gate", GATES)
every_subset = pytest.mark.parametrize("pathways", SUBSETS, ids="+".join)
both_norms = pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "raw"])


def make(gate="learned", pathways=tuple(PATHWAYS), normalise=True, seed=0, **options):
    options = {"heads": 2, "pathways": pathways, "fusion": FusionOptions(gate, normalise)} | options
    return initialise(GRFM(DIM, **options), seed)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def disturb(mixer, seed=5):
    """Move every parameter off its start, where alpha = 1 and gate = 0 would hide what they multiply."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draws))
    return mixer


def normalised(x, scale):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale


def by_the_formula(mixer, x, gate, pathways, normalise):
    """g fourier + (1 - g) recurrence + alpha spatial, a missing partner's weight being one; sum and concat likewise."""
    part = {name: mixer.pathways[name](x).double() for name in pathways}
    if normalise:
        part = {name: normalised(value, mixer.norms[name].scale.double()) for name, value in part.items()}
    if len(pathways) == 1:
        return part[pathways[0]]
    if gate == "sum":
        return sum(part.values())
    if gate == "concat":
        weights = mixer.concat.weight.double().split(DIM, 1)
        return sum(part[name] @ weight.T for name, weight in zip(pathways, weights, strict=True))
    weight = dict.fromkeys(pathways, 1.0)
    if {"fourier", "recurrence"} <= set(pathways):
        score = torch.zeros(()) if gate == "half" else mixer.gate
        if gate == "learned":
            score = x @ mixer.gate.weight.T + mixer.gate.bias
        weight["fourier"] = 1 / (1 + torch.exp(-score.double()))
        weight["recurrence"] = 1 - weight["fourier"]
    if "spatial" in pathways:
        weight["spatial"] = mixer.alpha.double()
    return sum(weight[name] * part[name] for name in pathways)


@every_gate
@every_subset
@both_norms
def test_the_fusion_is_its_formula(gate, pathways, normalise):
    mixer, x = disturb(make(gate, pathways, normalise)), draw(2, 4, 5, DIM)
    fused = by_the_formula(mixer, x, gate, pathways, normalise)
    expected = fused @ mixer.out.weight.double().T + mixer.out.bias.double()
    torch.testing.assert_close(mixer(x).double(), expected, rtol=1e-5, atol=1e-5)


@every_gate
@every_subset
@both_norms
def test_every_parameter_gets_a_gradient(gate, pathways, normalise):
    mixer = make(gate, pathways, normalise)
    mixer(draw(2, 4, 5, DIM)).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@every_gate
@both_norms
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_any_grid_and_half_precision(gate, normalise, grid):
    mixer, x = make(gate, normalise=normalise), draw(2, *grid, DIM)
    y = mixer(x)
    assert y.shape == x.shape and y.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mixer(x).float(), y, rtol=0, atol=0.1)
    half = mixer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=0, atol=0.15)


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        ("learned", {"gate.weight": (DIM, DIM), "gate.bias": (DIM,), "alpha": (DIM,)}),
        ("channel", {"gate": (DIM,), "alpha": (DIM,)}),
        ("half", {"alpha": (DIM,)}),
        ("sum", {}),
        ("concat", {"concat.weight": (DIM, 3 * DIM)}),
    ],
)
def test_each_gate_owns_its_parameters_only(gate, expected):
    pathways = ("pathways.", "norms.", "out.")
    found = {name: tuple(p.shape) for name, p in make(gate).named_parameters() if not name.startswith(pathways)}
    assert found == expected
    raw = {name for name, _ in make(gate, normalise=False).named_parameters()}
    assert {name for name, _ in make(gate).named_parameters()} - raw == {f"norms.{name}.scale" for name in PATHWAYS}


@pytest.mark.parametrize("pathways", SUBSETS[:3], ids="+".join)
def test_a_pathway_alone_is_the_same_under_every_gate(pathways):
    x = draw(2, 4, 5, DIM)
    outputs = [make(gate, pathways)(x) for gate in GATES]
    assert all(torch.equal(y, outputs[0]) for y in outputs)


@every_subset
def test_channel_and_concat_start_as_the_fixed_half(pathways):
    """So their output has its variance; what training does is all that tells the arms apart."""
    x = draw(2, 4, 5, DIM)
    half = make("half", pathways)(x)
    for gate in ("channel", "concat"):
        torch.testing.assert_close(make(gate, pathways)(x), half, rtol=1e-5, atol=1e-5)
    paired = len(pathways) > 1 and {"fourier", "recurrence"} <= set(pathways)
    for gate in ("learned", "sum"):
        assert torch.allclose(make(gate, pathways)(x), half, atol=1e-3) != paired


def observed(mixer, x):
    rows = []
    mixer.observe = rows.append
    mixer(x)
    return rows


@every_gate
@every_subset
def test_weights_are_reported_at_each_pass(gate, pathways):
    mixer, x = disturb(make(gate, pathways)), draw(2, 4, 5, DIM)
    (row,) = observed(mixer, x)
    assert list(row) == [*pathways, "std"] and all(isinstance(value, float) and value >= 0 for value in row.values())
    if gate == "concat" and len(pathways) > 1:
        assert sum(row[name] for name in pathways) == pytest.approx(1)
    elif gate != "sum" and {"fourier", "recurrence"} <= set(pathways):
        assert row["fourier"] + row["recurrence"] == pytest.approx(1)
    else:
        assert all(row[name] == 1 for name in pathways if name != "spatial")
    if mixer.alpha is not None:
        assert row["spatial"] == pytest.approx(mixer.alpha.abs().mean().item()) != 1


def test_reported_weights_by_gate():
    x = draw(2, 4, 5, DIM)
    assert observed(make("half"), x) == [{"fourier": 0.5, "recurrence": 0.5, "spatial": 1.0, "std": 0.0}]
    assert observed(make("channel"), x) == [{"fourier": 0.5, "recurrence": 0.5, "spatial": 1.0, "std": 0.0}]
    assert observed(make("sum"), x) == [{"fourier": 1.0, "recurrence": 1.0, "spatial": 1.0, "std": 0.0}]
    assert observed(make("concat"), x) == [{"fourier": 0.25, "recurrence": 0.25, "spatial": 0.5, "std": 0.0}]
    channel, learned = disturb(make("channel")), disturb(make("learned"))
    opened = torch.sigmoid(channel.gate)
    (row,) = observed(channel, x)
    assert (row["fourier"], row["std"]) == (pytest.approx(opened.mean().item()), pytest.approx(opened.std().item()))
    opened = torch.sigmoid(learned.gate(x))
    (row,) = observed(learned, x)
    assert (row["fourier"], row["std"]) == (pytest.approx(opened.mean().item()), pytest.approx(opened.std().item()))


def test_concatenation_reports_the_share_of_absolute_weights():
    layer = initialise(Concatenation(("fourier", "spatial"), 2), 0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0, 2.0, 0.0], [0.0, 3.0, -1.0, 0.0]]))  # shares 1/2 and 3/4
    spread = torch.tensor([0.5, 0.75]).std().item()
    assert layer.shares() == {
        "fourier": pytest.approx(0.625),
        "spatial": pytest.approx(0.375),
        "std": pytest.approx(spread),
    }


def test_raw_pathways_enter_at_their_own_scales():
    """With white input the spatial average is a tenth of the others, which normalisation evens out."""
    mixer, x = initialise(GRFM(64), 0), draw(2, 16, 16, 64)
    raw = {name: pathway(x) for name, pathway in mixer.pathways.items()}
    size = [value.square().mean().sqrt().item() for value in raw.values()]
    assert max(size) > 5 * min(size)
    even = [mixer.norms[name](value).square().mean().sqrt().item() for name, value in raw.items()]
    assert even == pytest.approx([1, 1, 1], abs=0.02)


def test_unknown_gates_are_refused_with_the_allowed_ones():
    with pytest.raises(SettingError, match="fusion.gate='softmax'.*learned, channel, half, sum, concat"):
        FusionOptions("softmax")


@pytest.mark.parametrize("pathways", [(), ("fourier", "wavelet"), ("spatial", "spatial")])
def test_wrong_pathways_are_refused_with_the_allowed_ones(pathways):
    with pytest.raises(SettingError, match="fourier, recurrence, spatial"):
        GRFM(DIM, heads=2, pathways=pathways)
