"""The blocks that a generator is made of. Tokens are [B, h, w, D]; ``signal`` is what their modulation reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iris.nn.layers import (
    CrossAttention,
    FeedForward,
    LocalAttention,
    Modulation,
    ModulationTable,
    RMSNorm,
    modulate,
    rms_normalise,
)


def make_modulation(conditioning: str, dim: int, parts: int) -> nn.Module:
    """adaLN-Zero of its own (signal: the condition [B, D]) or a table (signal: the shared projection [B, 9 D])."""
    return ModulationTable(dim, parts) if conditioning == "single" else Modulation(dim, parts)


class ConvBlock(nn.Module):
    """Prelude block: depthwise 3x3, pointwise network, adaLN-Zero; [B, h, w, D] -> same."""

    def __init__(self, dim: int, ratio: float, conditioning: str = "layer") -> None:
        super().__init__()
        self.modulation = make_modulation(conditioning, dim, 3)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.feed_forward = FeedForward(dim, ratio)

    def forward(self, x: Tensor, signal: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(signal)
        y = modulate(rms_normalise(x), shift, scale)
        y = self.depthwise(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + gate[:, None, None] * self.feed_forward(y)


class CoreLayer(nn.Module):
    """Mixer, cross-attention to the text, feed-forward; each with its own adaLN-Zero shift, scale and gate.

    With ``norm`` sandwich the sum after each part is normalised with a learned scale (Huginn, arXiv 2502.05171).
    """

    def __init__(
        self,
        mixer: nn.Module,
        dim: int,
        text_width: int,
        heads: int,
        ratio: float,
        conditioning: str = "layer",
        norm: str = "pre",
    ) -> None:
        super().__init__()
        self.modulation = make_modulation(conditioning, dim, 9)
        self.mixer = mixer
        self.cross = CrossAttention(dim, text_width, heads)
        self.feed_forward = FeedForward(dim, ratio)
        self.after = nn.ModuleList(RMSNorm(dim) if norm == "sandwich" else nn.Identity() for _ in range(3))

    def forward(self, x: Tensor, signal: Tensor, text: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """``text``: keys and values from ``cross.prepare``; ``mask`` [B, L]."""
        parts = self.modulation(signal)
        for (shift, scale, gate), part, after in zip(
            (parts[0:3], parts[3:6], parts[6:9]),
            (self.mixer, lambda y: self.cross(y, text, mask), self.feed_forward),
            self.after,
            strict=True,
        ):
            x = after(x + gate[:, None, None] * part(modulate(rms_normalise(x), shift, scale)))
        return x


class CodaBlock(nn.Module):
    """Local attention and feed-forward with adaLN-Zero."""

    def __init__(self, dim: int, heads: int, ratio: float, conditioning: str = "layer") -> None:
        super().__init__()
        self.modulation = make_modulation(conditioning, dim, 6)
        self.attention = LocalAttention(dim, heads)
        self.feed_forward = FeedForward(dim, ratio)

    def forward(self, x: Tensor, signal: Tensor) -> Tensor:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.modulation(signal)
        x = x + gate[:, None, None] * self.attention(modulate(rms_normalise(x), shift, scale))
        return x + gate_ff[:, None, None] * self.feed_forward(modulate(rms_normalise(x), shift_ff, scale_ff))


class Injection(nn.Module):
    """Linear 2D -> D on (state, input) at every pass, so that the input is never forgotten (Huginn, arXiv 2502.05171).

    It starts as the mean of the two: with all gates at zero the loop then leaves its input as it is.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 2 * dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # In place: torch.eye on the meta device, where plans build models, loads torch.compile.
        with torch.no_grad():
            self.weight.zero_()
            for half in self.weight.chunk(2, dim=1):
                half.fill_diagonal_(0.5)

    def forward(self, state: Tensor, given: Tensor) -> Tensor:
        return F.linear(torch.cat([state, given], -1), self.weight)


class MeanInjection(nn.Module):
    """(state + input) / 2: the adapter's start, kept. A plain sum would double a constant state at every pass."""

    def forward(self, state: Tensor, given: Tensor) -> Tensor:
        return (state + given) / 2


class NoInjection(nn.Module):
    """The state alone: the loop sees its input once, as its start."""

    def forward(self, state: Tensor, given: Tensor) -> Tensor:
        return state


INJECTIONS = {"concat": Injection, "add": lambda dim: MeanInjection(), "none": lambda dim: NoInjection()}
