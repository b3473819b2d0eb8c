"""The transforms against torch.fft and scipy.fft, on every shape of grid and with every cut-off."""

import numpy as np
import pytest
import scipy.fft
import torch

from iris.nn.mixers.dft import dct2, idct2, irdft2, make_hermitian, rdft2

GRIDS = [(8, 8), (5, 7), (7, 5), (6, 5), (5, 6), (16, 16), (1, 4), (4, 1), (1, 1), (2, 2), (3, 2)]

every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
every_cut_off = pytest.mark.parametrize("modes", [None, 0, 1, 2, 3, 9])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def kept_rows(h, modes):
    """Rows of an FFT with |ky| <= modes, in the order of the FFT."""
    return [row for row in range(h) if modes is None or min(row, h - row) <= modes]


@every_grid
@every_cut_off
def test_rdft2_is_the_low_part_of_torchs_orthonormal_transform(grid, modes):
    h, w = grid
    x = draw(2, h, w, 3)
    columns = range(w // 2 + 1)[: None if modes is None else modes + 1]
    expected = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")[:, kept_rows(h, modes)][:, :, list(columns)]
    real, imaginary = rdft2(x, modes)
    same(real, expected.real)
    same(imaginary, expected.imag)
    same(rdft2(x.float(), modes)[0], expected.real.float(), 1e-5)


@every_grid
@every_cut_off
def test_irdft2_is_torchs_inverse_with_zeros_above_the_cut_off(grid, modes):
    h, w = grid
    real, imaginary = rdft2(draw(2, h, w, 3), modes)
    full = torch.zeros(2, h, w // 2 + 1, 3, dtype=torch.complex128)
    full[:, kept_rows(h, modes), : real.shape[2]] = torch.complex(real, imaginary)
    same(irdft2(real, imaginary, h, w), torch.fft.irfft2(full, (h, w), dim=(1, 2), norm="ortho"))


@every_grid
def test_the_inverse_gives_the_signal_back(grid):
    x = draw(2, *grid, 3)
    same(irdft2(*rdft2(x), *grid), x)
    same(idct2(dct2(x), *grid), x)
    same(irdft2(*rdft2(x.float()), *grid), x.float(), 1e-5)


@every_grid
def test_irdft2_loses_what_irfft2_loses(grid):
    """A spectrum that no real signal has: numpy's inverse, another implementation than torch's, drops the same part."""
    h, w = grid
    parts = draw(2, h, w // 2 + 1, 3), draw(2, h, w // 2 + 1, 3, seed=1)
    expected = np.fft.irfft2(torch.complex(*parts).numpy(), (h, w), axes=(1, 2), norm="ortho")
    same(irdft2(*parts, h, w), torch.from_numpy(expected))


@every_grid
def test_energy_is_preserved(grid):
    """Parseval; in the DFT kx and -kx both count."""
    x = draw(1, *grid, 2)
    real, imaginary = rdft2(x)
    weight = torch.full((grid[1] // 2 + 1,), 2.0)
    weight[0] = 1
    if grid[1] % 2 == 0:
        weight[-1] = 1
    same(((real**2 + imaginary**2) * weight[:, None]).sum(), x.square().sum(), 1e-10)
    same(dct2(x).square().sum(), x.square().sum(), 1e-10)


@every_grid
@every_cut_off
def test_make_hermitian_leaves_spectra_of_real_signals_alone(grid, modes):
    spectrum = rdft2(draw(2, *grid, 3), modes)
    for got, expected in zip(make_hermitian(*spectrum, grid[1]), spectrum, strict=True):
        same(got, expected)


@every_grid
@every_cut_off
def test_make_hermitian_makes_any_spectrum_that_of_a_real_signal(grid, modes):
    h, w = grid
    rows, columns = rdft2(draw(1, h, w, 2), modes)[0].shape[1:3]
    parts = draw(1, rows, columns, 2, seed=1), draw(1, rows, columns, 2, seed=2)
    real, imaginary = make_hermitian(*parts, w)
    spectrum = torch.complex(real, imaginary)
    mirror = [-row % rows for row in range(rows)]
    edges = {0} | ({w // 2} if w % 2 == 0 and w // 2 < columns else set())
    for column in edges:
        same(spectrum[:, mirror, column], spectrum[:, :, column].conj(), 0)
    own = [column for column in range(columns) if column not in edges]
    same(real[:, :, own], parts[0][:, :, own], 0)
    same(imaginary[:, :, own], parts[1][:, :, own], 0)
    upper = range(1, (rows + 1) // 2)  # ky > 0, from which the mirror is copied
    same(real[:, upper], parts[0][:, upper], 0)
    # Nothing is lost in the inverse transform then: the signal has this very spectrum.
    again = rdft2(irdft2(real, imaginary, h, w), modes)
    same(again[0], real)
    same(again[1], imaginary)


@every_grid
@every_cut_off
def test_dct2_is_the_low_part_of_scipys_orthonormal_transform(grid, modes):
    x = draw(2, *grid, 3)
    low = slice(None if modes is None else modes + 1)
    full = scipy.fft.dctn(x.numpy(), axes=(1, 2), norm="ortho")
    same(dct2(x, modes), torch.from_numpy(full[:, low, low].copy()))
    same(dct2(x.float(), modes), torch.from_numpy(full[:, low, low]).float(), 1e-5)
    cut = np.zeros_like(full)
    cut[:, low, low] = full[:, low, low]
    same(idct2(dct2(x, modes), *grid), torch.from_numpy(scipy.fft.idctn(cut, axes=(1, 2), norm="ortho")))


def test_opposite_edges_are_neighbours_in_the_dft_and_not_in_the_dct():
    """Low modes of a point at the left edge show at the right edge only where the transform wraps around."""
    x = torch.zeros(1, 1, 16, 1, dtype=torch.float64)
    x[0, 0, 0] = 1
    wrapped, mirrored = irdft2(*rdft2(x, 2), 1, 16).flatten(), idct2(dct2(x, 4), 1, 16).flatten()
    assert wrapped[-1] > 0.8 * wrapped[0]
    assert mirrored[-1].abs() < 0.2 * mirrored[0]
