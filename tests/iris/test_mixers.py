"""What every mixer must do; a new entry of ``MIXERS`` is tested here without a further line."""

import copy

import pytest
import torch

from iris.errors import SettingError
from iris.mixers import MIXERS, PATHWAYS, build_mixer, check_mixer
from iris.randomness import initialise

DIM, HEADS = 16, 2
NAMES = [*MIXERS, "grfm[fourier,recurrence]", "grfm[spatial]"]
GRIDS = [(4, 4), (5, 7), (7, 5), (1, 6), (6, 1), (1, 1), (3, 8)]

every_mixer = pytest.mark.parametrize("name", NAMES)


def make(name, seed=0, **options):
    return initialise(build_mixer(name, DIM, **({"heads": HEADS} | options)), seed)


def tokens(batch, h, w, seed=0):
    return torch.randn(batch, h, w, DIM, generator=torch.Generator().manual_seed(seed))


@every_mixer
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
@pytest.mark.parametrize("batch", [1, 3])
def test_shape_is_kept_on_any_grid(name, grid, batch):
    x = tokens(batch, *grid)
    y = make(name)(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert y.isfinite().all() and y.std() > 0


@every_mixer
@pytest.mark.parametrize("grid", [(4, 4), (5, 7)], ids=["4x4", "5x7"])
def test_every_parameter_gets_a_finite_gradient(name, grid):
    mixer = make(name)
    x = tokens(2, *grid).requires_grad_()
    mixer(x).square().sum().backward()
    for parameter_name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0


@every_mixer
def test_gradient_at_zero_input_is_finite(name):
    mixer = make(name)
    x = torch.zeros(1, 4, 4, DIM, requires_grad=True)
    mixer(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in mixer.parameters())


@every_mixer
def test_deterministic(name):
    x, mixer = tokens(2, 5, 7), make(name)
    assert torch.equal(mixer(x), mixer(x))
    assert torch.equal(mixer(x), make(name)(x))
    assert not torch.equal(mixer(x), make(name, seed=1)(x))


@every_mixer
def test_training_and_evaluation_agree(name):
    x, mixer = tokens(1, 4, 4), make(name)
    trained = mixer.train()(x).detach()
    with torch.inference_mode():
        torch.testing.assert_close(mixer.eval()(x), trained, rtol=1e-6, atol=1e-6)
    mixer.train()(x).sum().backward()  # constants cached under inference mode must still serve training


@every_mixer
def test_half_precision_is_close(name):
    x, mixer = tokens(2, 4, 4), make(name)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    torch.testing.assert_close(y.float(), mixer(x), rtol=0, atol=0.1)


@every_mixer
def test_state_dict_round_trip(name):
    x, mixer, other = tokens(1, 4, 6), make(name), make(name, seed=1)
    other.load_state_dict(copy.deepcopy(mixer.state_dict()))
    assert torch.equal(other(x), mixer(x))


@every_mixer
def test_batch_elements_are_independent(name):
    mixer, x = make(name), tokens(3, 5, 7)
    together = mixer(x)
    for i in range(3):
        torch.testing.assert_close(mixer(x[i : i + 1]), together[i : i + 1], rtol=1e-4, atol=1e-5)
    changed = x.clone()
    changed[1] = tokens(1, 5, 7, seed=9)[0]
    after = mixer(changed)
    torch.testing.assert_close(after[[0, 2]], together[[0, 2]], rtol=1e-5, atol=1e-6)
    assert (after[1] - together[1]).abs().max() > 1e-2


@every_mixer
def test_every_token_reaches_every_token(name):
    """Mixing is global: each output changes with each input, on a grid that is not square."""
    mixer, x = make(name), tokens(1, 3, 4)
    jacobian = torch.autograd.functional.jacobian(lambda y: mixer(y).abs().sum(-1).flatten(), x).abs().sum(-1)
    assert (jacobian.reshape(12, 12) > 1e-7).all()


@every_mixer
def test_width_changes_the_number_of_parameters(name):
    count = {width: sum(p.numel() for p in make(name, width=width).parameters()) for width in (None, 16, 32)}
    assert count[None] == count[16] < count[32]
    assert make(name, width=32)(tokens(2, 5, 7)).shape == (2, 5, 7, DIM)


@every_mixer
def test_width_that_heads_do_not_divide_is_refused(name):
    with pytest.raises(SettingError, match="model.mixer_width=18"):
        build_mixer(name, DIM, width=18, heads=4)


@every_mixer
def test_unknown_option_is_refused_with_the_allowed_ones(name):
    with pytest.raises(SettingError, match="wdith.*width.*heads"):
        build_mixer(name, DIM, wdith=4)


@every_mixer
def test_registered_names_are_accepted(name):
    check_mixer(name)


@pytest.mark.parametrize("name", ["mamba", "", "GRFM", "grfm[", "attention[spatial]"])
def test_unknown_mixer_is_refused_with_the_allowed_ones(name):
    for refuse in (check_mixer, lambda n: build_mixer(n, DIM)):
        with pytest.raises(SettingError) as error:
            refuse(name)
        assert "model.mixer" in str(error.value) and all(allowed in str(error.value) for allowed in MIXERS)


@pytest.mark.parametrize("name", ["grfm[]", "grfm[fourier,wavelet]", "grfm[fourier,fourier]", "grfm[ , ]"])
def test_wrong_pathways_are_refused_with_the_allowed_ones(name):
    for refuse in (check_mixer, lambda n: build_mixer(n, DIM)):
        with pytest.raises(SettingError) as error:
            refuse(name)
        assert all(allowed in str(error.value) for allowed in PATHWAYS)


def test_order_and_spaces_of_pathways_do_not_matter():
    x = tokens(1, 4, 4)
    assert torch.equal(make("grfm[recurrence, fourier]")(x), make("grfm[fourier,recurrence]")(x))
    assert torch.equal(make("grfm[spatial,recurrence,fourier]")(x), make("grfm")(x))


def branches(mixer, x):
    return {name: mixer.norms[name](pathway(x)) for name, pathway in mixer.pathways.items()}


def test_grfm_fuses_by_its_formula():
    mixer, x = make("grfm"), tokens(2, 4, 5)
    with torch.no_grad():
        mixer.alpha.uniform_(-1, 1)
        part, gate = branches(mixer, x), torch.sigmoid(mixer.gate(x))
        fused = gate * part["fourier"] + (1 - gate) * part["recurrence"] + mixer.alpha * part["spatial"]
        torch.testing.assert_close(mixer(x), mixer.out(fused), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("partner", ["fourier", "recurrence"])
def test_a_pathway_without_its_partner_has_weight_one(partner):
    mixer, x = make(f"grfm[{partner},spatial]"), tokens(2, 4, 5)
    with torch.no_grad():
        mixer.alpha.uniform_(-1, 1)
        part = branches(mixer, x)
        expected = mixer.out(part[partner] + mixer.alpha * part["spatial"])
        torch.testing.assert_close(mixer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(PATHWAYS))
def test_one_pathway_alone_has_no_gate(name):
    mixer, x = make(f"grfm[{name}]"), tokens(1, 4, 4)
    assert mixer.gate is None and mixer.alpha is None
    torch.testing.assert_close(mixer(x), mixer.out(branches(mixer, x)[name]))


def test_grfm_reports_its_gates():
    mixer, x, rows = make("grfm"), tokens(2, 4, 4), []
    mixer.observe = rows.append
    mixer(x)
    gate = torch.sigmoid(mixer.gate(x))
    assert rows == [{
        "fourier": pytest.approx(gate.mean().item()), "recurrence": pytest.approx(1 - gate.mean().item()),
        "spatial": pytest.approx(1.0), "std": pytest.approx(gate.std().item()),
    }]


def test_attention_without_queries_averages_all_values():
    """Equal scores make the softmax uniform."""
    mixer, x = make("attention"), tokens(1, 3, 5)
    with torch.no_grad():
        mixer.qkv.weight[: 2 * DIM] = 0
        expected = mixer.out(mixer.qkv(x)[..., 2 * DIM :].mean((1, 2), keepdim=True)).expand_as(x)
        torch.testing.assert_close(mixer(x), expected, rtol=1e-5, atol=1e-5)
