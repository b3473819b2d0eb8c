"""The report of ``benchmarks.cifar_classes``: a plain statement, a grid of samples, tables, and what ran."""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.cifar_classes import Judged
from benchmarks.cifar_classifier import Classifier, Labelled
from iris.errors import SettingError
from iris.settings import flatten
from iris.stages.base import RESULT, SETTINGS
from iris.stages.settings import settings_of

COLUMNS, ENLARGED, GAP, MARGIN = 8, 2, 2, 72
METRICS = "metrics.jsonl"
GROUPS = ("stage", "data.name", "latent.name")  # said by the first words of a command
RUNNING = ("runs_dir", "log", "threads")  # where and how something ran, not what it is
FOLDERS = ("out", "vae")  # of which only the name matters to another machine


def write_report(
    given: argparse.Namespace, test: Labelled, model: Classifier, rows: list[Judged], samples: dict[float, Tensor]
) -> None:
    """Write Markdown to ``given.report`` and the grid beside it, as PNG."""
    best = max((row for row in rows if row.guidance is not None), key=lambda row: row.accuracy)
    picture = given.report.with_suffix(".png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(picture, samples[best.guidance], test.classes, given.each)
    seen = given.seen or "nobody has looked yet (`--seen`)."
    about, count = model.about, len(test.classes)
    lines = [
        "# CIFAR-10: are the class stage's samples recognisable?",
        "",
        statement(rows, best, test.classes),
        "",
        f"What a person sees: {seen}",
        "",
        f"![samples, a class a row]({picture.name})",
        "",
        f"The first {min(COLUMNS, given.each)} samples of each class at guidance {best.guidance:g}, from the noise of "
        f"seed {given.seed}, none left out; {given.steps} Euler steps, enlarged twice.",
        "",
        *total_table(rows),
        "",
        f"{len(rows[0].wanted):,} pictures a row, {given.each} of each class; samples at all scales start from one "
        f"noise. Recognised: by a ResNet-9 with {about['parameters']:,} parameters, trained on the training split for "
        f"{about['epochs']} epochs, which gets {about['accuracy']:.1%} of the {about['test_images']:,} test pictures "
        f"right; [ ] is Wilson's 95 % interval, chance {1 / count:.0%}. FD is the Fréchet distance on what its last "
        f"layer sees, from the {len(test) - len(rows[0].wanted):,} test pictures that are in no row, ± the sampling "
        "error; it is no FID, and the first row is what no sample can beat.",
        "",
        "## By class",
        "",
        *class_table(rows, best, test.classes),
        "",
        f"Per cent recognised. The last column is of guidance {best.guidance:g}.",
        "",
        *(["## What ran", "", *ran_table(given.ran), ""] if given.ran else []),
    ]
    given.report.write_text("\n".join(lines))


def statement(rows: list[Judged], best: Judged, classes: tuple[str, ...]) -> str:
    """Whether the samples are recognisable, in words that follow from the numbers by the rule they state."""
    real, ceiling, chance = rows[0], rows[1], 1 / len(classes)
    low, high = best.interval
    often, lost = [], []
    for number, name in enumerate(classes):
        share, interval = best.of_class(number)
        right = best.when_named(number)  # else the classifier's one answer to all samples would pass for a success
        if share > 0.5 and right > 0.5:
            often.append(name)
        if interval[0] <= chance or right <= chance:
            lost.append(name)
    if low > 0.5:
        word = "**Yes, mostly**: more than half of the samples are recognised as their class."
    elif low > chance:
        word = "**In part**: samples are recognised above chance, but not more than half of them."
    else:
        word = "**No**: samples are not recognised above chance."
    sentence = (
        f"{word} At guidance {best.guidance:g}, the best of {len(rows) - 2}, the classifier recognises "
        f"{best.accuracy:.1%} [{low:.1%}, {high:.1%}] of {len(best.wanted):,} samples, where chance is "
        f"{chance:.0%}, real pictures get {real.accuracy:.1%}, and real pictures through the model's latent "
        f"{ceiling.accuracy:.1%}."
    )
    sentence += f" Recognised more often than not, and rightly: {', '.join(often) or 'no class'}."
    return sentence + f" Not above chance: {', '.join(lost) or 'no class'}."


def total_table(rows: list[Judged]) -> list[str]:
    """Accuracy and distance of each kind of pictures."""
    lines = ["| pictures | recognised | FD (CIFAR-10 classifier) |", "|---|---|---|"]
    for row in rows:
        low, high = row.interval
        share = f"{row.accuracy:.1%} [{low:.1%}, {high:.1%}]"
        lines.append(f"| {row.name} | {share} | {row.distance:.2f} ± {row.error:.2f} |")
    return lines


def class_table(rows: list[Judged], best: Judged, classes: tuple[str, ...]) -> list[str]:
    """Accuracy by class, and what the best samples are mistaken for."""
    lines = [
        f"| class | {' | '.join(row.name for row in rows)} | most often taken for |",
        f"|---|{'---|' * len(rows)}---|",
    ]
    for number, name in enumerate(classes):
        shares = [f"{100 * row.of_class(number)[0]:.0f}" for row in rows]
        other = best.mistaken(number)
        taken = f"{classes[other[0]]} ({other[1]:.0%})" if other else "nothing else"
        lines.append(f"| {name} | {' | '.join(shares)} | {taken} |")
    return lines


def ran_table(folders: list[Path]) -> list[str]:
    """What the stages' own files say of how they were trained."""
    lines = ["| stage | steps | batch | images/s, median | minutes | at the end |", "|---|---|---|---|---|---|"]
    commands = []
    for folder in folders:
        settings, result, rows = _read(folder)
        batch = settings["train"]["batch"]
        pace = [row["images_per_s"] for row in rows]
        steps = [0, *(row["step"] for row in rows)]
        minutes = sum((b - a) * batch / each for a, b, each in zip(steps, steps[1:], pace, strict=False)) / 60
        end = ", ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items() if "/" not in name)
        lines.append(
            f"| {result['stage']} | {result['steps']:,} | {batch} | {statistics.median(pace):.0f} | "
            f"{minutes:.0f} | {end} |"
        )
        commands.append(command_of(settings))
    return [*lines, "", "```", *commands, "```"]


def command_of(settings: dict[str, Any]) -> str:
    """The shortest command line with a stage's settings, without the folders of the machine that it ran on."""
    base = [f"stage={settings['stage']}", f"data={settings['data']['name']}", f"latent={settings['latent']['name']}"]
    usual = flatten(json.loads(json.dumps(asdict(settings_of(base)))))
    words = [
        f"{'from' if key == 'start' else key}={Path(value).name if key in FOLDERS else _word(value)}"
        for key, value in flatten(settings).items()
        if value != usual[key] and key not in GROUPS + RUNNING
    ]
    return " ".join(["python -m iris.training", *base, *words])


def draw_grid(path: Path, pixels: Tensor, classes: tuple[str, ...], each: int) -> None:
    """Write the first samples of each class, a class a row with its name, as PNG; pixels uint8 [classes * each, …]."""
    columns, (height, width) = min(COLUMNS, each), pixels.shape[1:3]
    down, right = height * ENLARGED + GAP, width * ENLARGED + GAP
    sheet = Image.new("RGB", (MARGIN + columns * right - GAP, len(classes) * down - GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for row, name in enumerate(classes):
        pen.text((MARGIN - 6, row * down + height * ENLARGED / 2), name, "black", font, anchor="rm")
        for column in range(columns):
            image = pixels[row * each + column].numpy()
            large = np.repeat(np.repeat(image, ENLARGED, 0), ENLARGED, 1)
            sheet.paste(Image.fromarray(large), (MARGIN + column * right, row * down))
    sheet.save(path, "PNG", optimize=True)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Settings, result and metrics of a finished stage."""
    missing = [name for name in (SETTINGS, RESULT, METRICS) if not (folder / name).exists()]
    if missing:
        raise SettingError(f"--ran {folder}: {', '.join(missing)} is missing; expected the folder of a finished stage")
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return json.loads((folder / SETTINGS).read_text()), json.loads((folder / RESULT).read_text()), rows


def _word(value: Any) -> str:
    """A setting's value as the command line takes it."""
    if isinstance(value, list):
        return ",".join(map(_word, value))
    return value if isinstance(value, str) else json.dumps(value)
