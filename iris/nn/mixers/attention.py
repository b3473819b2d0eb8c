"""Softmax self-attention over all tokens: the opponent that GRFM has to match."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iris.nn.layers import Linear, RMSNorm, require_divisible, rotate, split_heads
from iris.settings import check, setting


@dataclass(frozen=True)
class AttentionOptions:
    """Settings attention.*: how queries and keys know where they are."""

    position: str = setting("rotary", "rotary: by row and column", choices=("rotary", "learned", "none"))

    def __post_init__(self) -> None:
        check(self, "attention")


class Attention(nn.Module):
    """Multi-head attention with QK-norm (SD3, arXiv 2403.03206), [B, h, w, D] -> same.

    Positions: ``rotary`` turns queries and keys by row and column; ``learned`` adds a table to the tokens that queries
    and keys are made from; ``none`` leaves it to what the tokens carry, so that permuting tokens permutes the output.

    Cost per token: 4 D width + 2 N width multiply-accumulates for N tokens.
    """

    reach = None
    resizable = True

    def __init__(
        self, dim: int, width: int | None = None, heads: int = 4, attention: AttentionOptions = AttentionOptions()
    ) -> None:
        super().__init__()
        width = dim if width is None else width
        if attention.position == "rotary":
            require_divisible("model.mixer_width", width, "4 * model.heads", 4 * heads)
        require_divisible("model.mixer_width", width, "model.heads", heads)
        self.heads, self.rotary = heads, attention.position == "rotary"
        self.qkv, self.out = Linear(dim, 3 * width), Linear(width, dim)
        self.query_norm, self.key_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.position = PositionTable(dim) if attention.position == "learned" else None

    def forward(self, x: Tensor) -> Tensor:
        batch, h, w, _ = x.shape
        query, key, value = split_heads(self._project(x).flatten(1, 2), 3, self.heads)
        query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary:
            query, key = rotate(query, h, w), rotate(key, h, w)
        y = F.scaled_dot_product_attention(query, key, value)
        return self.out(y.transpose(1, 2).reshape(batch, h, w, -1))

    def _project(self, x: Tensor) -> Tensor:
        """Queries, keys and values side by side, [B, h, w, 3 width]."""
        qkv = self.qkv(x)
        if self.position is None:
            return qkv
        width = qkv.shape[-1] // 3
        place = F.linear(self.position(*x.shape[1:3]), self.qkv.weight[: 2 * width])  # once, not for each image
        return qkv + F.pad(place, (0, width))


class PositionTable(nn.Module):
    """A learned vector for each place of a ``SIZE`` x ``SIZE`` grid, resized bilinearly to any other: [h, w, D].

    It starts normal with standard deviation 0.02, as in ViT (arXiv 2010.11929).
    """

    SIZE = 16

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(self.SIZE, self.SIZE, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=0.02)

    def forward(self, h: int, w: int) -> Tensor:
        if h == w == self.SIZE:
            return self.table
        channels_first = self.table.permute(2, 0, 1)[None].float()
        resized = F.interpolate(channels_first, (h, w), mode="bilinear", align_corners=False)
        return resized[0].permute(1, 2, 0).to(self.table.dtype)
