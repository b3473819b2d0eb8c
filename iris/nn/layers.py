"""The layers that mixers and generator share. Tokens are [B, h, w, D] wherever space matters."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iris.errors import SettingError
from iris.nn.constants import cached_constant

MODULATION_SCALE = 1000.0  # times and loop positions in [0, 1] become the 0 … 1000 that sinusoids were made for


class Linear(nn.Linear):
    """A linear layer with Xavier-uniform weights and zero bias, as in DiT (arXiv 2212.09748)."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero, so that what it feeds starts as the identity (adaLN-Zero, arXiv 2212.09748)."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class BlockLinear(nn.Module):
    """A block-diagonal linear layer: ``blocks`` independent maps of width/blocks channels each, [..., width] -> same.

    Weights start normal with standard deviation 1/sqrt(block width), biases at zero (Griffin, arXiv 2402.19427).
    """

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        require_divisible("model.mixer_width", width, "blocks", blocks)
        self.blocks = blocks
        self.weight = nn.Parameter(torch.empty(blocks, width // blocks, width // blocks))
        self.bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[-1] ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.blocks, self.weight.shape[1]).transpose(0, 1)  # blocks, tokens, b
        return torch.bmm(rows, self.weight).transpose(0, 1).reshape(x.shape) + self.bias


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last axis with a learned scale (arXiv 1910.07467), float32 inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalise(x) * self.scale


def rms_normalise(x: Tensor) -> Tensor:
    """x divided by the root mean square of its last axis; computed in float32 or wider, returned in x's dtype."""
    return F.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:], eps=1e-6).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift with x [B, h, w, D] and shift, scale [B, D]."""
    return torch.addcmul(shift[:, None, None], x, 1 + scale[:, None, None])


class Modulation(nn.Module):
    """adaLN-Zero: condition [B, D] -> ``parts`` vectors [B, D], all zero at the start (arXiv 2212.09748)."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = ZeroLinear(dim, parts * dim)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(condition)).chunk(self.parts, -1)


class ModulationTable(nn.Module):
    """A block's share of adaLN-single (PixArt, arXiv 2310.00426): the first ``parts`` vectors of a projection made once for
    all blocks, plus a learned table. The table starts at zero, so that blocks start as the identity (PixArt's is random).
    """

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(parts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.table)

    def forward(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Shared projection [B, P D] with P >= parts -> ``parts`` vectors [B, D]."""
        parts, dim = self.table.shape
        return (projected[:, : parts * dim].unflatten(-1, (parts, dim)) + self.table).unbind(1)


class ScalarEmbedding(nn.Module):
    """A number in [0, 1] per image -> [B, D], by 128 sinusoids and a two-layer network (arXiv 2212.09748)."""

    FREQUENCIES = 64

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = Linear(2 * self.FREQUENCIES, dim)
        self.outer = Linear(dim, dim)

    def forward(self, value: Tensor) -> Tensor:
        steps = torch.arange(self.FREQUENCIES, device=value.device, dtype=torch.float32)
        angle = MODULATION_SCALE * value.float()[:, None] * torch.exp(-math.log(1e4) * steps / self.FREQUENCIES)
        waves = torch.cat([angle.cos(), angle.sin()], -1).to(self.inner.weight.dtype)
        return self.outer(F.silu(self.inner(waves)))


class FeedForward(nn.Module):
    """Linear, tanh-GELU, linear; hidden width ``ratio`` times the model's."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.up, self.down = Linear(dim, hidden), Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class CrossAttention(nn.Module):
    """Image tokens look at text tokens: queries [B, h, w, D], keys and values from text [B, L, W], QK-normalised.

    Keys and values depend on the text alone, so ``prepare`` makes them once for all passes through a shared core.
    """

    def __init__(self, dim: int, text_width: int, heads: int) -> None:
        super().__init__()
        require_divisible("model.dim", dim, "model.heads", heads)
        self.heads = heads
        self.query, self.key_value = Linear(dim, dim), Linear(text_width, 2 * dim)
        self.query_norm, self.key_norm = RMSNorm(dim // heads), RMSNorm(dim // heads)
        self.out = Linear(dim, dim)

    def prepare(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, L, D/heads] of text tokens [B, L, W]."""
        key, value = split_heads(self.key_value(text), 2, self.heads)
        return self.key_norm(key), value

    def forward(self, x: Tensor, key_value: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """x [B, h, w, D], prepared keys and values, mask [B, L] (True where a token counts) -> [B, h, w, D]."""
        (query,) = split_heads(self.query(x).flatten(1, 2), 1, self.heads)
        key, value = key_value
        y = F.scaled_dot_product_attention(self.query_norm(query), key, value, attn_mask=mask[:, None, None])
        return self.out(y.transpose(1, 2).reshape(x.shape))


class LocalAttention(nn.Module):
    """Self-attention in blocks of ``block`` x ``block`` queries that also see ``halo`` tokens around their block.

    Cost is linear in the number of tokens (blocked local attention with halo, arXiv 2103.12731); QK-normalised, 2-D rotary.
    Grids of up to ``DENSE`` tokens take the same attention as one masked product, which is faster there.
    """

    DENSE = 256

    def __init__(self, dim: int, heads: int, block: int = 4, halo: int = 2) -> None:
        super().__init__()
        require_divisible("model.dim", dim, "model.heads", heads)
        self.heads, self.block, self.halo = heads, block, halo
        self.qkv, self.out = Linear(dim, 3 * dim), Linear(dim, dim)
        self.query_norm, self.key_norm = RMSNorm(dim // heads), RMSNorm(dim // heads)

    def forward(self, x: Tensor) -> Tensor:
        batch, h, w, dim = x.shape
        query, key, value = split_heads(self.qkv(x).flatten(1, 2), 3, self.heads)
        query, key = rotate(self.query_norm(query), h, w), rotate(self.key_norm(key), h, w)
        if h * w <= self.DENSE:
            mask = _halo_mask(h, w, self.block, self.halo, x.device)
            y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            return self.out(y.transpose(1, 2).reshape(x.shape))
        rows, columns = -(-h // self.block), -(-w // self.block)
        query = self._blocks(query, h, w, rows, columns, halo=0)
        key, value = (self._blocks(k, h, w, rows, columns, self.halo) for k in (key, value))
        inside = torch.ones(1, 1, h * w, 1, device=x.device, dtype=x.dtype)
        mask = self._blocks(inside, h, w, rows, columns, self.halo).squeeze(-1).bool()  # rows * columns, 1, keys
        mask = mask.repeat(batch, 1, 1)[:, :, None]
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        y = y.reshape(batch, rows, columns, self.heads, self.block, self.block, -1)
        y = y.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, rows * self.block, columns * self.block, dim)
        return self.out(y[:, :h, :w])

    def _blocks(self, x: Tensor, h: int, w: int, rows: int, columns: int, halo: int) -> Tensor:
        """[B, heads, N, d] -> [B * rows * columns, heads, (block + 2 halo)^2, d], zeros outside the grid."""
        size = self.block + 2 * halo
        batch, heads, _, depth = x.shape
        x = x.reshape(batch, heads, h, w, depth)
        x = F.pad(x, (0, 0, halo, halo + columns * self.block - w, halo, halo + rows * self.block - h))
        x = x.unfold(2, size, self.block).unfold(3, size, self.block)  # B, heads, rows, columns, d, size, size
        return x.permute(0, 2, 3, 1, 5, 6, 4).reshape(batch * rows * columns, heads, size * size, depth)


@cached_constant
def _halo_mask(h: int, w: int, block: int, halo: int, device: torch.device) -> Tensor:
    """Which key each query sees, bool [h*w, h*w]: those of its block and ``halo`` tokens around."""
    row, column = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
    seen = torch.ones(h * w, h * w, dtype=torch.bool)
    for place in (row, column):
        first = place // block * block - halo
        seen &= (place >= first[:, None]) & (place < first[:, None] + block + 2 * halo)
    return seen.to(device)


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[B, N, parts * D] -> ``parts`` tensors [B, heads, N, D/heads]."""
    batch, length, width = x.shape
    return x.view(batch, length, parts, heads, width // parts // heads).permute(2, 0, 3, 1, 4).unbind(0)


def rotate(x: Tensor, h: int, w: int) -> Tensor:
    """2-D rotary position for [B, heads, h*w, d]: half of the channels turn with the row, half with the column.

    Angles follow RoFormer (arXiv 2104.09864) with base 100, since grids have tens of rows, not thousands.
    """
    cos, sin = _rotary(h, w, x.shape[-1], x.device, x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@cached_constant
def _rotary(h: int, w: int, width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if width % 4:
        raise SettingError(f"head width {width} must be a multiple of 4 for 2-D rotary positions")
    frequency = 100.0 ** (-torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    row = torch.arange(h).repeat_interleave(w)[:, None] * frequency
    column = torch.arange(w).repeat(h)[:, None] * frequency
    angle = torch.cat([row, column], -1)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def position_embedding(h: int, w: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Fixed sinusoids [h, w, D] of the position relative to the grid's size, so that any grid can be used.

    Raises:
        SettingError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise SettingError(f"model.dim={dim} must be a multiple of 4")
    frequency = 2.0 ** torch.linspace(0, 5, dim // 4, device=device)
    row = math.pi * ((torch.arange(h, device=device) + 0.5) / h)[:, None] * frequency
    column = math.pi * ((torch.arange(w, device=device) + 0.5) / w)[:, None] * frequency
    rows = torch.cat([row.sin(), row.cos()], -1)[:, None].expand(h, w, -1)
    columns = torch.cat([column.sin(), column.cos()], -1)[None].expand(h, w, -1)
    return torch.cat([rows, columns], -1).to(dtype)


def require_divisible(name: str, value: int, by_name: str, by: int) -> None:
    """Raise a SettingError that names both settings unless ``value`` is a positive multiple of ``by``."""
    if by < 1 or value < 1 or value % by:
        raise SettingError(f"{name}={value} must be a positive multiple of {by_name}={by}")
