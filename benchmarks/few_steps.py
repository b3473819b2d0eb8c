"""FID against generator evaluations, a teacher and its students.

    python -m benchmarks.few_steps TEACHER consistency:1,2,4=FOLDER shortcut:1,2,4=FOLDER [--samples 2048]

TEACHER is a pipeline's folder, the others are what ``python -m iris.training stage=distill out=FOLDER`` wrote, by method and steps.
The data are the embedded world's held-out pictures, the judge is ``shapes``; all start image i from the same noise. Writes
Markdown to reports/few_steps.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from eval.judges import Judge, load_judge
from eval.metrics.fid import frechet_jackknife
from iris import data
from iris.diffusion.sampling import SamplingSettings
from iris.errors import SettingError
from iris.io.pixels import to_images
from iris.pipeline import IrisPipeline
from iris.stages.distill import students
from iris.training.distill_settings import DistillSettings

TEACHER_STEPS, GUIDANCE = (1, 2, 4, 8, 10, 20), 2.5  # two evaluations each
# What is asked of each student: its FID at so many steps, at most so many times the teacher's at so many.
ASKED = ((4, 1.3, 20), (1, 0.5, 1))
SHAPES = {
    "path": None,
    "size": 32,
    "image_column": "image",
    "text_column": "text",
    "labels": None,
    "train": 16384,
    "validation": 4096,
    "heldout": 1,
    "seed": 0,
}  # as conf/data/shapes.yaml


class Row(NamedTuple):
    """A row of the table, its numbers as they stand there."""

    name: str
    steps: int
    evaluations: int
    fid: float
    error: float

    def __str__(self) -> str:
        return f"| {self.name} | {self.steps} | {self.evaluations} | {self.fid:.2f} ± {self.error:.2f} |"


def main() -> None:
    """Measure and write the table."""
    given = arguments()
    torch.set_num_threads(1)
    judge = load_judge("shapes")
    decoded = data.pixels(data.load("shapes", **SHAPES)["validation"], 32, 0.0)
    reference, captions = features(judge, torch.from_numpy(decoded.images)), decoded.captions[: given.samples]
    pipeline = IrisPipeline.from_pretrained(given.teacher)
    rows = [
        measured("teacher", pipeline, SamplingSettings(steps, guidance=GUIDANCE), judge, captions, reference)
        for steps in TEACHER_STEPS
    ]
    for chosen, weights in given.students:
        for steps, folder in students(weights, chosen.steps).items():
            rows.append(
                measured(
                    f"student, {chosen.method}",
                    IrisPipeline.from_pretrained(folder),
                    chosen.sampling(steps),
                    judge,
                    captions,
                    reference,
                )
            )
    text = "\n".join(
        [
            "# Few-step students",
            "",
            f"FID of {len(captions):,} pictures of the embedded world against {len(reference):,} held-out ones, judge shapes; ± is the "
            f"sampling error of one student. The teacher is sampled by Euler steps with guidance {GUIDANCE}, each two evaluations; the "
            "students without guidance, which is folded into them: consistency models by steps that noise anew, shortcut models by "
            "Euler steps.",
            "",
            "| | steps | evaluations | FID |",
            "|---|---|---|---|",
            *map(str, rows),
            "",
            *verdicts(rows),
            "",
        ]
    )
    Path("reports").mkdir(exist_ok=True)
    Path("reports/few_steps.md").write_text(text)
    print(text)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("students", nargs="+", type=student, metavar="METHOD:STEPS=FOLDER")
    parser.add_argument("--samples", type=int, default=2048)
    return parser.parse_args()


def student(text: str) -> tuple[DistillSettings, Path]:
    """``METHOD:STEPS=FOLDER`` as settings and folder."""
    kind, _, folder = text.partition("=")
    method, _, steps = kind.partition(":")
    try:
        chosen = DistillSettings(method, steps=steps)
    except SettingError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{folder!r} is not a folder")
    return chosen, Path(folder)


def measured(
    name: str, pipeline: IrisPipeline, settings: SamplingSettings, judge: Judge, captions: list[str], reference: Tensor
) -> Row:
    """A row of the table."""
    found = features(judge, pipeline.generate(captions, settings))
    fid, error = frechet_jackknife(found, reference, blocks=20)
    row = Row(name, settings.steps, settings.evaluations, round(fid, 2), round(error, 2))
    print(row, file=sys.stderr, flush=True)
    return row


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A line for each student and each of ``ASKED`` whose steps were measured."""
    fids, lines = {(row.name, row.steps): row.fid for row in rows}, []
    for name in dict.fromkeys(row.name for row in rows if row.name != "teacher"):
        for steps, most, against in ASKED:
            own, teacher = fids.get((name, steps)), fids.get(("teacher", against))
            if own is not None and teacher is not None:
                lines.append(
                    f"- {name}, {steps} step{'s' * (steps > 1)}: FID {own:.2f}, {own / teacher:.2f} times the teacher's "
                    f"{teacher:.2f} at {against}; asked for at most {most} times: "
                    f"{'met' if own <= most * teacher else 'missed'}."
                )
    return lines


def features(judge: Judge, pixels: Tensor) -> Tensor:
    """Judge features [N, D] of pixels uint8 [N, H, W, 3]."""
    return torch.cat([judge.image_features(to_images(part)) for part in pixels.split(512)])


if __name__ == "__main__":
    main()
