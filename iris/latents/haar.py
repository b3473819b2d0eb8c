"""The 2-D Haar wavelet transform: orthonormal, lossless, sub-bands stacked on channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from iris.errors import SettingError


def dwt(x: Tensor, levels: int = 1) -> Tensor:
    """Haar analysis, full packet form: [B, C, H, W] -> [B, 4^levels C, H / 2^levels, W / 2^levels].

    One level maps each 2 x 2 block (a b / c d) to LL = (a+b+c+d)/2, row difference (a+b-c-d)/2, column difference
    (a-b+c-d)/2 and HH = (a-b-c+d)/2: PyWavelets' cA, cH, cV, cD, stacked band by band. Further levels transform every
    band again, so that all channels share one grid. Energy is preserved exactly.

    Raises:
        SettingError: levels < 1, or H, W not multiples of 2^levels.
    """
    _check(x, levels)
    for _ in range(levels):
        x = _analyse(x)
    return x


def idwt(y: Tensor, levels: int = 1) -> Tensor:
    """Haar synthesis, the inverse (and transpose) of ``dwt``."""
    if levels < 1 or y.shape[1] % 4**levels:
        raise SettingError(f"idwt: {y.shape[1]} channels are not a multiple of 4^levels with levels={levels}")
    for _ in range(levels):
        y = _synthesise(y)
    return y


def _analyse(x: Tensor) -> Tensor:
    a, b = x[..., 0::2, 0::2], x[..., 0::2, 1::2]
    c, d = x[..., 1::2, 0::2], x[..., 1::2, 1::2]
    top, bottom, left, right = a + b, c + d, a - b, c - d
    return torch.cat([top + bottom, top - bottom, left + right, left - right], 1) / 2


def _synthesise(y: Tensor) -> Tensor:
    average, rows, columns, diagonal = y.chunk(4, 1)
    top, bottom = average + rows, average - rows
    left, right = columns + diagonal, columns - diagonal
    blocks = torch.stack([top + left, top - left, bottom + right, bottom - right], 2) / 2
    return F.pixel_shuffle(blocks.flatten(1, 2), 2)


def _check(x: Tensor, levels: int) -> None:
    if levels < 1:
        raise SettingError(f"latent.levels={levels} must be at least 1")
    if x.shape[-1] % 2**levels or x.shape[-2] % 2**levels:
        raise SettingError(
            f"image size {x.shape[-2]}x{x.shape[-1]} must be a multiple of 2^latent.levels = {2**levels}"
        )
