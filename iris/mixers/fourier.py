"""The Fourier pathway: tokens are mixed by a small network on their 2-D spectrum (AFNO, arXiv 2111.13587).

Three things differ from the published AFNO, whose bias, constant over frequencies, is a spike at token (0, 0) and whose
output loses most of its kx = 0 column in the inverse transform:
no bias over frequencies; a nonlinearity that scales a coefficient by its modulus and leaves its phase alone, so that
mixing commutes with cyclic shifts; columns kx = 0 and Nyquist made Hermitian before the inverse.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from iris.layers import Linear, require_divisible


class SpectralNetwork(nn.Module):
    """Two block-diagonal complex layers shared by all frequencies, complex width C as real [..., blocks, 2C/blocks]."""

    def __init__(self, width: int, blocks: int, shrink: float) -> None:
        super().__init__()
        self.shrink = shrink
        block = width // blocks
        self.first = nn.Parameter(torch.empty(2, blocks, block, block))         # real and imaginary part
        self.second = nn.Parameter(torch.empty(2, blocks, block, block))
        self.slope = nn.Parameter(torch.empty(blocks, 1, block))
        self.offset = nn.Parameter(torch.empty(blocks, 1, block))

    def reset_parameters(self) -> None:
        for weight in (self.first, self.second):  # variance 1/b for the complex product, half of it in each part
            nn.init.normal_(weight, std=(2 * weight.shape[-1]) ** -0.5)
        nn.init.ones_(self.slope)
        nn.init.zeros_(self.offset)

    def forward(self, real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
        """Spectrum [..., C] in two real parts -> the same."""
        shape, blocks = real.shape, self.first.shape[1]
        parts = [part.reshape(-1, blocks, shape[-1] // blocks).transpose(0, 1) for part in (real, imaginary)]
        z = torch.cat(parts, -1)                                                # blocks, frequencies, 2b
        z = torch.bmm(z, _real_form(self.first.float()))
        modulus = _modulus(z)
        z = z * torch.sigmoid(self.slope.float() * modulus + self.offset.float()).repeat(1, 1, 2)
        z = torch.bmm(z, _real_form(self.second.float()))
        z = z * (1 - self.shrink / _modulus(z)).clamp(min=0).repeat(1, 1, 2)    # soft-shrink that keeps the phase
        real, imaginary = z.transpose(0, 1).chunk(2, -1)
        return real.reshape(shape), imaginary.reshape(shape)


def _modulus(z: Tensor) -> Tensor:
    real, imaginary = z.chunk(2, -1)
    return torch.sqrt(real * real + imaginary * imaginary + 1e-12)


def _real_form(weight: Tensor) -> Tensor:
    """Complex matrices [2, blocks, b, b] as real ones [blocks, 2b, 2b] acting on (real, imaginary) rows."""
    real, imaginary = weight.unbind(0)
    return torch.cat([torch.cat([real, imaginary], -1), torch.cat([-imaginary, real], -1)], -2)


class FourierPathway(nn.Module):
    """Linear D -> width, 2-D real DFT (orthonormal), spectral network, inverse: [B, h, w, D] -> [B, h, w, width].

    The transforms are products with constant real matrices: no complex numbers, so it exports to phone runtimes, and
    faster than torch.fft at phone-sized grids. Spectral part in float32.
    """

    def __init__(self, dim: int, width: int | None = None, heads: int = 4, shrink: float = 0.01) -> None:
        super().__init__()
        width = dim if width is None else width
        require_divisible("model.mixer_width", width, "model.heads", heads)
        self.input = Linear(dim, width)
        self.network = SpectralNetwork(width, heads, shrink)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        y = self.input(x)
        with torch.autocast(x.device.type, enabled=False):
            real, imaginary = self.network(*rdft2(y.float()))
            real, imaginary = make_hermitian(real, imaginary, w)
            return irdft2(real, imaginary, h, w).to(y.dtype)


class FourierMixer(nn.Module):
    """The Fourier pathway alone as a mixer, with a linear layer back to D."""

    def __init__(self, dim: int, width: int | None = None, heads: int = 4, shrink: float = 0.01) -> None:
        super().__init__()
        self.pathway = FourierPathway(dim, width, heads, shrink)
        self.out = Linear(dim if width is None else width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pathway(x))


def rdft2(x: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal real 2-D DFT of [B, h, w, C]: real and imaginary part, each [B, h, w//2 + 1, C]."""
    batch, h, w, channels = x.shape
    along_w, along_h, _, _ = _matrices(h, w, x.device)
    modes = w // 2 + 1
    y = torch.matmul(along_w, x).view(batch, h, 2, modes * channels).transpose(1, 2)
    y = torch.matmul(along_h, y.reshape(batch, 2 * h, modes * channels))
    return y.view(batch, 2, h, modes, channels).unbind(1)


def irdft2(real: Tensor, imaginary: Tensor, h: int, w: int) -> Tensor:
    """Inverse of ``rdft2``: two parts [B, h, w//2 + 1, C] -> [B, h, w, C]."""
    batch, _, modes, channels = real.shape
    _, _, back_h, back_w = _matrices(h, w, real.device)
    y = torch.cat([real, imaginary], 1).view(batch, 2 * h, modes * channels)
    y = torch.matmul(back_h, y).view(batch, 2, h, modes, channels).transpose(1, 2)
    return torch.matmul(back_w, y.reshape(batch, h, 2 * modes, channels))


def make_hermitian(real: Tensor, imaginary: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """Give columns kx = 0 (and Nyquist for even w) the symmetry of a real signal: Y(-ky) = conj Y(ky) for ky > 0.

    A real inverse transform would otherwise average the two halves and throw the rest away.
    """
    source, sign = _hermitian(real.shape[1], w, real.device)
    rows, columns = real.shape[1:3]
    flat_real = real.flatten(1, 2).index_select(1, source)
    flat_imaginary = imaginary.flatten(1, 2).index_select(1, source) * sign
    return flat_real.unflatten(1, (rows, columns)), flat_imaginary.unflatten(1, (rows, columns))


@functools.lru_cache(maxsize=32)
def _matrices(h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DFT along w [2K, w], along h [2h, 2h] and their inverses, float32, orthonormal; (re, im) stacked in rows."""
    with torch.inference_mode(False):
        modes = w // 2 + 1
        angle = 2 * math.pi * torch.outer(torch.arange(modes), torch.arange(w)).double() / w
        along_w = torch.cat([angle.cos(), -angle.sin()]) / math.sqrt(w)
        weight = torch.full((modes,), 2.0, dtype=torch.float64)                 # kx and -kx, except where they are one
        weight[0] = 1
        if w % 2 == 0:
            weight[-1] = 1
        back_w = torch.cat([weight[:, None] * angle.cos(), -weight[:, None] * angle.sin()]).T / math.sqrt(w)
        angle = 2 * math.pi * torch.outer(torch.arange(h), torch.arange(h)).double() / h
        cos, sin = angle.cos() / math.sqrt(h), angle.sin() / math.sqrt(h)
        along_h = torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])
        return tuple(m.float().to(device) for m in (along_w, along_h, along_h.T.contiguous(), back_w.contiguous()))


@functools.lru_cache(maxsize=32)
def _hermitian(h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each of the h * (w//2 + 1) coefficients: which one it is copied from, and the sign of its imaginary part."""
    with torch.inference_mode(False):
        modes = w // 2 + 1
        source = torch.arange(h * modes).view(h, modes)
        sign = torch.ones(h, modes)
        for column in {0, modes - 1} if w % 2 == 0 else {0}:
            for row in range(h):
                mirror = -row % h
                if row > mirror:
                    source[row, column], sign[row, column] = source[mirror, column].item(), -1
                elif row == mirror:
                    sign[row, column] = 0
        return source.flatten().to(device), sign.flatten()[:, None].to(device)
