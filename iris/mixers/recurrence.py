"""The recurrent pathway: the gated linear recurrence RG-LRU (Griffin, arXiv 2402.19427) in four scan directions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iris.layers import BlockLinear, Linear, require_divisible, rms_normalise
from iris.scan import linear_scan

DECAY_EXPONENT = 8.0  # c in the paper
DIRECTIONS = 4


class RGLRU(nn.Module):
    """h_t = a_t h_(t-1) + sqrt(1 - a_t^2) (i_t x_t), log a_t = -8 g_t softplus(L); i, g block-diagonal sigmoid gates.

    The first token of each sequence is a reset (a = 0, m = 1), so that it is not scaled down. float32 inside.
    Decay starts as the paper states it: sigmoid(-L)^8 uniform in [0.9, 0.999] — in a raster of 16 columns a vertical
    neighbour is 16 steps away, and the shorter memory of the released code would forget it.
    """

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.input_gate, self.recurrence_gate = BlockLinear(width, blocks), BlockLinear(width, blocks)
        self.decay = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        base = torch.empty_like(self.decay).uniform_(0.9, 0.999) ** (1 / DECAY_EXPONENT)
        with torch.no_grad():
            self.decay.copy_(torch.log(torch.expm1(-torch.log(base))))

    def forward(self, x: Tensor) -> Tensor:
        """Sequences [B, N, width] -> states [B, N, width]."""
        gated = torch.sigmoid(self.input_gate(x)).float() * x.float()
        log_a = -DECAY_EXPONENT * torch.sigmoid(self.recurrence_gate(x)).float() * F.softplus(self.decay.float())
        first = torch.zeros_like(log_a[:1, :, :1])
        first[:, 0] = 1
        a = log_a.exp() * (1 - first)
        # The floor keeps the square root's gradient finite where the decay is all but one.
        scale = torch.sqrt((-torch.expm1(2 * log_a)).clamp(min=1e-6)) * (1 - first) + first
        return linear_scan(a, scale * gated).to(x.dtype)


class RecurrencePathway(nn.Module):
    """Linear D -> width, RG-LRU, times a GELU branch: [B, h, w, D] -> [B, h, w, width].

    Channels are split in four, one scan direction each: rows forward and backward, columns forward and backward. One
    scan of ``width`` channels thus sees the grid from all sides, and no token is counted twice.
    """

    def __init__(self, dim: int, width: int | None = None, heads: int = 4) -> None:
        super().__init__()
        width = dim if width is None else width
        require_divisible("model.mixer_width", width, "model.heads and 4 scan directions", math.lcm(heads, DIRECTIONS))
        self.input, self.gate = Linear(dim, width), Linear(dim, width)
        self.lru = RGLRU(width, math.lcm(heads, DIRECTIONS))

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        state = merge_directions(self.lru(split_directions(self.input(x))), h, w)
        # A constant input is amplified up to sqrt((1 + a)/(1 - a)) times, and the core repeats it: normalise.
        return rms_normalise(state) * F.gelu(self.gate(x), approximate="tanh")


class RecurrenceMixer(nn.Module):
    """The recurrent pathway alone as a mixer, with a linear layer back to D (Griffin's recurrent block, in 2-D)."""

    def __init__(self, dim: int, width: int | None = None, heads: int = 4) -> None:
        super().__init__()
        self.pathway = RecurrencePathway(dim, width, heads)
        self.out = Linear(dim if width is None else width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pathway(x))


def split_directions(x: Tensor) -> Tensor:
    """[B, h, w, C] -> sequences [B, h*w, C]: a quarter of the channels in each of four orders."""
    rows, rows_back, columns, columns_back = x.chunk(DIRECTIONS, -1)
    across = [part.flatten(1, 2) for part in (rows, rows_back)]
    down = [part.transpose(1, 2).flatten(1, 2) for part in (columns, columns_back)]
    return torch.cat([across[0], across[1].flip(1), down[0], down[1].flip(1)], -1)


def merge_directions(x: Tensor, h: int, w: int) -> Tensor:
    """Inverse of ``split_directions``: [B, h*w, C] -> [B, h, w, C]."""
    rows, rows_back, columns, columns_back = x.chunk(DIRECTIONS, -1)
    across = [part.unflatten(1, (h, w)) for part in (rows, rows_back.flip(1))]
    down = [part.unflatten(1, (w, h)).transpose(1, 2) for part in (columns, columns_back.flip(1))]
    return torch.cat(across + down, -1)
