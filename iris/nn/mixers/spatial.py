"""The spatial pathway: tokens are averaged with weights that decay with Manhattan distance (RMT, arXiv 2309.11523)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iris.nn.layers import Linear, require_divisible
from iris.nn.scan import linear_scan
from iris.settings import check, setting


@dataclass(frozen=True)
class SpatialOptions:
    """Settings spatial.*: gamma learned or fixed, how the decay matrix is applied, whether its rows sum to one.

    form: three ways to the same result, with h x w tokens of C channels. ``product``: two axis matrices, (h + w) C
        multiply-accumulates a token; ``dense``: all of it, h w C a token; ``recursion``: a two-sided first-order
        recursion along each axis, about 4 C a token.
    normalise: False applies gamma^(|dr| + |dc|) as it is, so that corners get up to four times smaller sums.
    """

    decay: str = setting("learned", "fixed: RMT's schedule", choices=("learned", "fixed"))
    form: str = setting("product", "the same result at three costs", choices=("product", "dense", "recursion"))
    normalise: bool = setting(True, "rows of the decay matrix sum to one")

    def __post_init__(self) -> None:
        check(self, "spatial")


class SpatialPathway(nn.Module):
    """Linear D -> width, then per head the decay matrix M = gamma^(|dr| + |dc|): [B, h, w, D] -> [B, h, w, width].

    M is the Kronecker product of one decay matrix per axis and stays so after row normalisation, so it is applied
    exactly by two small matrix products or by one recursion per axis. gamma is learned per head, starting as RMT's
    schedule; log gamma = -softplus(theta) keeps it in (0, 1). A fixed gamma is a buffer, and there is no theta.
    """

    def __init__(
        self, dim: int, width: int | None = None, heads: int = 4, spatial: SpatialOptions = SpatialOptions()
    ) -> None:
        super().__init__()
        width = dim if width is None else width
        require_divisible("model.mixer_width", width, "model.heads", heads)
        self.heads = heads
        self.form, self.normalise = spatial.form, spatial.normalise
        self.input = Linear(dim, width)
        self.theta = nn.Parameter(torch.empty(heads)) if spatial.decay == "learned" else None
        if self.theta is None:
            self.register_buffer("fixed", torch.log(gamma_schedule(heads)), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.theta is not None and not self.theta.is_meta:  # as in RGLRU
            with torch.no_grad():
                self.theta.copy_(torch.log(torch.expm1(-torch.log(gamma_schedule(self.heads)))))

    def forward(self, x: Tensor) -> Tensor:
        forms = {"product": self._product, "dense": self._dense, "recursion": self._recursion}
        return forms[self.form](self.input(x))

    def log_gamma(self) -> Tensor:
        """log gamma of each head, [heads], float32."""
        return self.fixed.float() if self.theta is None else -F.softplus(self.theta.float())

    def decay(self, length: int) -> Tensor:
        """gamma^|i - j| of one axis, [heads, length, length], float32; rows sum to one unless ``normalise`` is off."""
        log_gamma = self.log_gamma()
        steps = torch.arange(length, device=log_gamma.device)
        distance = (steps[:, None] - steps).abs()
        weights = torch.exp(log_gamma[:, None, None] * distance)
        return weights / weights.sum(-1, keepdim=True) if self.normalise else weights

    def _product(self, y: Tensor) -> Tensor:
        batch, h, w, width = y.shape
        depth = width // self.heads
        heads_first = y.view(batch, h, w, self.heads, depth).permute(0, 3, 1, 2, 4)
        heads_first = heads_first.reshape(batch, self.heads, h, w * depth)
        y = torch.matmul(self.decay(h).to(y.dtype), heads_first).view(batch, self.heads, h, w, depth)
        y = torch.matmul(self.decay(w).to(y.dtype)[:, None], y)
        return y.permute(0, 2, 3, 1, 4).reshape(batch, h, w, width)

    def _dense(self, y: Tensor) -> Tensor:
        batch, h, w, _ = y.shape
        matrix = torch.einsum("kij,kmn->kimjn", self.decay(h), self.decay(w)).reshape(self.heads, h * w, h * w)
        tokens = y.reshape(batch, h * w, self.heads, -1).transpose(1, 2)  # B, heads, tokens, depth
        return torch.matmul(matrix.to(y.dtype), tokens).transpose(1, 2).reshape(y.shape)

    def _recursion(self, y: Tensor) -> Tensor:
        batch, h, w, width = y.shape
        log_gamma = self.log_gamma().repeat_interleave(width // self.heads)  # one per channel
        z = two_sided(y.float().reshape(batch * h, w, width), log_gamma)
        z = two_sided(z.reshape(batch, h, w * width), log_gamma.repeat(w)).reshape(y.shape)
        if self.normalise:
            z = z / (row_sums(log_gamma, h)[:, None] * row_sums(log_gamma, w))
        return z.to(y.dtype)


def gamma_schedule(heads: int) -> Tensor:
    """RMT's gamma_k = 1 - 2^-(2 + 4 k / heads) of each head k, [heads], float32."""
    return 1 - 2.0 ** -(2 + 4 * torch.arange(heads) / heads)


def two_sided(x: Tensor, log_gamma: Tensor) -> Tensor:
    """y_i = sum_j gamma^|i - j| x_j along axis 1 of x [B, n, C], a gamma per channel: forward + backward - self."""
    both = torch.cat([x, x.flip(1)])
    forward, backward = linear_scan(log_gamma.exp().expand_as(both), both).chunk(2)
    return forward + backward.flip(1) - x


def row_sums(log_gamma: Tensor, length: int) -> Tensor:
    """sum_j gamma^|i - j| for each i of an axis, [length, C]: two geometric series that share their first term."""
    log_gamma = log_gamma.clamp(max=-1e-12)  # 0/0 at gamma = 1
    terms = torch.arange(1, length + 1, device=log_gamma.device)[:, None]
    series = torch.expm1(terms * log_gamma) / torch.expm1(log_gamma)
    return series + series.flip(0) - 1


class SpatialMixer(nn.Module):
    """The spatial pathway alone as a mixer, with a linear layer back to D."""

    reach = None
    resizable = True

    def __init__(
        self, dim: int, width: int | None = None, heads: int = 4, spatial: SpatialOptions = SpatialOptions()
    ) -> None:
        super().__init__()
        self.pathway = SpatialPathway(dim, width, heads, spatial)
        self.out = Linear(dim if width is None else width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pathway(x))
