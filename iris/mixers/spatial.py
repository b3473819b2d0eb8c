"""The spatial pathway: tokens are averaged with weights that decay with Manhattan distance (RMT, arXiv 2309.11523)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iris.layers import Linear, require_divisible


class SpatialPathway(nn.Module):
    """Linear D -> width, then per head y = D x with D = gamma^(|dr| + |dc|), rows normalised: [B, h, w, D] -> [B, h, w, width].

    D is the Kronecker product of one decay matrix per axis and stays so after row normalisation, so it is applied
    exactly by two small matrix products. gamma is learned per head, starting as RMT's schedule; log gamma =
    -softplus(theta) keeps it in (0, 1).
    """

    def __init__(self, dim: int, width: int | None = None, heads: int = 4) -> None:
        super().__init__()
        width = dim if width is None else width
        require_divisible("model.mixer_width", width, "model.heads", heads)
        self.heads = heads
        self.input = Linear(dim, width)
        self.theta = nn.Parameter(torch.empty(heads))

    def reset_parameters(self) -> None:
        gamma = 1 - 2.0 ** -(2 + 4 * torch.arange(self.heads) / self.heads)
        with torch.no_grad():
            self.theta.copy_(torch.log(torch.expm1(-torch.log(gamma))))

    def forward(self, x: Tensor) -> Tensor:
        batch, h, w, _ = x.shape
        y = self.input(x)
        depth = y.shape[-1] // self.heads
        heads_first = y.view(batch, h, w, self.heads, depth).permute(0, 3, 1, 2, 4).reshape(batch, self.heads, h, w * depth)
        y = torch.matmul(self.decay(h).to(y.dtype), heads_first).view(batch, self.heads, h, w, depth)
        y = torch.matmul(self.decay(w).to(y.dtype)[:, None], y)
        return y.permute(0, 2, 3, 1, 4).reshape(batch, h, w, -1)

    def decay(self, length: int) -> Tensor:
        """Row-normalised gamma^|i - j| of one axis, [heads, length, length], float32."""
        steps = torch.arange(length, device=self.theta.device)
        distance = (steps[:, None] - steps).abs()
        weights = torch.exp(-F.softplus(self.theta.float())[:, None, None] * distance)
        return weights / weights.sum(-1, keepdim=True)


class SpatialMixer(nn.Module):
    """The spatial pathway alone as a mixer, with a linear layer back to D."""

    def __init__(self, dim: int, width: int | None = None, heads: int = 4) -> None:
        super().__init__()
        self.pathway = SpatialPathway(dim, width, heads)
        self.out = Linear(dim if width is None else width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pathway(x))
