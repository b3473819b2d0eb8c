"""Evaluations as the command makes them, of the shipped model unless a test names another."""

from pathlib import Path

import numpy as np
from PIL import Image

from eval.evaluate import evaluation_of, opened
from eval.settings import TREE
from eval.stages.evaluation import Evaluation
from iris.io.progress import Progress
from iris.stages.engine import Context
from iris.stages.processes import Processes

SHIPPED = Path(__file__).parents[2] / "iris" / "weights" / "shapes"


def evaluation(runs: Path, *words: str) -> Evaluation:
    """What a command line is measured on, its stages below ``runs``; nothing is computed yet."""
    settings = TREE.build([f"model={SHIPPED}", *words])
    context = Context(runs, Progress(quiet=True), Processes(settings.device))
    return evaluation_of(settings, opened(settings, context), context)


def captioned(folder: Path, count: int, size: int = 32) -> Path:
    """A folder of noise with captions, as data=folder and model=FOLDER read it."""
    folder.mkdir(parents=True, exist_ok=True)
    draws, rows = np.random.default_rng(0), ["file_name,text"]
    for i in range(count):
        Image.fromarray(draws.integers(0, 256, (size, size, 3), np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,a dog {i}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder
