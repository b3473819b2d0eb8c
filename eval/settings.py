"""The settings of measuring: what is measured and by which judge, and those of ``python -m eval``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eval.export import RUNTIMES
from eval.judges import JUDGES
from eval.metrics.quality import METRICS
from eval.speed.caps import METHODS
from eval.subjects import KINDS
from iris.data.settings import DATA_OPTIONS, Data
from iris.diffusion.sampling import Sample
from iris.errors import SettingError, require_choice, require_folder_name
from iris.settings import Tree, setting
from iris.stages.settings import RECIPE_GROUPS

IMAGES = ("quality", "alignment", "skills", "duplicates")  # measured on images
RUNS = ("latency", "memory", "caps")  # measured on a model that runs
WHAT = (*IMAGES, *RUNS)
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class JudgeChoice:
    """Settings judge.*: the network that FID features and CLIP scores come from; see ``eval.judges.load_judge``."""

    name: str = setting("shapes", "the kind", choices=tuple(JUDGES))
    weights: str | None = setting(
        None, "a file, a folder, or a tag of open_clip; null: the published file from a cache", result=False
    )
    model: str | None = setting(None, "of clip: a name of open_clip; of dinov2: a size")
    prefix: str | None = setting(None, "of clip: put before every caption, such as 'A photo depicts '")


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Settings measure.quality.*; see ``eval.metrics.quality.measure_quality``."""

    metrics: list = setting(list(METRICS), f"of {', '.join(METRICS)}")
    blocks: int = setting(20, "of the jackknives", low=2)
    neighbours: int = setting(3, "k of precision and recall", low=1)
    density_neighbours: int = setting(5, "k of density and coverage", low=1)


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Settings measure.duplicates.*; see ``eval.metrics.duplicates.find_duplicates``."""

    samples: int = setting(
        1024, "images of a drawn world's training captions; else those of samples are searched", low=2
    )
    training: int | None = setting(None, "training images; null: all", low=2)
    heldout: int = setting(4096, "real images that were not trained on, which say how close is too close", low=2)
    quantile: float | None = setting(
        None, "share of these that counts as too close; null: 0.001", low=0, high=0.5, above=True
    )
    pairs: int = setting(24, "that the page shows", low=1, high=500)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Settings measure.latency.*; see ``eval.speed.latency``."""

    batches: list = setting([1, 4], "images at once", result=False)
    rounds: int = setting(30, "0: a grid measures neither speed nor memory", low=0, result=False)
    warmup: int = setting(3, "rounds before; 10 on CUDA", low=0, result=False)

    def __post_init__(self) -> None:
        if self.rounds == 1:
            raise SettingError("measure.latency.rounds=1 has no spread; allowed: 2 or more, or 0 to measure no speed")
        _check_numbers("measure.latency.batches", self.batches, int)


@dataclass(frozen=True, kw_only=True)
class Caps:
    """Settings measure.caps.*; see ``eval.speed.caps.caps_held``."""

    megabytes: list = setting([600, 1000, 2000, 3000, 4000], "budgets", result=False)
    method: str = setting("RLIMIT_DATA", "what counts", choices=METHODS, result=False)
    group: str | None = setting(None, "of method cgroup: a memory group's folder", result=False)

    def __post_init__(self) -> None:
        _check_numbers("measure.caps.megabytes", self.megabytes, int | float)
        if (self.group is not None) != (self.method == "cgroup"):
            raise SettingError(
                f"measure.caps.group={self.group}: a group and measure.caps.method=cgroup go together; "
                f"the method is {self.method}"
            )


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Settings measure.*: what is measured, and on how much."""

    what: list | None = setting(None, f"of {', '.join(WHAT)}; null: of the first four, those possible")
    split: str = setting("validation", "of captions and real images; drawn worlds: train, validation, heldout, all")
    samples: int | None = setting(None, "images; null: 2048, or all that are stored", low=1)
    heldout: int = setting(
        512, "images of a drawn world's colour-shape pairs that training never saw, for skills", low=0
    )
    reference: int | None = setting(None, "real images; null: data.validation drawn ones, or all rows", low=2)
    confidence: float = setting(0.95, "of every interval", low=0.5, high=0.9999)
    quality: Quality
    duplicates: Duplicates
    latency: Latency
    caps: Caps
    threads: int = setting(1, "of the processes that measure latency, memory and caps", low=1, result=False)
    timeout: float = setting(600.0, "seconds for one image there", low=0, above=True, result=False)

    def __post_init__(self) -> None:
        _check_names("measure.what", self.what, WHAT)
        _check_names("measure.quality.metrics", self.quality.metrics, METRICS)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of ``python -m eval``."""

    model: str | None = setting(
        None, "a saved model's folder, a key in runs_dir, images, a diffusers pipeline, a hub name"
    )
    kind: str | None = setting(None, "of the model; null: seen from the files")
    name: str | None = setting(None, "what the results call it; null: the folder's name", result=False)
    out: str | None = setting(None, "folder of the results; null: eval_results/<name>-<judge>-<key>", result=False)
    track: str | None = setting(
        None, "MLflow's tracking URI; null: MLFLOW_TRACKING_URI, or mlflow.db; none: no run", result=False
    )
    runs_dir: str = setting("runs", "images made, features of real ones; used again by the next command", result=False)
    seed: int = setting(0, "image i starts from noise addressed by (seed, i)", low=0)
    threads: int | None = setting(None, "processor threads; null: all cores", low=1, result=False)
    device: str = setting("cpu", "of model and judge", choices=("cpu", "auto", "cuda", "mps"), result=False)
    dtype: str = setting("float32", "of the model", choices=DTYPES)
    data: Data
    judge: JudgeChoice
    measure: Measure
    sample: Sample

    def __post_init__(self) -> None:
        if self.kind is not None:
            require_choice("kind", self.kind, tuple(KINDS))
        if self.name is not None:
            require_folder_name("name", self.name)


MEASURES: dict[str, dict[str, Any]] = {
    # On a processor: what is possible of quality, alignment, skills and duplicates.
    "standard": {},
    "full": {"what": list(WHAT)},
    "speed": {"what": list(RUNS)},
    # Seconds: does everything run? Its numbers mean nothing.
    "smoke": {
        "samples": 32,
        "heldout": 16,
        "reference": 128,
        "quality": {"metrics": ["fid", "kid", "precision", "recall", "density", "coverage"]},
        "duplicates": {"samples": 16, "training": 128, "heldout": 64, "pairs": 6},
        "latency": {"batches": [1], "rounds": 2, "warmup": 0},
        "caps": {"megabytes": [4000]},
    },
}
# What a scale says of measuring; the training's part is iris.stages.settings.SCALES.
SCALES: dict[str, dict[str, Any]] = {
    "smoke": {"measure": {"samples": 96, "heldout": 32, "latency": {"rounds": 3, "warmup": 1}}},
    "gpu": {"measure": {"samples": 10000}},
}
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "judge": {name: {"name": name} for name in JUDGES},
    "measure": MEASURES,
    "runtime": {name: {"name": name, "precision": precisions[0]} for name, precisions in RUNTIMES.items()},
}
TREE = Tree(
    Settings,
    {"data": DATA_OPTIONS, "judge": GROUPS["judge"], "measure": MEASURES, "sample": RECIPE_GROUPS["sample"]},
    example="model=iris/weights/shapes or measure.samples=5000",
)


def _check_names(name: str, given: list | None, allowed: tuple[str, ...]) -> None:
    if given is None:
        return
    if not given:
        raise SettingError(f"{name} is empty; allowed: {', '.join(allowed)}")
    for one in given:
        require_choice(name, one, allowed)


def _check_numbers(name: str, values: list, kinds: Any) -> None:
    if not values or not all(isinstance(v, kinds) and not isinstance(v, bool) and v > 0 for v in values):
        raise SettingError(f"{name}={values} must be a list of numbers above 0, such as [1, 4]")
