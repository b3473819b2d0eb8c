"""Settings that the stages' command and the ablations' grids share: the model, and how a flow is trained."""

from __future__ import annotations

from dataclasses import dataclass

from iris.settings import number, one_of


@dataclass(frozen=True, kw_only=True)
class Model:
    """The generator and the text encoder trained with it (conf/model)."""

    mixer: str
    mixer_width: int | None = number(1)
    dim: int = number(4)
    heads: int = number(1)
    prelude: int = number(1)
    core: int = number(1)
    coda: int = number(1)
    iterations: int = number(1)
    ffn_ratio: float = number(0, above=True)
    text: str = one_of("words", "labels", "clip")
    text_source: str | None
    text_width: int = number(4)
    text_length: int = number(2)
    text_layers: int = number(0)


@dataclass(frozen=True, kw_only=True)
class FlowTraining:
    """How a flow is trained; what watches and keeps the run is added by each command."""

    steps: int = number(1)
    batch: int = number(1)
    optimiser: str = one_of("muon", "adamw")
    learning_rate: float = number(0, above=True)
    weight_decay: float = number(0)
    warmup: float = number(0, 1)
    decay: float = number(0, 1)
    clip: float = number(0, above=True)
    ema: float = number(0, 1)
    caption_dropout: float = number(0, 1)
    time: str = one_of("logit_normal", "uniform", "mode")
    time_mean: float
    time_std: float = number(0, above=True)
    time_scale: float
    time_shift: float = number(0, above=True)
    loss_weight: str = one_of("none", "odds", "min_snr")
    min_snr_gamma: float = number(0, above=True)
