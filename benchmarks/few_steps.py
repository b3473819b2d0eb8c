"""FID against generator evaluations, a teacher and its students.

    python -m benchmarks.few_steps TEACHER consistency:1,2,4=FOLDER shortcut:1,2,4=FOLDER [--samples 2048]

TEACHER is a pipeline's folder, the others are what ``python -m iris.training stage=distill out=FOLDER`` wrote, by method and steps.
The data are the embedded world's held-out pictures, the judge is ``shapes``; all start image i from the same noise. Writes
Markdown to reports/few_steps.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from eval.fid import frechet_jackknife
from eval.judges import Judge, load_judge
from iris import data
from iris.distill import DistillSettings
from iris.errors import SettingError
from iris.pipeline import IrisPipeline
from iris.sampling import SamplingSettings
from iris.training.stages.distill import students
from iris.training.tasks import to_images

TEACHER_STEPS, GUIDANCE = (1, 2, 4, 8, 10, 20), 2.5     # two evaluations each
SHAPES = {"path": None, "size": 32, "image_column": "image", "text_column": "text", "labels": None, "train": 16384,
          "validation": 4096, "heldout": 1, "seed": 0}        # as conf/data/shapes.yaml


def main() -> None:
    """Measure and write the table."""
    given = arguments()
    torch.set_num_threads(1)
    judge = load_judge("shapes")
    decoded = data.pixels(data.load("shapes", **SHAPES)["validation"], 32, 0.0)
    reference, captions = features(judge, torch.from_numpy(decoded.images)), decoded.captions[:given.samples]
    pipeline = IrisPipeline.from_pretrained(given.teacher)
    rows = [measured("teacher", pipeline, SamplingSettings(steps, guidance=GUIDANCE), judge, captions, reference)
            for steps in TEACHER_STEPS]
    for chosen, weights in given.students:
        for steps, folder in students(weights, chosen.steps).items():
            rows.append(measured(f"student, {chosen.method}", IrisPipeline.from_pretrained(folder), chosen.sampling(steps), judge,
                                 captions, reference))
    text = "\n".join([
        "# Few-step students", "",
        f"FID of {len(captions):,} pictures of the embedded world against {len(reference):,} held-out ones, judge shapes; ± is the "
        f"sampling error of one student. The teacher is sampled by Euler steps with guidance {GUIDANCE}, each two evaluations; the "
        "students without guidance, which is folded into them: consistency models by steps that noise anew, shortcut models by "
        "Euler steps.", "",
        "| | steps | evaluations | FID |", "|---|---|---|---|", *rows, ""])
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


def measured(name: str, pipeline: IrisPipeline, settings: SamplingSettings, judge: Judge, captions: list[str],
             reference: Tensor) -> str:
    """A row of the table."""
    found = features(judge, pipeline.generate(captions, settings))
    fid, error = frechet_jackknife(found, reference, blocks=20)
    row = f"| {name} | {settings.steps} | {settings.evaluations} | {fid:.2f} ± {error:.2f} |"
    print(row, file=sys.stderr, flush=True)
    return row


def features(judge: Judge, pixels: Tensor) -> Tensor:
    """Judge features [N, D] of pixels uint8 [N, H, W, 3]."""
    return torch.cat([judge.image_features(to_images(part)) for part in pixels.split(512)])


if __name__ == "__main__":
    main()
