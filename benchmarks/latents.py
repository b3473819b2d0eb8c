"""The wavelet VAE against convolutional ones, at equal parameters and steps: ``python -m benchmarks.latents``.

    python -m benchmarks.latents data=shapes,cifar10 cifar10=../shared/data/cifar10 classifier=classifier.safetensors

Each latent is trained by ``python -m iris.training stage=vae`` with each seed, and reconstructs the same held-out
pictures. Writes Markdown to reports/latents.md, and a figure beside it. Words of its own, with their defaults:

    data=shapes             data sets; cifar10=FOLDER says where the parquet files of CIFAR-10 lie
    channels=16,8  seeds=0,1,2
    pictures=4096           held-out pictures that are reconstructed, where there are so many
    judges=shapes           of eval.judges, for Fréchet distances; inception where its weights are
    classifier=null         file of benchmarks.cifar_classifier: distances on CIFAR-10 by its features as well
    longer=null             train.steps of one more comparison, at the first of channels: does a gap last?
    report=reports/latents.md

Any other word is a setting of the stage, such as train.steps=2000. ``latent.width`` is the least width: the report's is
the first from there on at which the latents' parameters agree within 1 %. What is measured is kept below runs_dir, and
not measured again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cifar_classifier import load_classifier
from eval.judges import load_judge
from eval.metrics.fid import frechet_distance
from iris.errors import SettingError
from iris.io.files import write_json
from iris.io.pixels import to_images, to_pixels
from iris.latents.losses import band_psnr, psnr
from iris.stages.base import RESULT
from iris.stages.data import described, held_out, opened, size_of
from iris.stages.parts import latent_of
from iris.stages.settings import Settings, settings_of
from iris.stages.vae import load_latent
from iris.training.__main__ import run

# Arm -> its settings of latent.*.
ARMS = {
    "wavelet": {"name": "wavelet_vae"},
    "conv": {"name": "conv_vae", "front": "conv"},
    "unshuffle": {"name": "conv_vae", "front": "unshuffle"},
}
TOLERANCE = 0.01  # between the parameters of the arms
WIDEST, GROUPS = 1024, 8
BATCH = 256
RESULTS = "latents.json"

# float images [B, 3, H, W] in [-1, 1] -> features [B, D]
Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Plan:
    """What is compared; see the module. ``words`` are those of the stage.

    Raises:
        SettingError: a word that cannot be read.
    """

    data: tuple[str, ...] = ("shapes",)
    cifar10: str | None = None
    channels: tuple[int, ...] = (16, 8)
    seeds: tuple[int, ...] = (0, 1, 2)
    pictures: int = 4096
    judges: tuple[str, ...] = ("shapes",)
    classifier: str | None = None
    longer: int | None = None
    report: str = "reports/latents.md"
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in {"channels": 1, "seeds": 0, "pictures": 2, "longer": 1}.items():
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else [values]:
                if (type(value) is not int and value is not None) or (value is not None and value < least):
                    raise SettingError(f"{name}={value} must be a whole number of at least {least}")
        if "cifar10" in self.data and self.cifar10 is None:
            raise SettingError("cifar10=FOLDER is needed with data=cifar10: the folder of its parquet files")

    @classmethod
    def of(cls, words: Sequence[str]) -> Plan:
        """The plan of a command line."""
        own = {field.name: field for field in fields(cls) if field.name != "words"}
        given: dict[str, Any] = {}
        rest = []
        for word in words:
            key, _, value = word.partition("=")
            if key in own:
                given[key] = _read(value, own[key].default)
            else:
                rest.append(word)
        return cls(**given, words=tuple(rest))

    def stages(self, data: str) -> list[list[str]]:
        """For each comparison on a data set the stage's words that all arms and seeds share."""
        words = ["stage=vae", "log=none", f"data={data}", *self.words]
        words += [f"data.path={self.cifar10}"] if data == "cifar10" else []
        words += [f"data.validation={self.pictures}"] if data == "shapes" else []
        made = [[*words, f"latent.channels={channels}"] for channels in self.channels]
        if self.longer is not None:
            kept = [word for word in made[0] if not word.startswith("train.steps=")]
            made.append([*kept, f"train.steps={self.longer}"])
        return made


@dataclass(frozen=True)
class Row:
    """One trained latent.

    Attributes:
        grid: side of its latents.
        batch, optimiser, seconds: of its training.
        pictures: how many it reconstructed.
        weights: its folder.
        measures: as ``measure`` gives them.
    """

    data: str
    channels: int
    steps: int
    arm: str
    seed: int
    width: int
    grid: int
    parameters: int
    batch: int
    optimiser: str
    seconds: float
    pictures: int
    weights: str
    measures: dict[str, float]


def matched_width(settings: Settings, tolerance: float = TOLERANCE) -> tuple[int, dict[str, int]]:
    """The first width from ``latent.width`` on at which the arms' parameters agree, and those: {arm: parameters}.

    All arms have that width. The convolutions in place of the transform add a number of parameters that does not
    depend on it; a width of its own could not balance them, since widths are multiples of 8.

    Raises:
        SettingError: there is none.
    """
    for width in range(-(-settings.latent.width // GROUPS) * GROUPS, WIDEST + 1, GROUPS):
        counts = {arm: _parameters(settings, arm, width) for arm in ARMS}
        if max(counts.values()) <= (1 + tolerance) * min(counts.values()):
            return width, counts
    raise SettingError(
        f"latent.width={settings.latent.width}: up to {WIDEST}, no width brings the parameters of "
        f"{', '.join(ARMS)} within {tolerance:.1%}; the last have {counts}"
    )


def measure(folder: Path, pixels: Tensor, features: dict[str, Features], real: dict[str, Tensor]) -> dict[str, float]:
    """How well a saved latent reconstructs pixels uint8 [N, H, W, 3].

    PSNR is that of the mean squared error over all pictures, as the stage logs it, and bands are its too; Fréchet
    distances are those of the reconstructions in 8 bits from the originals, whose features are ``real``.

    Returns:
        {"psnr", "psnr cA", …: dB; name of a distance: that}
    """
    images, again = to_images(pixels), reconstructed(folder, pixels)
    measures = {"psnr": psnr((again - images).square().mean().item())}
    measures |= {f"psnr {band}": value for band, value in band_psnr(images, again).items()}
    rounded = to_pixels(again)
    return measures | {
        name: frechet_distance(features_of(given, rounded), real[name]) for name, given in features.items()
    }


@torch.inference_mode()
def reconstructed(folder: Path, pixels: Tensor) -> Tensor:
    """Images [N, 3, H, W] in [-1, 1]: pixels uint8 [N, H, W, 3] through a saved latent and back."""
    latent = load_latent(folder).latent
    return torch.cat([latent.decode(latent.encode(to_images(part))) for part in pixels.split(BATCH)])


def features_of(features: Features, pixels: Tensor) -> Tensor:
    """Features [N, D] of pixels uint8 [N, H, W, 3]."""
    return torch.cat([features(to_images(part)) for part in pixels.split(BATCH)])


def judges_of(plan: Plan, data: str) -> dict[str, Features]:
    """{name of a Fréchet distance: the features it is taken on}.

    Raises:
        SettingError: an unknown judge, or no classifier in the file.
    """
    found: dict[str, Features] = {}
    for name in plan.judges:
        found["rFID" if name == "inception" else f"FD (judge {name})"] = load_judge(name).image_features
    if data == "cifar10" and plan.classifier is not None:
        found["FD (CIFAR-10 classifier)"] = load_classifier(Path(plan.classifier)).image_features
    return found


def pictures_of(settings: Settings, count: int) -> Tensor:
    """The first ``count`` pictures that the stage holds out: uint8 [N, H, W, 3].

    Raises:
        SettingError: it holds none out.
    """
    chosen = held_out(settings.data)
    if chosen is None:
        raise SettingError("data.validation: held-out pictures are needed, to be reconstructed")
    images = [example.image for example in islice(opened(chosen).stream(shuffle=False), count)]
    return torch.from_numpy(np.stack(images))


def compare(plan: Plan, data: str, kept: dict[str, Any], keep: Callable[[], None]) -> list[Row]:
    """Train and measure all arms of a data set; ``kept`` holds the measures from before, by the stage's key."""
    judges, real, rows = judges_of(plan, data), {}, []
    for shared in plan.stages(data):
        settings = settings_of(shared)
        width, counts = matched_width(settings)
        for seed in plan.seeds:
            for arm, latent in ARMS.items():
                named = [f"latent={latent['name']}", *(f"latent.{k}={v}" for k, v in latent.items() if k != "name")]
                place = run([*shared, *named, f"latent.width={width}", f"seed={seed}"])
                key = f"{place.parent.name} {plan.pictures} {', '.join(judges)}"
                if key not in kept:
                    pixels = pictures_of(settings, plan.pictures)
                    real = real or {name: features_of(given, pixels) for name, given in judges.items()}
                    kept[key] = {"pictures": len(pixels), "measures": measure(place, pixels, judges, real)}
                    keep()
                rows.append(_row(settings, arm, seed, width, counts[arm], place, kept[key]))
                print(f"{data} {arm} {seed}: {rows[-1].measures}", file=sys.stderr, flush=True)
    return rows


def _row(
    settings: Settings, arm: str, seed: int, width: int, parameters: int, place: Path, found: dict[str, Any]
) -> Row:
    train, latent = settings.train, settings.latent
    result = json.loads((place.parent / RESULT).read_text())
    grid = size_of(described(settings.data, "train")) // 2 ** (latent.levels + latent.stages)
    return Row(
        settings.data.name,
        latent.channels,
        train.steps,
        arm,
        seed,
        width,
        grid,
        parameters,
        train.batch,
        f"{train.optimiser}, {train.learning_rate:g}",
        result["seconds"],
        found["pictures"],
        str(place.absolute()),
        found["measures"],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure and write the report."""
    from benchmarks.latents_report import write_report

    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or {"-h", "--help"} & set(words):
        raise SystemExit(__doc__)
    plan = Plan.of(words)
    settings = settings_of(plan.stages(plan.data[0])[0])
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    place = Path(settings.runs_dir) / RESULTS
    kept = json.loads(place.read_text()) if place.exists() else {}
    rows = [row for data in plan.data for row in compare(plan, data, kept, lambda: write_json(place, kept))]
    write_report(Path(plan.report), plan, rows)
    print(Path(plan.report).read_text())


def _read(text: str, default: Any) -> Any:
    """A word's value: several, where its default is several."""
    if text == "null":
        return None

    def value(part: str) -> int | str:
        return int(part) if part.isdigit() else part

    return tuple(map(value, text.split(","))) if isinstance(default, tuple) else value(text)


def _parameters(settings: Settings, arm: str, width: int) -> int:
    with torch.device("meta"):
        latent = latent_of(replace(settings, latent=replace(settings.latent, width=width, **ARMS[arm])))
    return sum(parameter.numel() for parameter in latent.parameters())


if __name__ == "__main__":
    main()
