"""The Gated Recurrent Fourier Mixer: Fourier, recurrent and spatial pathways, normalised and fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iris.errors import SettingError
from iris.nn.layers import Linear, RMSNorm
from iris.nn.mixers.fourier import FourierOptions, FourierPathway
from iris.nn.mixers.recurrence import RecurrenceOptions, RecurrencePathway
from iris.nn.mixers.spatial import SpatialOptions, SpatialPathway
from iris.settings import check, setting

PATHWAYS: dict[str, type[nn.Module]] = {
    "fourier": FourierPathway,
    "recurrence": RecurrencePathway,
    "spatial": SpatialPathway,
}

GATES = ("learned", "channel", "half", "sum", "concat")


@dataclass(frozen=True)
class FusionOptions:
    """Settings fusion.*: what weighs the pathways, and whether they are normalised first.

    gate: ``learned``, ``channel`` and ``half`` are g * fourier + (1 - g) * recurrence + alpha * spatial, alpha per
        channel, with g = sigmoid(linear(x)), g = sigmoid(a parameter per channel) and g = 1/2. ``sum`` adds the
        pathways with weight one and has no parameter; ``concat`` is one linear layer over all of them.
    normalise: False lets the pathways in at their own scales, which differ tenfold.
    """

    gate: str = setting("learned", "what weighs the pathways", choices=GATES)
    normalise: bool = setting(True, "pathways are normalised before they are fused")

    def __post_init__(self) -> None:
        check(self, "fusion")


class GRFM(nn.Module):
    """out(g * fourier + (1 - g) * recurrence + alpha * spatial), or another fusion; [B, h, w, D] -> same.

    By default g = sigmoid(linear(x)) per token and channel, alpha per channel. Each pathway is RMS-normalised before
    the fusion: their raw scales differ tenfold, and an unnormalised gate would start decided. With a subset of
    pathways, a pathway that misses its partner enters with weight one (``grfm[fourier,spatial]`` = fourier + alpha *
    spatial), and one alone is not fused.

    ``observe``, when set, is called with {"fourier", "recurrence", "spatial": mean weight, "std": spread of the gate
    over tokens and channels} at each pass; ``record_gates`` sets it. The weight of a pathway under ``concat`` is its
    share of the absolute weights of an output channel.
    """

    reach = None
    resizable = True

    def __init__(
        self,
        dim: int,
        width: int | None = None,
        heads: int = 4,
        pathways: Sequence[str] = tuple(PATHWAYS),
        fourier: FourierOptions = FourierOptions(),
        recurrence: RecurrenceOptions = RecurrenceOptions(),
        spatial: SpatialOptions = SpatialOptions(),
        fusion: FusionOptions = FusionOptions(),
    ) -> None:
        super().__init__()
        pathways = check_pathways(pathways)
        width = dim if width is None else width
        options = {"fourier": fourier, "recurrence": recurrence, "spatial": spatial}
        self.pathways = nn.ModuleDict({name: PATHWAYS[name](dim, width, heads, options[name]) for name in pathways})
        self.norms = nn.ModuleDict({name: RMSNorm(width) for name in pathways if fusion.normalise})
        paired, fused = {"fourier", "recurrence"} <= set(pathways), len(pathways) > 1
        self.half = fusion.gate == "half" and paired
        self.gate = None
        if fusion.gate == "learned" and paired:
            self.gate = Linear(dim, width)
        elif fusion.gate == "channel" and paired:
            self.gate = nn.Parameter(torch.empty(width))
        weighted = fusion.gate in ("learned", "channel", "half")
        self.alpha = nn.Parameter(torch.empty(width)) if weighted and fused and "spatial" in pathways else None
        self.concat = Concatenation(pathways, width) if fusion.gate == "concat" and fused else None
        self.out = Linear(width, dim)
        self.observe: Callable[[dict[str, float]], None] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.alpha is not None:
            nn.init.ones_(self.alpha)
        if isinstance(self.gate, nn.Parameter):
            nn.init.zeros_(self.gate)

    def forward(self, x: Tensor) -> Tensor:
        branch = {name: pathway(x) for name, pathway in self.pathways.items()}
        branch |= {name: norm(branch[name]) for name, norm in self.norms.items()}
        gate = self._gate(x)
        if self.observe is not None:
            self.observe(self._weights(gate))
        return self.out(self._fuse(branch, gate))

    def _gate(self, x: Tensor) -> Tensor | None:
        """Weight of the Fourier pathway against the recurrence; None where the two are not gated."""
        if self.half:
            return x.new_full((), 0.5)
        if self.gate is None:
            return None
        return torch.sigmoid(self.gate if isinstance(self.gate, nn.Parameter) else self.gate(x))

    def _fuse(self, branch: dict[str, Tensor], gate: Tensor | None) -> Tensor:
        if self.concat is not None:
            return self.concat(torch.cat(list(branch.values()), -1))
        if gate is not None:
            y = torch.lerp(branch["recurrence"], branch["fourier"], gate.to(branch["fourier"].dtype))
        else:
            y = sum(value for name, value in branch.items() if name != "spatial" or self.alpha is None)
        return y if self.alpha is None else y + self.alpha * branch["spatial"]

    @torch.no_grad()
    def _weights(self, gate: Tensor | None) -> dict[str, float]:
        if self.concat is not None:
            return self.concat.shares()
        weights = dict.fromkeys(self.pathways, 1.0) | {"std": 0.0}
        if gate is not None:
            mean = gate.float().mean().item()
            weights |= {"fourier": mean, "recurrence": 1 - mean}
            if gate.numel() > 1:
                weights["std"] = gate.float().std().item()
        if self.alpha is not None:
            weights["spatial"] = self.alpha.float().abs().mean().item()
        return weights


class Concatenation(nn.Linear):
    """Linear k * width -> width over k concatenated pathways.

    It starts as the fusion with g = 1/2 and alpha = 1, a multiple of the identity for each pathway, so that its output
    and thus its variance are that fusion's. No bias: the linear layer behind it has one.
    """

    def __init__(self, pathways: Sequence[str], width: int) -> None:
        paired = {"fourier", "recurrence"} <= set(pathways)
        self.start = {name: 0.5 if paired and name != "spatial" else 1.0 for name in pathways}
        super().__init__(len(pathways) * width, width, bias=False)

    def reset_parameters(self) -> None:
        identity = torch.eye(self.out_features)
        with torch.no_grad():
            self.weight.copy_(torch.cat([weight * identity for weight in self.start.values()], 1))

    @torch.no_grad()
    def shares(self) -> dict[str, float]:
        """Each pathway's mean share of the absolute weights of an output channel; "std", its spread over channels."""
        size = self.weight.float().abs().unflatten(1, (len(self.start), -1)).sum(-1)  # width, pathways
        share = size / size.sum(1, keepdim=True)
        return dict(zip(self.start, share.mean(0).tolist(), strict=True)) | {"std": share.std(0).mean().item()}


def check_pathways(names: Sequence[str]) -> tuple[str, ...]:
    """``names`` in the order of ``PATHWAYS``.

    Raises:
        SettingError: no name, a name twice, or one that is no pathway.
    """
    if not names or len(set(names)) != len(names) or any(name not in PATHWAYS for name in names):
        raise SettingError(
            f"model.mixer='grfm[{','.join(names)}]': list different pathways out of {', '.join(PATHWAYS)}"
        )
    return tuple(name for name in PATHWAYS if name in names)
