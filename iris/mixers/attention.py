"""Softmax self-attention over all tokens: the opponent that GRFM has to match."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from iris.layers import Linear, RMSNorm, require_divisible, rotate, split_heads


class Attention(nn.Module):
    """Multi-head attention with QK-norm (SD3, arXiv 2403.03206) and 2-D rotary positions, [B, h, w, D] -> same.

    Cost per token: 4 D width + 2 N width multiply-accumulates for N tokens.
    """

    def __init__(self, dim: int, width: int | None = None, heads: int = 4) -> None:
        super().__init__()
        width = dim if width is None else width
        require_divisible("model.mixer_width", width, "4 * model.heads", 4 * heads)
        self.heads = heads
        self.qkv, self.out = Linear(dim, 3 * width), Linear(width, dim)
        self.query_norm, self.key_norm = RMSNorm(width // heads), RMSNorm(width // heads)

    def forward(self, x: Tensor) -> Tensor:
        batch, h, w, _ = x.shape
        query, key, value = split_heads(self.qkv(x).flatten(1, 2), 3, self.heads)
        query, key = rotate(self.query_norm(query), h, w), rotate(self.key_norm(key), h, w)
        y = F.scaled_dot_product_attention(query, key, value)
        return self.out(y.transpose(1, 2).reshape(batch, h, w, -1))
