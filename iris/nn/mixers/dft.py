"""2-D transforms of token grids as products with constant real matrices: the real DFT and the DCT-II, orthonormal.

No complex numbers, so they export to phone runtimes, and at phone-sized grids they are faster than torch.fft. With a
cut-off ``modes`` the frequencies above it are not computed, and the inverses take them as zero. Spectra keep the dtype
of their signal, which must be float32 or float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from iris.nn.constants import cached_constant


def rdft2(x: Tensor, modes: int | None = None) -> tuple[Tensor, Tensor]:
    """Orthonormal real 2-D DFT of [B, h, w, C]: real and imaginary part, each [B, rows, columns, C].

    Without ``modes`` that is torch.fft.rfft2: ky = 0 … h-1 and kx = 0 … w//2. With it, |ky| <= modes in the order
    0 … modes, -modes … -1, and kx <= modes.
    """
    batch, h, w, channels = x.shape
    rows, columns = h, w // 2 + 1
    if modes is not None:
        rows, columns = min(2 * modes + 1, rows), min(modes + 1, columns)
    along_w, along_h, _, _ = _dft(h, w, rows, columns, x.device, x.dtype)
    y = torch.matmul(along_w, x).view(batch, h, 2, columns * channels).transpose(1, 2)
    y = torch.matmul(along_h, y.reshape(batch, 2 * h, columns * channels))
    return y.view(batch, 2, rows, columns, channels).unbind(1)


def irdft2(real: Tensor, imaginary: Tensor, h: int, w: int) -> Tensor:
    """Inverse of ``rdft2``, whatever its cut-off: two parts [B, rows, columns, C] -> [B, h, w, C].

    Of a spectrum that no real signal has, it loses what torch.fft.irfft2 loses; ``make_hermitian`` prevents that.
    """
    batch, rows, columns, channels = real.shape
    _, _, back_h, back_w = _dft(h, w, rows, columns, real.device, real.dtype)
    y = torch.cat([real, imaginary], 1).view(batch, 2 * rows, columns * channels)
    y = torch.matmul(back_h, y).view(batch, 2, h, columns, channels).transpose(1, 2)
    return torch.matmul(back_w, y.reshape(batch, h, 2 * columns, channels))


def make_hermitian(real: Tensor, imaginary: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """Give columns kx = 0 (and Nyquist for even w) the symmetry of a real signal: Y(-ky) = conj Y(ky) for ky > 0.

    A real inverse transform would otherwise average the two halves and throw the rest away.
    """
    rows, columns = real.shape[1:3]
    source, sign = _hermitian(rows, columns, w, real.device, real.dtype)
    flat_real = real.flatten(1, 2).index_select(1, source)
    flat_imaginary = imaginary.flatten(1, 2).index_select(1, source) * sign
    return flat_real.unflatten(1, (rows, columns)), flat_imaginary.unflatten(1, (rows, columns))


def dct2(x: Tensor, modes: int | None = None) -> Tensor:
    """Orthonormal 2-D DCT-II of [B, h, w, C] -> [B, rows, columns, C]; with ``modes``, indices 0 … modes of each axis.

    It is the spectrum of the grid mirrored at its edges, so that opposite edges are not neighbours, as they are in the
    DFT. Index k has k/2 periods along its axis.
    """
    batch, h, w, channels = x.shape
    rows, columns = (h, w) if modes is None else (min(modes + 1, h), min(modes + 1, w))
    y = torch.matmul(_dct(w, columns, x.device, x.dtype), x)
    y = torch.matmul(_dct(h, rows, x.device, x.dtype), y.view(batch, h, columns * channels))
    return y.view(batch, rows, columns, channels)


def idct2(y: Tensor, h: int, w: int) -> Tensor:
    """Inverse of ``dct2``, whatever its cut-off: [B, rows, columns, C] -> [B, h, w, C]."""
    batch, rows, columns, channels = y.shape
    x = torch.matmul(_dct(h, rows, y.device, y.dtype).T, y.reshape(batch, rows, columns * channels))
    return torch.matmul(_dct(w, columns, y.device, y.dtype).T, x.view(batch, h, columns, channels))


@cached_constant
def _dft(
    h: int, w: int, rows: int, columns: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DFT along w [2 columns, w], along h [2 rows, 2h] and their inverses, orthonormal; (re, im) stacked in rows."""
    angle = 2 * math.pi * torch.outer(torch.arange(columns), torch.arange(w)).double() / w
    along_w = torch.cat([angle.cos(), -angle.sin()]) / math.sqrt(w)
    own = _is_own_mirror(columns, w)
    weight = torch.where(own, 1.0, 2.0).double()[:, None]  # kx and -kx, except where they are one
    back_w = torch.cat([weight * angle.cos(), -weight * angle.sin()]).T / math.sqrt(w)
    ky = torch.cat([torch.arange((rows + 1) // 2), torch.arange(h - rows // 2, h)])
    angle = 2 * math.pi * torch.outer(ky, torch.arange(h)).double() / h
    cos, sin = angle.cos() / math.sqrt(h), angle.sin() / math.sqrt(h)
    along_h = torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])
    return tuple(m.to(device, dtype) for m in (along_w, along_h, along_h.T.contiguous(), back_w.contiguous()))


@cached_constant
def _hermitian(rows: int, columns: int, w: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For each of the rows * columns coefficients: which one it is copied from, and the sign of its imaginary part."""
    row = torch.arange(rows)
    mirror = (rows - row) % rows
    place = torch.arange(rows * columns).view(rows, columns)
    own = _is_own_mirror(columns, w)
    source = torch.where(own & (row > mirror)[:, None], place[mirror], place)
    sign = torch.where(own, torch.sign(mirror - row)[:, None], 1)  # 0 where ky is its own mirror
    return source.flatten().to(device), sign.flatten()[:, None].to(device, dtype)


def _is_own_mirror(columns: int, w: int) -> Tensor:
    """Bool [columns]: whether kx and -kx are one, as for kx = 0 and the Nyquist frequency of an even w."""
    column = torch.arange(columns)
    return 2 * column % w == 0


@cached_constant
def _dct(length: int, indices: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The first ``indices`` rows of the orthonormal DCT-II matrix of ``length``."""
    k, n = torch.arange(indices), torch.arange(length)
    cos = torch.cos(math.pi * torch.outer(k, 2 * n + 1).double() / (2 * length))
    return (cos * torch.where(k == 0, 1.0, 2.0).double().div(length).sqrt()[:, None]).to(device, dtype)
