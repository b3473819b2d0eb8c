"""Linear attention with a ReLU kernel (SANA, arXiv 2410.10629): softmax attention's cheap rival."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iris.nn.layers import Linear, RMSNorm, require_divisible, split_heads


class LinearAttention(nn.Module):
    """y_i = relu(q_i) S / (relu(q_i) z) with S = sum_j relu(k_j)^T v_j, z = sum_j relu(k_j): [B, h, w, D] -> same.

    Queries and keys are normalised as in ``Attention``; a query that is orthogonal to every key gets zero. It knows no
    positions, as SANA's does not: permuting tokens permutes the output. Sums in float32, also under autocast.

    Cost per token: 4 D width + 2 width^2 / heads multiply-accumulates, whatever the number of tokens.
    """

    reach = None
    resizable = True

    def __init__(self, dim: int, width: int | None = None, heads: int = 4) -> None:
        super().__init__()
        width = dim if width is None else width
        require_divisible("model.mixer_width", width, "model.heads", heads)
        self.heads = heads
        self.qkv, self.out = Linear(dim, 3 * width), Linear(width, dim)
        self.query_norm, self.key_norm = RMSNorm(width // heads), RMSNorm(width // heads)

    def forward(self, x: Tensor) -> Tensor:
        batch, h, w, _ = x.shape
        query, key, value = split_heads(self.qkv(x).flatten(1, 2), 3, self.heads)
        precise = torch.promote_types(value.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            query, key = F.relu(self.query_norm(query).to(precise)), F.relu(self.key_norm(key).to(precise))
            summed = key.transpose(-1, -2) @ value.to(precise)
            total = (query * key.sum(-2, keepdim=True)).sum(-1, keepdim=True)
            y = (query @ summed / (total + 1e-6)).to(value.dtype)
        return self.out(y.transpose(1, 2).reshape(batch, h, w, -1))
