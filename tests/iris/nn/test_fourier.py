"""The Fourier pathway in each form against a complex float64 formula, and the properties that set the forms apart."""

import pytest
import scipy.fft
import torch

from iris.errors import SettingError
from iris.nn.mixers.dft import make_hermitian, rdft2
from iris.nn.mixers.fourier import FORMS, FourierMixer, FourierOptions, FourierPathway
from iris.randomness import initialise

GRIDS = [(8, 8), (5, 7), (6, 5), (1, 4), (4, 1), (1, 1)]
DFT = ("phase", "modrelu", "stock")

every_form = pytest.mark.parametrize("form", FORMS)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pathway(form="phase", dim=16, heads=2, seed=0, **options):
    return initialise(FourierPathway(dim, heads=heads, fourier=FourierOptions(form, **options)), seed)


def stirred(form, **options):
    """A pathway in float64 whose every parameter is away from its initial value, so that each counts."""
    layer, noise = pathway(form, **options), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=noise)
    return layer.double()


def complex_network(z, network, form, shrink):
    """What each form does to one coefficient vector z [..., C], in complex numbers."""
    blocks, block = network.first.shape[1:3]
    first, second = (torch.complex(weight[0], weight[1]) for weight in (network.first, network.second))
    shape, z = z.shape, z.reshape(-1, blocks, block)
    z = torch.einsum("fnb,nbc->fnc", z, first)
    if form == "stock":
        z = z + torch.complex(*network.first_bias)
        z = torch.einsum("fnb,nbc->fnc", torch.complex(z.real.relu(), z.imag.relu()), second)
        z = z + torch.complex(*network.second_bias)
        return torch.complex(*(part.sign() * (part.abs() - shrink).relu() for part in (z.real, z.imag))).reshape(shape)
    if form == "phase":
        z = z * torch.sigmoid(network.slope[:, 0] * modulus(z) + network.offset[:, 0])
    else:
        z = z * torch.relu(modulus(z, 1e-6) + network.beta[:, 0]) / modulus(z, 1e-6)
    z = torch.einsum("fnb,nbc->fnc", z, second)
    return (z * torch.relu(1 - shrink / modulus(z))).reshape(shape)


def modulus(z, floor=1e-12):
    return torch.sqrt(z.real**2 + z.imag**2 + floor)


def plane(h, w):
    """Signed frequencies of an FFT as integers, [h, 1] and [1, w]."""
    return (torch.fft.fftfreq(n).mul(n).round().long() for n in (h, w))


def dft_reference(layer, x, form, modes, shrink):
    h, w = x.shape[1:3]
    ky, kx = plane(h, w)
    z = torch.fft.fft2(layer.input(x), dim=(1, 2), norm="ortho")
    z = complex_network(z, layer.network, form, shrink)
    if modes is not None:
        z = z * ((ky.abs() <= modes)[:, None] & (kx.abs() <= modes))[..., None]
    if form == "stock":
        return torch.fft.irfft2(z[:, :, : w // 2 + 1], (h, w), dim=(1, 2), norm="ortho")
    one_x, one_y = (2 * kx % w == 0)[None], (2 * ky % h == 0)[:, None]  # k and -k are one
    upper = torch.where(one_x, (ky > 0)[:, None] & ~one_y, (kx > 0)[None])[..., None]
    mirrored = z.flip((1, 2)).roll((1, 1), (1, 2)).conj()  # at k, the conjugate of what is at -k
    z = torch.where((one_x & one_y)[..., None], z.real + 0j, torch.where(upper, z, mirrored))
    signal = torch.fft.ifft2(z, dim=(1, 2), norm="ortho")
    assert signal.imag.abs().max() < 1e-12
    return signal.real


def mirror_dct(n):
    """The orthonormal DCT-II matrix, as the FFT of each unit vector followed by its mirror image."""
    spectrum = torch.fft.fft(torch.cat([torch.eye(n), torch.eye(n).flip(1)], 1).double())[:, :n]
    half = (spectrum * torch.exp(-0.5j * torch.pi * torch.arange(n).double() / n)).real.T / 2
    half[0] /= 2**0.5
    return half * (2 / n) ** 0.5


def dct_reference(layer, x, form, modes, shrink):
    h, w = x.shape[1:3]
    network, rows, columns = layer.network, *(mirror_dct(n)[: None if modes is None else modes + 1] for n in (h, w))
    z = torch.einsum("kh,lw,bhwc->bklc", rows, columns, layer.input(x))
    shape, (blocks, block, _) = z.shape, network.first.shape
    z = torch.einsum("...nb,nbc->...nc", z.unflatten(-1, (blocks, block)), network.first)
    size = torch.sqrt(z[..., :block] ** 2 + z[..., block:] ** 2 + 1e-12)
    gate = torch.sigmoid(network.slope[:, 0] * size + network.offset[:, 0])
    z = torch.einsum("...nb,nbc->...nc", z * torch.cat([gate, gate], -1), network.second).reshape(shape)
    return torch.einsum("kh,lw,bklc->bhwc", rows, columns, z.sign() * (z.abs() - shrink).relu())


def reference(layer, x, form, modes=None, shrink=0.05):
    return (dct_reference if form == "dct" else dft_reference)(layer, x, form, modes, shrink)


@every_form
@every_grid
@pytest.mark.parametrize("modes", [None, 0, 2])
def test_the_pathway_is_the_complex_formula_with_its_gradients(form, grid, modes):
    layer = stirred(form, modes=modes, shrink=0.05)
    x = draw(2, *grid, 16).double().requires_grad_()
    y, expected = layer(x), reference(layer, x, form, modes)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    direction, leaves = draw(*y.shape, seed=2).double(), [x, *layer.parameters()]
    got, wanted = (torch.autograd.grad((out * direction).sum(), leaves) for out in (y, expected))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@every_form
def test_in_float32_it_stays_close_to_the_formula(form):
    layer = stirred(form, shrink=0.05)
    x = draw(2, 8, 8, 16)
    expected = reference(layer, x.double(), form).float()
    torch.testing.assert_close(layer.float()(x), expected, rtol=1e-5, atol=1e-5)


def test_the_formula_tells_the_forms_apart():
    """Each departure from AFNO moves the output by far more than the tolerances above."""
    x = draw(1, 8, 8, 16).double()
    layer = stirred("stock", shrink=0.05)
    assert (reference(layer, x, "stock") - reference(layer, x, "stock", shrink=0.0)).abs().max() > 1e-2
    layer = stirred("phase", shrink=0.05)
    z = complex_network(torch.fft.rfft2(layer.input(x), dim=(1, 2), norm="ortho"), layer.network, "phase", 0.05)
    lossy = torch.fft.irfft2(z, (8, 8), dim=(1, 2), norm="ortho")
    assert (lossy - reference(layer, x, "phase")).abs().max() > 1e-2


def shift_error(layer, x, shift):
    y = layer(x)
    return ((layer(torch.roll(x, shift, (1, 2))) - torch.roll(y, shift, (1, 2))).norm() / y.norm()).item()


@pytest.mark.parametrize("form", ["phase", "modrelu"])
@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (6, 5)], ids=lambda grid: f"{grid[0]}x{grid[1]}")
@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (2, 3), (-1, 2)], ids=str)
def test_mixing_commutes_with_cyclic_shifts(form, grid, shift):
    x = draw(2, *grid, 16).double()
    assert shift_error(stirred(form, shrink=0.05), x, shift) < 1e-9
    assert shift_error(stirred(form, modes=1), x, shift) < 1e-9


def test_mixing_does_not_commute_with_shifts_in_the_other_forms():
    x = draw(2, 8, 8, 16).double()
    assert shift_error(pathway("stock", dim=16).double(), x, (2, 3)) > 0.5
    assert shift_error(pathway("dct").double(), x, (2, 3)) > 0.1


@every_form
def test_mixing_is_neither_local_nor_linear(form):
    """Otherwise commuting with shifts would mean nothing."""
    layer, x = pathway(form, shrink=0.0).double(), draw(1, 8, 8, 16).double()
    y, other = layer(x), x.clone()
    other[0, 4, 4] += 1
    moved = (layer(other) - y).abs().sum(-1)[0]
    assert (moved > 1e-5 * y.std()).double().mean() > 0.9
    a, b = x, draw(1, 8, 8, 16, seed=1).double()
    assert (layer(a + b) - layer(a) - layer(b)).norm() > 0.02 * layer(a + b).norm()


def corner(form, grid, dim, heads, batch):
    """Energy at token (0, 0): its share of all, and its ratio to the mean of the other tokens, for white input."""
    layer = pathway(form, dim, heads)
    with torch.no_grad():
        energy = layer(draw(batch, grid, grid, dim)).square().mean((0, 3)).flatten()
    return (energy[0] / energy.sum()).item(), (energy[0] / energy[1:].mean()).item()


@pytest.mark.parametrize("form", ["phase", "modrelu", "dct"])
@pytest.mark.parametrize("grid", [8, 16, 32])
def test_the_corner_token_is_like_any_other(form, grid):
    assert 0.5 < corner(form, grid, dim=32, heads=4, batch=32)[1] < 2


@pytest.mark.parametrize(("grid", "times"), [(8, 5), (16, 10), (32, 20)])
def test_the_published_form_has_a_spike_at_the_corner(grid, times):
    """30% of the energy, a standard deviation 5, 10 and 20 times the others' (64 channels a block, published draw)."""
    share, ratio = corner("stock", grid, dim=512, heads=8, batch=1)
    assert share == pytest.approx(0.3, abs=0.05)
    assert ratio**0.5 == pytest.approx(times, rel=0.2)


@pytest.mark.parametrize(("form", "share"), [("phase", 0.0), ("modrelu", 0.0), ("stock", 0.71)])
def test_what_the_inverse_transform_loses_of_the_edge_columns(form, share):
    """The norm of what is missing from the output's spectrum, over that of the spectrum handed to the inverse."""
    given = []
    layer = pathway(form, dim=512, heads=8)
    layer.network.register_forward_hook(lambda module, arguments, out: given.extend(out))
    with torch.no_grad():
        kept = rdft2(layer(draw(1, 16, 16, 512)))
    spectrum = tuple(given) if form == "stock" else make_hermitian(*given, 16)
    lost, whole = (
        sum(part.square().sum((0, 1, 3)) for part in parts)
        for parts in ([a - b for a, b in zip(spectrum, kept, strict=True)], spectrum)
    )
    relative = (lost / whole).sqrt()
    assert relative[1:-1].max() < 1e-5
    assert relative[[0, -1]].tolist() == pytest.approx([share, share], abs=0.03 if share else 1e-5)


def test_modrelu_starts_neither_linear_nor_dead():
    layer = pathway("modrelu", dim=64, heads=4)
    beta = layer.network.beta.detach()
    assert -1 <= beta.min() < -0.9 and -0.1 < beta.max() <= 0
    z = layer.network.activate(draw(4, 500, 32) * 0.5**0.5)  # 500 coefficients of unit power in each of 64 channels
    silent = (z[..., :16] == 0).float().mean(1)
    assert 0.15 < silent.mean() < 0.4 and silent.max() < 0.7


@every_form
def test_the_output_has_the_scale_of_its_input_but_for_the_published_form(form):
    scale = pathway(form, dim=64, heads=4, shrink=0.0)(draw(8, 16, 16, 64)).std().item()
    assert scale < 0.05 if form == "stock" else 0.5 < scale < 1


def test_parameters_by_form():
    """At width C in n blocks the network has 4 C^2 / n, and 2 C (phase, dct), C (modrelu) or 4 C (stock) more."""
    count = {form: sum(p.numel() for p in pathway(form, 64, 4).network.parameters()) for form in FORMS}
    assert count == {"phase": 4096 + 128, "modrelu": 4096 + 64, "stock": 4096 + 256, "dct": 4096 + 128}


@every_form
def test_a_large_threshold_silences_the_pathway(form):
    x = draw(1, 4, 4, 16)
    assert pathway(form, shrink=1e3)(x).abs().max() < 1e-5
    assert pathway(form, shrink=0)(x).std() > 1e-3


def spectrum_of(y, form):
    """Of [B, h, w, C]: coefficients and the larger of their two frequencies, the DCT's in its own indices."""
    h, w = y.shape[1:3]
    if form == "dct":
        return torch.from_numpy(scipy.fft.dctn(y.numpy(), axes=(1, 2), norm="ortho")), torch.maximum(
            torch.arange(h)[:, None], torch.arange(w)
        )
    ky, kx = plane(h, w)
    return torch.fft.fft2(y, dim=(1, 2), norm="ortho"), torch.maximum(ky.abs()[:, None], kx.abs())


@every_form
@pytest.mark.parametrize("modes", [0, 1, 2, 3])
@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (9, 4)], ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_a_cut_off_leaves_the_low_modes_as_they_were_and_nothing_above(form, modes, grid):
    x = draw(2, *grid, 16).double()
    with torch.no_grad():
        got, frequency = spectrum_of(stirred(form, modes=modes)(x), form)
        whole, _ = spectrum_of(stirred(form)(x), form)
    torch.testing.assert_close(got, whole * (frequency <= modes)[..., None], rtol=0, atol=1e-12)
    assert got.abs().max() > 0.1


@every_form
def test_dropped_modes_are_not_computed(form):
    seen = []
    layer = pathway(form, modes=2)
    layer.network.register_forward_hook(lambda module, arguments, out: seen.append(arguments[0].shape))
    assert layer(draw(2, 8, 8, 16)).shape == (2, 8, 8, 16)
    assert seen == [(2, 3, 3, 16) if form == "dct" else (2, 5, 3, 16)]


@every_form
@every_grid
def test_a_cut_off_above_the_grid_is_none(form, grid):
    x = draw(2, *grid, 16)
    assert torch.equal(pathway(form, modes=99)(x), pathway(form, modes=None)(x))


@every_form
def test_mode_zero_keeps_only_the_mean(form):
    y = pathway(form, modes=0, shrink=0)(draw(2, 5, 6, 16))
    torch.testing.assert_close(y, y[:, :1, :1].expand_as(y), rtol=0, atol=1e-6)
    assert y.abs().max() > 1e-3


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [False, True], ids=["autocast", "module"])
def test_the_spectral_part_is_float32_in_half_precision(form, dtype, cast):
    layer, x, seen = pathway(form), draw(2, 8, 8, 16), []
    expected = layer(x)
    layer.network.register_forward_hook(lambda module, given, out: seen.extend(part.dtype for part in (*given, *out)))
    if cast:
        y = layer.to(dtype)(x.to(dtype))
    else:
        with torch.autocast("cpu", dtype):
            y = layer(x)
    assert y.dtype == dtype and set(seen) == {torch.float32}
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.1)
    y.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@every_form
def test_constants_made_in_inference_mode_serve_training(form):
    layer, x = pathway(form), draw(1, 9, 11, 16)  # a grid that no other test uses
    with torch.inference_mode():
        expected = layer(x).clone()
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, expected)


@every_form
def test_it_exports_without_complex_numbers_and_runs_on(form):
    layer, x = pathway(form), draw(3, 10, 11, 16)  # a grid whose constants nothing has made yet
    exported = torch.export.export(layer, (x[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    y = layer(x)
    assert type(y) is torch.Tensor
    torch.testing.assert_close(exported.module()(x), y)
    values = [
        node.meta["val"]
        for part in exported.graph_module.modules()
        if isinstance(part, torch.fx.GraphModule)
        for node in part.graph.nodes
        if isinstance(node.meta.get("val"), torch.Tensor)
    ]
    assert len(values) > 10 and not any(value.is_complex() for value in values)


@every_form
def test_it_compiles_for_changing_grids(form):
    layer = pathway(form, modes=2)
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    for grid in [(6, 5), (7, 9)]:
        x = draw(1, *grid, 16)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)


@every_form
def test_gradients_are_finite_where_the_spectrum_is_zero(form):
    """A constant grid has one mode, and an all-zero one none: moduli of zero divide nothing."""
    layer = stirred(form).float()
    for x in (torch.ones(1, 4, 4, 16), torch.zeros(1, 4, 4, 16)):
        x.requires_grad_()
        layer(x).square().sum().backward()
        assert x.grad.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_the_mixer_is_the_pathway_and_a_linear_layer():
    mixer, x = initialise(FourierMixer(16, width=24, heads=2, fourier=FourierOptions("modrelu")), 0), draw(1, 4, 5, 16)
    y = mixer.pathway(x)
    assert y.shape == (1, 4, 5, 24)
    torch.testing.assert_close(mixer(x), y @ mixer.out.weight.T + mixer.out.bias, rtol=1e-5, atol=1e-6)


def test_the_transforms_are_what_the_pathway_uses():
    """With unit layers, no gate and no threshold nothing remains but transform and inverse."""
    layer, x = pathway(shrink=0.0), draw(1, 5, 6, 16)
    with torch.no_grad():
        layer.input.weight.copy_(torch.eye(16))
        for weight in (layer.network.first, layer.network.second):
            weight.copy_(torch.stack([torch.eye(8), torch.zeros(8, 8)])[:, None].expand_as(weight))
        layer.network.slope.zero_()
    torch.testing.assert_close(layer(x), x / 2, rtol=0, atol=1e-5)


def test_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(SettingError, match="model.mixer_width=10.*model.heads=4"):
        FourierPathway(16, width=10, heads=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "fft"}, "fourier.form='fft' is unknown; allowed: phase, modrelu, stock, dct"),
        ({"modes": -1}, "fourier.modes=-1 must be at least 0"),
        ({"modes": 2.5}, "fourier.modes=2.5"),
        ({"modes": True}, "fourier.modes=True"),
        ({"shrink": -0.1}, "fourier.shrink=-0.1 must be at least 0"),
        ({"shrink": float("nan")}, "fourier.shrink=nan"),
        ({"shrink": "soft"}, "fourier.shrink='soft'"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(options, message):
    with pytest.raises(SettingError) as error:
        FourierOptions(**options)
    assert message in str(error.value)
