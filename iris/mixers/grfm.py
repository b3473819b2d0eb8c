"""The Gated Recurrent Fourier Mixer: Fourier, recurrent and spatial pathways, fused by learned gates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from iris.layers import Linear, RMSNorm


class GRFM(nn.Module):
    """out(g * fourier + (1 - g) * recurrence + alpha * spatial), [B, h, w, D] -> same.

    g = sigmoid(linear(x)) per token and channel, alpha per channel. Each pathway is RMS-normalised before the fusion:
    their raw scales differ tenfold, and an unnormalised gate would start decided. With a subset of pathways, a
    pathway that misses its partner enters with weight one (``grfm[fourier,spatial]`` = fourier + alpha * spatial).

    ``observe``, when set, is called with {"fourier", "recurrence", "spatial": mean weight, "std": spread of the gate over
    tokens and channels} at each pass; ``record_gates`` sets it.
    """

    def __init__(
        self, dim: int, width: int | None = None, heads: int = 4, pathways: dict[str, type[nn.Module]] | None = None
    ) -> None:
        super().__init__()
        if not pathways:
            raise ValueError("GRFM needs at least one pathway; build_mixer supplies them")
        width = dim if width is None else width
        self.pathways = nn.ModuleDict({name: kind(dim, width, heads) for name, kind in pathways.items()})
        self.norms = nn.ModuleDict({name: RMSNorm(width) for name in pathways})
        self.gate = Linear(dim, width) if {"fourier", "recurrence"} <= set(pathways) else None
        self.alpha = nn.Parameter(torch.empty(width)) if "spatial" in pathways and len(pathways) > 1 else None
        self.out = Linear(width, dim)
        self.observe: Callable[[dict[str, float]], None] | None = None

    def reset_parameters(self) -> None:
        nn.init.ones_(self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        branch = {name: self.norms[name](pathway(x)) for name, pathway in self.pathways.items()}
        gate = torch.sigmoid(self.gate(x)) if self.gate is not None else None
        if gate is not None:
            y = torch.lerp(branch["recurrence"], branch["fourier"], gate.to(branch["fourier"].dtype))
        else:
            y = sum(value for name, value in branch.items() if name != "spatial" or self.alpha is None)
        if self.alpha is not None:
            y = y + self.alpha * branch["spatial"]
        if self.observe is not None:
            self.observe(self._weights(gate))
        return self.out(y)

    @torch.no_grad()
    def _weights(self, gate: Tensor | None) -> dict[str, float]:
        weights = {name: 1.0 for name in self.pathways}
        if gate is not None:
            mean = gate.float().mean().item()
            weights |= {"fourier": mean, "recurrence": 1 - mean, "std": gate.float().std().item()}
        if self.alpha is not None:
            weights["spatial"] = self.alpha.float().abs().mean().item()
        return weights
