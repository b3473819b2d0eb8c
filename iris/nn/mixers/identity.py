"""No mixing at all: the floor that every mixer has to clear."""

from __future__ import annotations

from torch import Tensor, nn


class Identity(nn.Module):
    """Tokens [B, h, w, D] as they are. It has no parameters, so ``width`` and ``heads`` change nothing."""

    reach = 0
    resizable = False

    def __init__(self, dim: int, width: int | None = None, heads: int = 4) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x
