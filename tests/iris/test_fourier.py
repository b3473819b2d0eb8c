"""The Fourier pathway against torch.fft, and the properties that set it apart from published AFNO."""

import pytest
import torch

from iris.errors import SettingError
from iris.mixers.fourier import FourierPathway, SpectralNetwork, irdft2, make_hermitian, rdft2
from iris.randomness import initialise

GRIDS = [(8, 8), (5, 7), (7, 5), (6, 5), (5, 6), (16, 16), (1, 4), (4, 1), (1, 1), (2, 2), (3, 2)]

every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pathway(dim=16, heads=2, seed=0, **options):
    return initialise(FourierPathway(dim, heads=heads, **options), seed)


@every_grid
def test_rdft2_is_torchs_orthonormal_transform(grid):
    x = draw(2, *grid, 3)
    real, imaginary = rdft2(x)
    expected = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")
    torch.testing.assert_close(real, expected.real, rtol=0, atol=1e-5)
    torch.testing.assert_close(imaginary, expected.imag, rtol=0, atol=1e-5)


@every_grid
def test_irdft2_is_torchs_inverse(grid):
    x = draw(2, *grid, 3)
    spectrum = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")
    back = irdft2(spectrum.real.contiguous(), spectrum.imag.contiguous(), *grid)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(irdft2(*rdft2(x), *grid), x, rtol=0, atol=1e-5)


@every_grid
def test_energy_is_preserved(grid):
    """Parseval: with kx and -kx both counted, the spectrum holds the signal's energy."""
    x = draw(1, *grid, 2)
    real, imaginary = rdft2(x)
    weight = torch.full((grid[1] // 2 + 1,), 2.0)
    weight[0] = 1
    if grid[1] % 2 == 0:
        weight[-1] = 1
    energy = ((real**2 + imaginary**2) * weight[None, None, :, None]).sum()
    torch.testing.assert_close(energy, x.square().sum(), rtol=1e-5, atol=0)


@every_grid
def test_make_hermitian_leaves_spectra_of_real_signals_alone(grid):
    spectrum = rdft2(draw(2, *grid, 3))
    for got, expected in zip(make_hermitian(*spectrum, grid[1]), spectrum, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@every_grid
def test_make_hermitian_makes_any_spectrum_that_of_a_real_signal(grid):
    h, w = grid
    modes = w // 2 + 1
    parts = draw(1, h, modes, 2), draw(1, h, modes, 2, seed=1)
    real, imaginary = make_hermitian(*parts, w)
    spectrum = torch.complex(real, imaginary)
    mirror = [-row % h for row in range(h)]
    for column in {0, w // 2} if w % 2 == 0 else {0}:
        torch.testing.assert_close(spectrum[:, mirror, column], spectrum[:, :, column].conj(), rtol=0, atol=0)
    own = [c for c in range(modes) if c != 0 and not (w % 2 == 0 and c == w // 2)]
    torch.testing.assert_close(real[:, :, own], parts[0][:, :, own], rtol=0, atol=0)
    torch.testing.assert_close(imaginary[:, :, own], parts[1][:, :, own], rtol=0, atol=0)
    # Nothing is lost in the inverse transform then: the signal has this very spectrum.
    again = rdft2(irdft2(real, imaginary, h, w))
    torch.testing.assert_close(again[0], real, rtol=0, atol=1e-5)
    torch.testing.assert_close(again[1], imaginary, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (6, 5), (5, 6)], ids=lambda grid: f"{grid[0]}x{grid[1]}")
@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (2, 3), (-1, 2)], ids=str)
def test_mixing_commutes_with_cyclic_shifts(grid, shift):
    layer, x = pathway(shrink=0.05), draw(2, *grid, 16)
    rolled = layer(torch.roll(x, shift, (1, 2)))
    torch.testing.assert_close(rolled, torch.roll(layer(x), shift, (1, 2)), rtol=0, atol=1e-4)


def test_mixing_is_not_the_identity():
    """Otherwise commuting with shifts would mean nothing."""
    layer, x = pathway(), draw(1, 8, 8, 16)
    y, other = layer(x), x.clone()
    other[0, 4, 4] += 1
    moved = (layer(other) - y).abs().sum(-1)[0]
    assert (moved > 1e-4).float().mean() > 0.9
    linear = layer.input(x)
    cosine = torch.nn.functional.cosine_similarity(y.flatten(), linear.flatten(), dim=0)
    assert cosine.abs() < 0.9


@pytest.mark.parametrize("grid", [(8, 8), (16, 16), (9, 7)], ids=["8x8", "16x16", "9x7"])
def test_the_corner_token_is_like_any_other(grid):
    """Published AFNO puts ten to twenty times the standard deviation of other tokens at (0, 0)."""
    layer = pathway(dim=32, heads=4)
    energy = layer(draw(64, *grid, 32)).detach().square().mean((0, 3))
    ratio = energy / energy.median()
    assert 0.5 < ratio[0, 0] < 2
    assert ratio.max() < 2


def test_the_network_scales_moduli_and_keeps_phases():
    """Rotating the phase of its input rotates its output: what makes mixing commute with shifts."""
    network = initialise(SpectralNetwork(8, 2, shrink=0.1), 0)
    with torch.no_grad():
        network.offset.normal_()
    real, imaginary = draw(1, 3, 2, 8), draw(1, 3, 2, 8, seed=1)
    turn = torch.polar(torch.tensor(1.0), torch.tensor(0.7))
    turned = torch.complex(real, imaginary) * turn
    got = torch.complex(*network(turned.real, turned.imag))
    torch.testing.assert_close(got, torch.complex(*network(real, imaginary)) * turn, rtol=1e-4, atol=1e-5)


def test_the_network_is_the_complex_formula():
    network = initialise(SpectralNetwork(8, 2, shrink=0.1), 0)
    with torch.no_grad():
        network.slope.normal_()
        network.offset.normal_()
    real, imaginary = draw(5, 8), draw(5, 8, seed=1)
    z = torch.complex(real, imaginary).view(5, 2, 4)
    first, second = (torch.complex(weight[0], weight[1]) for weight in (network.first, network.second))
    z = torch.einsum("fnb,nbc->fnc", z, first)
    z = z * torch.sigmoid(network.slope[:, 0] * z.abs() + network.offset[:, 0])
    z = torch.einsum("fnb,nbc->fnc", z, second)
    z = (z * (1 - 0.1 / z.abs()).clamp(min=0)).reshape(5, 8)
    got = network(real, imaginary)
    torch.testing.assert_close(torch.complex(*got), z, rtol=1e-4, atol=1e-5)


def test_a_large_threshold_silences_the_pathway():
    x = draw(1, 4, 4, 16)
    assert pathway(shrink=1e3)(x).abs().max() < 1e-5 < pathway(shrink=0.0)(x).abs().max()


def test_half_precision_input_is_transformed_in_float32():
    layer, x = pathway(), draw(1, 8, 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.isfinite().all()
    torch.testing.assert_close(y.float(), layer(x), rtol=0, atol=0.1)


def test_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(SettingError, match="model.mixer_width=10.*model.heads=4"):
        FourierPathway(16, width=10, heads=4)
