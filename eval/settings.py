"""The settings of ``python -m eval``: typed and checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.judges import JUDGES
from eval.metrics.quality import METRICS
from eval.speed.caps import METHODS
from eval.subjects import KINDS, SampleSettings
from iris.data.settings import KINDS as SOURCES
from iris.data.settings import READY
from iris.errors import SettingError, require_choice
from iris.settings import Composer, build, number, one_of, plain_values

IMAGES = ("quality", "alignment", "skills", "duplicates")  # measured on images
RUNS = ("latency", "memory", "caps")  # measured on a model that runs
WHAT = (*IMAGES, *RUNS)
LISTS = ((None, "what"), ("quality", "metrics"), ("latency", "batches"), ("caps", "megabytes"))  # of measure.*
CONF = Path(__file__).parent / "conf"
GROUPS = ("data", "judge", "measure")
COMPOSER = Composer("eval.conf", CONF, GROUPS, "model=iris/weights/shapes or measure.samples=5000")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Captions and real images (conf/data); None leaves a choice to the source."""

    name: str = one_of(*SOURCES, *READY)
    path: str | None
    split: str
    size: int | None = number(8)
    config: str | None
    revision: str | None
    streaming: bool | None
    image_column: str | None
    text_column: str | None
    labels: list | None
    train: int | None = number(0)
    validation: int | float | None = number(0)
    seed: int | None
    max_bad: float | None = number(0, 0.99)


@dataclass(frozen=True, kw_only=True)
class JudgeChoice:
    """The judge (conf/judge); see ``eval.judges.load_judge``."""

    name: str = one_of(*JUDGES)
    weights: str | None
    model: str | None
    prefix: str | None


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of ``eval.metrics.quality.measure_quality``."""

    metrics: list
    blocks: int = number(2)
    neighbours: int = number(1)
    density_neighbours: int = number(1)


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Of ``eval.metrics.duplicates.find_duplicates`` and its page."""

    samples: int = number(2)
    training: int | None = number(2)
    heldout: int = number(2)
    quantile: float | None = number(0, 0.5, above=True)
    pairs: int = number(1, 500)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Of ``eval.speed.parts.measure_parts``."""

    batches: list
    rounds: int = number(2)
    warmup: int = number(0)


@dataclass(frozen=True, kw_only=True)
class Caps:
    """Of ``eval.speed.caps.caps_held``."""

    megabytes: list
    method: str = one_of(*METHODS)
    group: str | None

    def __post_init__(self) -> None:
        if (self.group is not None) != (self.method == "cgroup"):
            raise SettingError(
                f"measure.caps.group={self.group}: a group and measure.caps.method=cgroup go together; "
                f"the method is {self.method}"
            )


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What is measured, and on how much (conf/measure)."""

    what: list | None
    samples: int | None = number(1)
    heldout: int = number(0)
    reference: int | None = number(2)
    confidence: float = number(0.5, 0.9999)
    quality: Quality
    duplicates: Duplicates
    threads: int = number(1)
    timeout: float = number(0, above=True)
    latency: Latency
    caps: Caps

    def __post_init__(self) -> None:
        _check_names("measure.what", self.what, WHAT)
        _check_names("measure.quality.metrics", self.quality.metrics, METRICS)
        for name, values, kinds in (
            ("measure.latency.batches", self.latency.batches, int),
            ("measure.caps.megabytes", self.caps.megabytes, int | float),
        ):
            if not values or not all(isinstance(v, kinds) and not isinstance(v, bool) and v > 0 for v in values):
                raise SettingError(f"{name}={values} must be a list of numbers above 0, such as [1, 4]")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The whole configuration."""

    model: str
    kind: str | None
    name: str | None
    data: Data
    judge: JudgeChoice
    measure: Measure
    sample: SampleSettings
    out: str | None
    track: str | None
    runs_dir: str
    seed: int = number(0)
    threads: int | None = number(1)
    device: str = one_of("cpu", "auto", "cuda", "mps")
    dtype: str = one_of("float32", "float16", "bfloat16")

    def __post_init__(self) -> None:
        if self.kind is not None:
            require_choice("kind", self.kind, tuple(KINDS))


def compose(words: Sequence[str]) -> Any:
    """The composed configuration of a command line; ``measure.what=quality,skills`` is a list, as it looks.

    Raises:
        SettingError: a group, option, key or value that does not exist or cannot be read.
    """
    from iris.stages.settings import listed

    return COMPOSER.composed([listed(word) for word in words])


def settings_of(words: Sequence[str]) -> Settings:
    """Checked settings of a command line.

    Raises:
        SettingError: as ``compose`` and ``iris.settings.build``; no model.
    """
    values = plain_values(compose(words))
    if values["model"] is None:
        raise SettingError(
            "model is missing: a saved model, a folder of images or a diffusers pipeline, such as "
            "model=iris/weights/shapes"
        )
    for group, name in LISTS:
        place = values["measure"] if group is None else values["measure"][group]
        if place[name] is not None and not isinstance(place[name], list):
            place[name] = [place[name]]  # measure.what=quality: one of a list
    return build(Settings, values)


def _check_names(setting: str, given: list | None, allowed: tuple[str, ...]) -> None:
    if given is None:
        return
    if not given:
        raise SettingError(f"{setting} is empty; allowed: {', '.join(allowed)}")
    for name in given:
        require_choice(setting, name, allowed)
