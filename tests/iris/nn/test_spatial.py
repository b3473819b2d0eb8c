"""Every form of the spatial pathway against the dense decay matrix it stands for, made from coordinates in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from iris.errors import SettingError
from iris.nn import scan
from iris.nn.mixers.spatial import SpatialOptions, SpatialPathway, row_sums
from iris.randomness import initialise

GRIDS = [(4, 4), (5, 7), (7, 5), (1, 6), (6, 1), (1, 1), (3, 20)]
DECAYS, FORMS = ("learned", "fixed"), ("product", "dense", "recursion")
OPTIONS = [SpatialOptions(*o) for o in itertools.product(DECAYS, FORMS, (True, False))]

every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"{o.decay}-{o.form}-{o.normalise}")
every_form = pytest.mark.parametrize("form", FORMS)


def make(dim=8, heads=4, seed=0, **options):
    return initialise(SpatialPathway(dim, heads=heads, spatial=SpatialOptions(**options)), seed)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(gamma, h, w, normalise=True):
    """gamma^(|dr| + |dc|) between all pairs of tokens, float64 [N, N]; ``gamma`` a float64 scalar tensor."""
    place = torch.tensor([(r, c) for r in range(h) for c in range(w)])
    matrix = gamma ** (place[:, None] - place).abs().sum(-1)
    return matrix / matrix.sum(1, keepdim=True) if normalise else matrix


def oracle(layer, x, normalise):
    """The pathway in float64 through the dense matrices; also the leaves that its gradients go to."""
    batch, h, w, _ = x.shape
    leaves = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    leaves["x"] = x.detach().double().requires_grad_()
    values = (leaves["x"] @ leaves["input.weight"].T + leaves["input.bias"]).reshape(batch, h * w, 4, -1)
    gamma = torch.exp(-F.softplus(leaves["theta"])) if "theta" in leaves else layer.fixed.double().exp()
    mixed = [dense(gamma[k], h, w, normalise) @ values[:, :, k] for k in range(4)]
    return torch.stack(mixed, 2).reshape(batch, h, w, -1), leaves


@every_grid
@every_option
def test_every_form_is_the_dense_matrix(options, grid):
    layer, x = initialise(SpatialPathway(8, heads=4, spatial=options), 0), draw(2, *grid, 8).requires_grad_()
    expected, leaves = oracle(layer, x, options.normalise)
    got = layer(x)
    scale = max(1, expected.abs().max().item())  # unnormalised sums grow with the grid
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6 * scale)

    weights = draw(*got.shape, seed=1)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, tensor in {"x": x, **dict(layer.named_parameters())}.items():
        gradient = leaves[name].grad
        limit = 2e-6 * scale * max(1, gradient.abs().max().item())
        assert (tensor.grad - gradient).abs().max() <= limit, name


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_gamma_starts_as_rmts_schedule(heads):
    layer, fixed = make(heads=heads), make(heads=heads, decay="fixed")
    expected = torch.tensor([1 - 2 ** -(2 + 4 * k / heads) for k in range(heads)])
    for gamma in (torch.exp(-F.softplus(layer.theta)), torch.exp(fixed.log_gamma()), torch.exp(layer.log_gamma())):
        torch.testing.assert_close(gamma, expected, rtol=0, atol=1e-6)
    if heads == 4:
        assert expected.tolist() == [0.75, 0.875, 0.9375, 0.96875]


def test_a_fixed_gamma_is_no_parameter():
    layer, learned, x = make(decay="fixed"), make(), draw(2, 5, 7, 8)
    assert [name for name, _ in layer.named_parameters()] == list(layer.state_dict()) == ["input.weight", "input.bias"]
    assert dict(learned.named_parameters())["theta"].shape == (4,)
    torch.testing.assert_close(layer(x), learned(x), rtol=0, atol=1e-6)
    layer.load_state_dict(make(decay="fixed", seed=1).state_dict())
    assert torch.equal(layer(x), make(decay="fixed", seed=1)(x))


def test_weights_sum_to_one_and_fall_with_distance():
    decay = make().decay(9)
    assert decay.shape == (4, 9, 9)
    torch.testing.assert_close(decay.sum(-1), torch.ones(4, 9))
    assert (decay[:, 0].diff() < 0).all() and (decay[:, 4, 4:].diff() < 0).all()
    torch.testing.assert_close(decay[:, 4, :4].flip(-1), decay[:, 4, 5:])


@every_form
def test_a_constant_image_stays_constant_up_to_the_corners(form):
    """With normalised rows: without, the centre's sum on 16 x 16 is 2.5, 1.95, 1.5 times the corner's."""
    layer, x = make(form=form), draw(8).expand(1, 16, 16, 8)
    torch.testing.assert_close(layer(x), layer.input(x), rtol=1e-5, atol=1e-5)
    raw = make(form=form, normalise=False)
    ratio = (raw(x)[0, 8, 8] / raw(x)[0, 0, 0]).unflatten(0, (4, 2))
    torch.testing.assert_close(ratio[:3, 0], torch.tensor([2.5, 1.95, 1.5]), rtol=0.02, atol=0)


@every_form
@pytest.mark.parametrize("theta", [-120.0, -50.0, 50.0])
def test_extreme_gammas_are_mean_and_identity(theta, form):
    layer, x = make(form=form), draw(1, 4, 6, 8)
    with torch.no_grad():
        layer.theta.fill_(theta)
    values = layer.input(x)
    expected = values if theta > 0 else values.mean((1, 2), keepdim=True).expand_as(values)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    y.square().sum().backward()
    assert layer.theta.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0.01, 0.75, 0.9934, 0.99999, 1.0])
def test_row_sums_are_those_of_the_matrix(gamma):
    log_gamma = torch.tensor(gamma, dtype=torch.float64).log()
    expected = dense(log_gamma.exp(), 1, 33, normalise=False).sum(1)
    torch.testing.assert_close(row_sums(log_gamma[None], 33)[:, 0], expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(row_sums(log_gamma[None].float(), 33)[:, 0], expected.float(), rtol=1e-6, atol=0)


def test_the_recursion_scans_each_axis_once_in_both_directions(monkeypatch):
    """Its operations grow with the tokens, not with their pairs."""
    shapes = []
    monkeypatch.setattr(scan, "OBSERVERS", [shapes.append])
    make(form="recursion")(draw(3, 5, 7, 8))
    assert shapes == [(2 * 3 * 5, 7, 8), (2 * 3, 5, 7 * 8)]
    shapes.clear()
    make(form="product")(draw(3, 5, 7, 8))
    assert shapes == []


def test_gamma_is_learned():
    """The gradient for theta agrees with finite differences."""
    layer, x = make().double(), draw(1, 3, 4, 8).double()
    layer(x).square().sum().backward()
    for k in range(4):
        values = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                layer.theta[k] += step
                values.append(layer(x).square().sum().item())
                layer.theta[k] -= step
        assert layer.theta.grad[k].item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=1e-2)


@every_option
def test_every_parameter_gets_a_gradient_on_any_grid(options):
    for grid in GRIDS:
        layer = initialise(SpatialPathway(12, width=8, heads=4, spatial=options), 0)
        y = layer(draw(2, *grid, 12))
        assert y.shape == (2, *grid, 8) and y.isfinite().all()
        y.square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0 or (grid == (1, 1) and name == "theta"), name


@every_option
def test_half_precision_is_close(options):
    layer, x = initialise(SpatialPathway(8, heads=4, spatial=options), 0), draw(2, 5, 7, 8)
    expected = layer(x)
    limit = 0.02 * expected.abs().max().item()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), expected, rtol=0, atol=limit)
    y = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=limit)


def test_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(SettingError, match="model.mixer_width=10.*model.heads=4"):
        SpatialPathway(8, width=10, heads=4)


@pytest.mark.parametrize(("name", "allowed"), [("decay", "learned, fixed"), ("form", "product, dense, recursion")])
def test_unknown_options_are_refused_with_the_allowed_ones(name, allowed):
    with pytest.raises(SettingError, match=f"spatial.{name}='x'.*{allowed}"):
        SpatialOptions(**{name: "x"})
