"""The generator: a prelude of convolutions, a core looped with shared weights, a coda of local attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iris.errors import SettingError
from iris.layers import (
    CrossAttention,
    FeedForward,
    Linear,
    LocalAttention,
    Modulation,
    RMSNorm,
    ScalarEmbedding,
    ZeroLinear,
    modulate,
    position_embedding,
    rms_normalise,
)
from iris.mixers import build_mixer


class TextCondition(NamedTuple):
    """An encoded caption batch: tokens [B, L, W], mask [B, L] (True where a token counts), pooled [B, W]."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


@dataclass(frozen=True)
class GeneratorConfig:
    """What determines a generator's shape. ``mixer_width`` is the mixer's inner width (None: ``dim``)."""

    channels: int
    text_width: int
    dim: int
    heads: int
    prelude: int
    core: int
    coda: int
    iterations: int
    ffn_ratio: float
    mixer: str
    mixer_width: int | None = None

    def __post_init__(self) -> None:
        for name in ("channels", "text_width", "dim", "heads", "prelude", "core", "coda", "iterations"):
            if getattr(self, name) < 1:
                raise SettingError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.dim % (4 * self.heads):
            raise SettingError(f"model.dim={self.dim} must be a multiple of 4 * model.heads={4 * self.heads}")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values."""
        return asdict(self)


class ConvBlock(nn.Module):
    """Prelude block: depthwise 3x3, pointwise network, adaLN-Zero; [B, h, w, D] and condition [B, D] -> [B, h, w, D]."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.modulation = Modulation(dim, 3)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.feed_forward = FeedForward(dim, ratio)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition)
        y = modulate(rms_normalise(x), shift, scale)
        y = self.depthwise(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + gate[:, None, None] * self.feed_forward(y)


class CoreLayer(nn.Module):
    """Mixer, cross-attention to the text, feed-forward; each with its own adaLN-Zero shift, scale and gate."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.modulation = Modulation(config.dim, 9)
        self.mixer = build_mixer(config.mixer, config.dim, width=config.mixer_width, heads=config.heads)
        self.cross = CrossAttention(config.dim, config.text_width, config.heads)
        self.feed_forward = FeedForward(config.dim, config.ffn_ratio)

    def forward(self, x: Tensor, condition: Tensor, text: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        parts = [part for part in self.modulation(condition)]
        for (shift, scale, gate), part in zip(
            (parts[0:3], parts[3:6], parts[6:9]),
            (self.mixer, lambda y: self.cross(y, text, mask), self.feed_forward),
            strict=True,
        ):
            x = x + gate[:, None, None] * part(modulate(rms_normalise(x), shift, scale))
        return x


class CodaBlock(nn.Module):
    """Local attention and feed-forward with adaLN-Zero."""

    def __init__(self, dim: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.modulation = Modulation(dim, 6)
        self.attention = LocalAttention(dim, heads)
        self.feed_forward = FeedForward(dim, ratio)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.modulation(condition)
        x = x + gate[:, None, None] * self.attention(modulate(rms_normalise(x), shift, scale))
        return x + gate_ff[:, None, None] * self.feed_forward(modulate(rms_normalise(x), shift_ff, scale_ff))


class Injection(nn.Module):
    """Linear 2D -> D on (state, input) at every pass, so that the input is never forgotten (Huginn, arXiv 2502.05171).

    It starts as the mean of the two: with all gates at zero the loop then leaves its input as it is.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 2 * dim))

    def reset_parameters(self) -> None:
        identity = torch.eye(self.weight.shape[0])
        with torch.no_grad():
            self.weight.copy_(torch.cat([identity, identity], 1) / 2)

    def forward(self, state: Tensor, given: Tensor) -> Tensor:
        return F.linear(torch.cat([state, given], -1), self.weight)


class Generator(nn.Module):
    """Predicts the flow's velocity: z_t [B, C, h, w], t [B] and text -> v [B, C, h, w], for any h x w.

    The core is passed ``iterations`` times with the same weights; its modulation also sees how far the loop is (k / r),
    which stays in range for an r unseen in training. Text keys and values are made once for all passes.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.input = Linear(config.channels, dim)
        self.time, self.iteration = ScalarEmbedding(dim), ScalarEmbedding(dim)
        self.text_norm, self.text_pooled = RMSNorm(config.text_width), Linear(config.text_width, dim)
        self.prelude = nn.ModuleList(ConvBlock(dim, config.ffn_ratio) for _ in range(config.prelude))
        self.injection = Injection(dim)
        self.core = nn.ModuleList(CoreLayer(config) for _ in range(config.core))
        self.coda = nn.ModuleList(CodaBlock(dim, config.heads, config.ffn_ratio) for _ in range(config.coda))
        self.final_modulation = Modulation(dim, 2)
        self.output = ZeroLinear(dim, config.channels)

    def forward(self, z: Tensor, t: Tensor, text: TextCondition, iterations: int | None = None) -> Tensor:
        """Velocity [B, C, h, w] after ``iterations`` passes through the core (None: as configured).

        Raises:
            SettingError: iterations < 1, or a latent or text of another width than the generator was made for.
        """
        iterations = self._check(z, text, iterations)
        condition = self.time(t) + self.text_pooled(rms_normalise(text.pooled))
        x = self.input(z.permute(0, 2, 3, 1))
        x = x + position_embedding(x.shape[1], x.shape[2], x.shape[3], x.device, x.dtype)
        for block in self.prelude:
            x = block(x, condition)
        x = self.loop(x, condition, text, iterations)
        for block in self.coda:
            x = block(x, condition)
        shift, scale = self.final_modulation(condition)
        return self.output(modulate(rms_normalise(x), shift, scale)).permute(0, 3, 1, 2)

    def loop(self, given: Tensor, condition: Tensor, text: TextCondition, iterations: int) -> Tensor:
        """The core passed ``iterations`` times over ``given`` [B, h, w, D], starting from it."""
        tokens = self.text_norm(text.tokens)
        prepared = [layer.cross.prepare(tokens) for layer in self.core]
        progress = torch.arange(1, iterations + 1, device=given.device) / iterations
        embedded = self.iteration(progress).to(given.dtype)
        state = given
        for k in range(iterations):
            state = self.injection(state, given)
            for layer, key_value in zip(self.core, prepared, strict=True):
                state = layer(state, condition + embedded[k], key_value, text.mask)
        return state

    def _check(self, z: Tensor, text: TextCondition, iterations: int | None) -> int:
        config = self.config
        iterations = config.iterations if iterations is None else iterations
        if iterations < 1:
            raise SettingError(f"iterations={iterations} must be at least 1")
        if z.dim() != 4 or z.shape[1] != config.channels:
            raise SettingError(f"latent must be [B, {config.channels}, h, w], got {tuple(z.shape)}")
        if text.tokens.shape[-1] != config.text_width:
            raise SettingError(f"text tokens must be {config.text_width} wide, got {text.tokens.shape[-1]}")
        return iterations


@contextmanager
def record_gates(generator: Generator, iterations: int) -> Iterator[list[dict[str, Any]]]:
    """Collects the mean weight of each GRFM pathway at every pass of the core.

    Yields a list filled, one entry a core layer, with {"layer": i, "iterations": [{"iteration": k, "fourier": …}, …]}
    averaged over all generator evaluations made inside the context; empty when the mixer has no gates.
    """
    layers: list[dict[str, Any]] = []
    seen: list[list[dict[str, float]]] = []
    gated = [layer.mixer for layer in generator.core if hasattr(layer.mixer, "observe")]
    for mixer in gated:
        seen.append([])
        mixer.observe = seen[-1].append
    try:
        yield layers
    finally:
        for mixer in gated:
            mixer.observe = None
    for index, values in enumerate(seen):
        passes = [values[k::iterations] for k in range(iterations)]
        rows = [
            {"iteration": k + 1} | {name: sum(v[name] for v in group) / len(group) for name in group[0]}
            for k, group in enumerate(passes)
            if group
        ]
        layers.append({"layer": index, "iterations": rows})
