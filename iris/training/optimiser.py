"""Optimisers and schedules by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from iris.errors import SettingError


@dataclass(frozen=True)
class OptimiserSettings:
    """How weights are updated. ``warmup`` and ``decay`` are shares of all steps: linear rise at the start, linear fall to zero at the end."""

    name: str = "muon"  # muon | adamw
    learning_rate: float = 2e-3  # of AdamW, and of Muon in AdamW's units (its updates are scaled to AdamW's RMS)
    weight_decay: float = 0.01
    warmup: float = 0.05
    decay: float = 0.5
    clip: float = 1.0  # largest gradient norm


OPTIMISERS = ("muon", "adamw")


class Optimisers:
    """Muon (arXiv 2502.16982) for matrices and AdamW for the rest, or AdamW for everything, behind one interface.

    Muon takes two-dimensional weights of nn.Linear only; embeddings, biases, norms, convolutions, block-diagonal weights
    and the loop's adapter, which starts as a mean, go to AdamW. Weight decay spares vectors and scalars.
    """

    def __init__(self, module: nn.Module, settings: OptimiserSettings) -> None:
        if settings.name not in OPTIMISERS:
            raise SettingError(f"train.optimiser={settings.name!r} is unknown; allowed: {', '.join(OPTIMISERS)}")
        self.settings = settings
        matrices, others = _split(module, settings.name == "muon")
        decay = {"weight_decay": settings.weight_decay}
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(
                torch.optim.Muon(matrices, lr=settings.learning_rate, adjust_lr_fn="match_rms_adamw", **decay)
            )
        groups = [
            {"params": [p for p in others if p.dim() > 1], **decay},
            {"params": [p for p in others if p.dim() <= 1]},
        ]
        groups = [group for group in groups if group["params"]]
        if groups:
            self.parts.append(torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0))

    def step(self, learning_rate: float) -> None:
        """Update all weights with this learning rate and clear the gradients."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything the next step depends on, as flat named tensors."""
        return {
            f"{number}.{index}.{name}": torch.as_tensor(value)
            for number, part in enumerate(self.parts)
            for index, state in part.state_dict()["state"].items()
            for name, value in state.items()
        }

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what ``tensors`` returned."""
        for number, part in enumerate(self.parts):
            state = part.state_dict()
            state["state"] = {}
            for key, value in tensors.items():
                owner, index, name = key.split(".")
                if int(owner) == number:
                    state["state"].setdefault(int(index), {})[name] = value
            part.load_state_dict(state)


def learning_rate_at(step: int, steps: int, settings: OptimiserSettings) -> float:
    """Learning rate of step ``step`` (from 0) of ``steps``: linear warm-up, constant, linear decay to zero."""
    warm = max(1, round(settings.warmup * steps))
    cool = max(1, round(settings.decay * steps))
    return settings.learning_rate * min(1.0, (step + 1) / warm, (steps - step) / cool)


def _split(module: nn.Module, muon: bool) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    matrices = {id(part.weight) for part in module.modules() if muon and isinstance(part, nn.Linear)}
    everything: Iterable[nn.Parameter] = [p for p in module.parameters() if p.requires_grad]
    return [p for p in everything if id(p) in matrices], [p for p in everything if id(p) not in matrices]
