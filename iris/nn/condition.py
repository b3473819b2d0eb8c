"""The text as the generator reads it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TextCondition(NamedTuple):
    """An encoded caption batch: tokens [B, L, W], mask [B, L] (True where a token counts), pooled [B, W]."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
