"""Every setting, typed: composed values in, checked dataclasses out, or an error that names the key and what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Union

from iris.depth import Depth
from iris.errors import SettingError
from iris.mixers import OPTION_GROUPS, AttentionOptions, FourierOptions, FusionOptions, RecurrenceOptions, SpatialOptions


def number(low: float, high: float | None = None, above: bool = False) -> Any:
    """A numeric field with bounds; ``above`` makes the lower one exclusive."""
    return field(metadata={"low": low, "high": high, "above": above})


def one_of(*choices: str) -> Any:
    """A string field with a fixed set of values."""
    return field(metadata={"choices": choices})


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The question (conf/grid): what is varied, against what, and what difference matters."""

    name: str
    question: str
    claim: str
    baseline: dict
    axes: dict
    match: str = one_of("params", "flops", "none")
    decide: dict


@dataclass(frozen=True, kw_only=True)
class Data:
    """Captioned images (conf/data). Counts of null mean all there are."""

    name: str = one_of("shapes", "shapes2", "parquet", "folder")
    path: str | None
    size: int = number(8)
    image_column: str
    text_column: str
    labels: list | None
    train: int | None = number(1)
    validation: int | float | None = number(0, above=True)     # a share, or a count
    heldout: int | None = number(0)
    seed: int
    max_bad: float = number(0, 0.99)


@dataclass(frozen=True, kw_only=True)
class Latent:
    """The latent space (conf/latent); a latent ignores what it has no use for."""

    name: str = one_of("pixel", "haar", "wavelet_vae", "conv_vae", "pretrained")
    patch: int = number(1)
    levels: int = number(1, 6)
    stages: int = number(0, 6)
    channels: int = number(1)
    width: int = number(8)
    blocks: int = number(1)
    front: str = one_of("conv", "unshuffle")
    decoder: str = one_of("standard", "phone")
    source: str | None
    subfolder: str | None
    steps: int = number(1)
    batch: int = number(1)
    learning_rate: float = number(0, above=True)
    kl_weight: float = number(0)
    detail_weight: float = number(0)
    seed: int


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
class Train:
    """How the flow is trained (conf/train)."""

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
    checkpoint_seconds: float = number(0)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """How images are made (conf/sample). guidance 1 means none."""

    sampler: str = one_of("euler", "heun", "midpoint", "stochastic")
    steps: int = number(1)
    guidance: float = number(0)
    guidance_start: float = number(0, 1)
    guidance_end: float = number(0, 1)
    guidance_rescale: float = number(0, 1)
    shift: float = number(0, above=True)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The network that FID features and CLIP scores come from (conf/judge)."""

    name: str = one_of("shapes")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How much is measured (conf/measure)."""

    samples: int = number(4)
    heldout_samples: int = number(0)
    iterations: list
    latency_rounds: int = number(2)
    latency_warmup: int = number(0)


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Where trials run (conf/launcher); through submitit in every case."""

    name: str = one_of("local", "inline", "slurm")
    workers: int = number(1)
    timeout_min: int = number(1)
    partition: str | None
    account: str | None
    qos: str | None
    gpus_per_trial: int = number(0)
    memory_gb: float | None = number(0, above=True)
    setup: list


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The whole configuration."""

    grid: Grid
    data: Data
    latent: Latent
    model: Model
    depth: Depth
    fourier: FourierOptions
    recurrence: RecurrenceOptions
    spatial: SpatialOptions
    fusion: FusionOptions
    attention: AttentionOptions
    train: Train
    sample: Sample
    judge: Judge
    measure: Measure
    launcher: Launcher
    seeds: list
    threads: int | None = number(1)
    runs_dir: str
    reports_dir: str
    dry_run: bool


# The settings of `model` that describe its text encoder.
MODEL_TEXT = ("text", "text_source", "text_width", "text_length", "text_layers")

# What a trial's result depends on; the rest says where and how it runs.
TRIAL_GROUPS = ("data", "latent", "model", "depth", *OPTION_GROUPS, "train", "sample", "judge", "measure")


def build(kind: type, values: dict[str, Any], where: str = "") -> Any:
    """A dataclass of ``kind`` from nested plain values.

    Raises:
        SettingError: an unknown or missing key, a value of the wrong type or out of range; names key and what is allowed.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in fields:
            raise SettingError(f"{where}{key} is not a setting{suggestion(str(key), fields)}; allowed: {', '.join(fields)}")
    missing = [name for name in fields if name not in values]
    if missing:
        raise SettingError(f"{where}{missing[0]} is missing")
    made = {
        name: _value(f"{where}{name}", hints[name], values[name], fields[name].metadata) for name in fields
    }
    return kind(**made)


def suggestion(key: str, known: typing.Iterable[str]) -> str:
    """" (did you mean …?)" when a known word is close, else nothing."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _value(name: str, hint: Any, value: Any, bounds: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise SettingError(f"{name}={value!r} must be a group of settings")
        return build(hint, value, f"{name}.")
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is Union else (hint,)
    if value is None and type(None) in options:
        return None
    if float in options and isinstance(value, int) and not isinstance(value, bool) and int not in options:
        value = float(value)
    if not isinstance(value, options) or (isinstance(value, bool) and bool not in options):
        wanted = " or ".join("null" if o is type(None) else o.__name__ for o in options)
        raise SettingError(f"{name}={value!r} must be {wanted}")
    if "choices" in bounds and value not in bounds["choices"]:
        raise SettingError(
            f"{name}={value!r} is unknown{suggestion(str(value), bounds['choices'])}; allowed: {', '.join(bounds['choices'])}"
        )
    if "low" in bounds:
        _check_bounds(name, value, bounds)
    return value


def _check_bounds(name: str, value: float, bounds: Any) -> None:
    low, high = bounds["low"], bounds["high"]
    if not math.isfinite(value):
        raise SettingError(f"{name}={value} must be a finite number")
    if value < low or (bounds["above"] and value == low):
        raise SettingError(f"{name}={value} must be {'above' if bounds['above'] else 'at least'} {low}")
    if high is not None and value > high:
        raise SettingError(f"{name}={value} must be at most {high}")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
