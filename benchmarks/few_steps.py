"""FID against generator evaluations, teacher and students: ``python -m benchmarks.few_steps TEACHER STUDENTS [samples]``.

TEACHER is a pipeline's folder, STUDENTS what ``python -m iris.training stage=distill out=STUDENTS`` wrote. The data are the
embedded world's held-out pictures, the judge is ``shapes``; all start image i from the same noise. Writes Markdown to
reports/few_steps.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from eval.fid import frechet_jackknife
from eval.judges import Judge, load_judge
from iris import data
from iris.pipeline import IrisPipeline
from iris.sampling import SamplingSettings
from iris.training.tasks import to_images

TEACHER_STEPS, GUIDANCE = (1, 2, 4, 8, 20), 2.5
STUDENT_STEPS = (1, 2, 4)
SHAPES = {"path": None, "size": 32, "image_column": "image", "text_column": "text", "labels": None, "train": 16384,
          "validation": 4096, "heldout": 1, "seed": 0}        # as conf/data/shapes.yaml


def main() -> None:
    """Measure and write the table."""
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    teacher, students = Path(sys.argv[1]), Path(sys.argv[2])
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 2048
    torch.set_num_threads(1)
    judge = load_judge("shapes")
    decoded = data.pixels(data.load("shapes", **SHAPES)["validation"], 32, 0.0)
    reference, captions = features(judge, torch.from_numpy(decoded.images)), decoded.captions[:count]
    rows = []
    pipeline = IrisPipeline.from_pretrained(teacher)
    for steps in TEACHER_STEPS:
        rows.append(measured("teacher", pipeline, SamplingSettings(steps, guidance=GUIDANCE), judge, captions, reference))
    for steps in STUDENT_STEPS:
        folder = students if steps == max(STUDENT_STEPS) else students / f"steps-{steps}"
        settings = SamplingSettings(steps, "stochastic")        # guidance is folded into a student
        rows.append(measured("student", IrisPipeline.from_pretrained(folder), settings, judge, captions, reference))
    text = "\n".join([
        "# Few-step students", "",
        f"FID of {count:,} pictures of the embedded world against {len(reference):,} held-out ones, judge shapes; ± is the "
        f"sampling error of one student. The teacher is sampled by Euler steps with guidance {GUIDANCE}, each two evaluations; the "
        "student by consistency steps without guidance, which is folded into it.", "",
        "| | steps | evaluations | FID |", "|---|---|---|---|", *rows, ""])
    Path("reports").mkdir(exist_ok=True)
    Path("reports/few_steps.md").write_text(text)
    print(text)


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
