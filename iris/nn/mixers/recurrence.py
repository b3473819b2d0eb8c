"""The recurrent pathway: the gated linear recurrence RG-LRU (Griffin, arXiv 2402.19427), scanned two or four ways."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iris.nn.layers import BlockLinear, Linear, require_divisible, rms_normalise
from iris.nn.scan import linear_scan
from iris.settings import check, setting

DECAY_EXPONENT = 8.0  # c in the paper
DIRECTIONS = {"cross4": 4, "raster2": 2}


@dataclass(frozen=True)
class RecurrenceOptions:
    """Settings recurrence.*: how the ``decay`` starts, which ways the grid is scanned, where the state is reset.

    decay: with s = sigmoid(-L), ``paper``: s^8 uniform in [0.9, 0.999]; ``code``, as Griffin's authors released it: s^2
        uniform in [0.9^2, 0.999^2], a memory one eighth as long.
    scan: ``cross4``: rows forward and backward, columns down and up (VMamba, arXiv 2401.10166); ``raster2``: rows only.
    reset: ``sequence``: at the first token of each direction; ``row``: at the start of every line, a row or a column,
        which then sees no other line.
    """

    decay: str = setting(
        "paper", "how the decay starts; code: as Griffin's authors released it", choices=("paper", "code")
    )
    scan: str = setting("cross4", "cross4: rows and columns, both ways; raster2: rows", choices=tuple(DIRECTIONS))
    reset: str = setting("sequence", "where the state is reset", choices=("sequence", "row"))

    def __post_init__(self) -> None:
        check(self, "recurrence")


class RGLRU(nn.Module):
    """h_t = a_t h_(t-1) + m_t (i_t x_t), log a_t = -8 g_t softplus(L); i, g block-diagonal sigmoid gates.

    m_t = sqrt(1 - a_t^2), at least 1e-3. The first token of each sequence is a reset (a = 0, m = 1), so that it is not
    scaled down. float32 inside. The default decay starts as the paper states it: in a raster of 16 columns a vertical
    neighbour is 16 steps away, and the shorter memory of the released code would forget it.
    """

    def __init__(self, width: int, blocks: int, decay: str = "paper") -> None:
        super().__init__()
        self.start = decay
        self.input_gate, self.recurrence_gate = BlockLinear(width, blocks), BlockLinear(width, blocks)
        self.decay = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.decay.is_meta:  # nothing to fill, and arithmetic there loads torch.compile
            return
        # 0.999^(1/8) is 1 in half precision, and its logarithm 0.
        base = torch.empty_like(self.decay, dtype=torch.promote_types(self.decay.dtype, torch.float32))
        if self.start == "paper":
            base = base.uniform_(0.9, 0.999) ** (1 / DECAY_EXPONENT)
        else:
            base = base.uniform_(0.9**2, 0.999**2).sqrt()
        with torch.no_grad():
            self.decay.copy_(torch.log(torch.expm1(-torch.log(base))))

    def forward(self, x: Tensor, lines: Sequence[int] | None = None) -> Tensor:
        """Sequences [B, N, width] -> states [B, N, width].

        ``lines`` cuts the sequences into lines that each start anew: one length, a divisor of N, for each equal group
        of channels. None leaves them whole.
        """
        gated = torch.sigmoid(self.input_gate(x)).float() * x.float()
        log_a = -DECAY_EXPONENT * torch.sigmoid(self.recurrence_gate(x)).float() * F.softplus(self.decay.float())
        if lines is None:
            return _states(log_a, gated).to(x.dtype)
        lines = lines if len(set(lines)) > 1 else lines[:1]
        groups = [
            _states(*(part.reshape(-1, line, part.shape[-1]) for part in parts)).reshape(parts[0].shape)
            for *parts, line in zip(log_a.chunk(len(lines), -1), gated.chunk(len(lines), -1), lines, strict=True)
        ]
        return torch.cat(groups, -1).to(x.dtype)


def _states(log_a: Tensor, gated: Tensor) -> Tensor:
    """States [B, N, C] of the recurrence with decay exp(log_a) and gated input, reset at the first token."""
    first = torch.zeros_like(log_a[:1, :, :1])
    first[:, 0] = 1
    a = log_a.exp() * (1 - first)
    # The floor keeps the square root's gradient finite where the decay is all but one.
    scale = torch.sqrt((-torch.expm1(2 * log_a)).clamp(min=1e-6)) * (1 - first) + first
    return linear_scan(a, scale * gated)


class RecurrencePathway(nn.Module):
    """Linear D -> width, RG-LRU, times a GELU branch: [B, h, w, D] -> [B, h, w, width].

    Each scan direction has an equal share of the channels, and gate blocks of its own. One scan of ``width`` channels
    thus sees the grid from all sides, and nothing is summed over directions: no token is counted twice, and the
    variance is that of one direction.
    """

    def __init__(
        self, dim: int, width: int | None = None, heads: int = 4, recurrence: RecurrenceOptions = RecurrenceOptions()
    ) -> None:
        super().__init__()
        width = dim if width is None else width
        self.directions, self.reset = DIRECTIONS[recurrence.scan], recurrence.reset
        blocks = math.lcm(heads, self.directions)
        require_divisible("model.mixer_width", width, f"model.heads and {self.directions} scan directions", blocks)
        self.input, self.gate = Linear(dim, width), Linear(dim, width)
        self.lru = RGLRU(width, blocks, recurrence.decay)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        lines = (w, h)[: self.directions // 2] if self.reset == "row" else None
        state = self.lru(split_directions(self.input(x), self.directions), lines)
        state = merge_directions(state, h, w, self.directions)
        # A constant input is amplified up to sqrt((1 + a)/(1 - a)) times, and the core repeats it: normalise.
        return rms_normalise(state) * F.gelu(self.gate(x), approximate="tanh")


class RecurrenceMixer(nn.Module):
    """The recurrent pathway alone as a mixer, with a linear layer back to D (Griffin's recurrent block, in 2-D)."""

    reach = None
    resizable = True

    def __init__(
        self, dim: int, width: int | None = None, heads: int = 4, recurrence: RecurrenceOptions = RecurrenceOptions()
    ) -> None:
        super().__init__()
        self.pathway = RecurrencePathway(dim, width, heads, recurrence)
        self.out = Linear(dim if width is None else width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pathway(x))


def split_directions(x: Tensor, directions: int = 4) -> Tensor:
    """[B, h, w, C] -> sequences [B, h*w, C], an equal share of the channels in each order.

    The orders are rows forward, rows backward and, with four ``directions``, columns forward, columns backward.
    """
    sequences = []
    for number, part in enumerate(x.chunk(directions, -1)):
        sequence = (part if number < 2 else part.transpose(1, 2)).flatten(1, 2)
        sequences.append(sequence.flip(1) if number % 2 else sequence)
    return torch.cat(sequences, -1)


def merge_directions(x: Tensor, h: int, w: int, directions: int = 4) -> Tensor:
    """Inverse of ``split_directions``: [B, h*w, C] -> [B, h, w, C]."""
    grids = []
    for number, part in enumerate(x.chunk(directions, -1)):
        sequence = part.flip(1) if number % 2 else part
        grids.append(sequence.unflatten(1, (h, w)) if number < 2 else sequence.unflatten(1, (w, h)).transpose(1, 2))
    return torch.cat(grids, -1)
