"""The registry's names and errors, GRFM's fusion, attention's average."""

import pytest
import torch

from iris.errors import SettingError
from iris.nn.mixers import MIXERS, PATHWAYS, build_mixer, check_mixer, is_resizable, option_groups
from iris.randomness import initialise

DIM, HEADS = 16, 2


def make(name, seed=0, **options):
    return initialise(build_mixer(name, DIM, **({"heads": HEADS} | options)), seed)


def tokens(batch, h, w, seed=0):
    return torch.randn(batch, h, w, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [*MIXERS, "grfm[fourier,recurrence]", "grfm[ spatial ]"])
def test_registered_names_are_accepted(name):
    check_mixer(name)


def test_option_groups_are_those_that_the_mixer_reads():
    assert option_groups("attention") == ("attention",)
    assert option_groups("grfm") == ("fourier", "recurrence", "spatial", "fusion")
    assert option_groups("grfm[fourier,spatial]") == ("fourier", "spatial", "fusion")
    assert option_groups("conv3") == ()


def test_only_what_has_no_parameters_is_not_resizable():
    assert [name for name in MIXERS if not is_resizable(name)] == ["identity"]


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
    assert rows == [
        {
            "fourier": pytest.approx(gate.mean().item()),
            "recurrence": pytest.approx(1 - gate.mean().item()),
            "spatial": pytest.approx(1.0),
            "std": pytest.approx(gate.std().item()),
        }
    ]


def test_attention_without_queries_averages_all_values():
    """Equal scores make the softmax uniform."""
    mixer, x = make("attention"), tokens(1, 3, 5)
    with torch.no_grad():
        mixer.qkv.weight[: 2 * DIM] = 0
        expected = mixer.out(mixer.qkv(x)[..., 2 * DIM :].mean((1, 2), keepdim=True)).expand_as(x)
        torch.testing.assert_close(mixer(x), expected, rtol=1e-5, atol=1e-5)
