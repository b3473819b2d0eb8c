"""The command: ``python -m eval model=PATH data=… judge=…``. Open, check, measure, say where the numbers are."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from iris.io.command import answer_options, failed

HELP = """\
Measure a text-to-image model, or the images that one made.

  python -m eval model=iris/weights/shapes                              # a saved model of IRIS
  python -m eval model=text-0123456789ab                                # a stage of a training or a grid in runs_dir
  python -m eval model=samples/ data=folder data.path=photos/ judge=inception    # a folder of images with captions
  python -m eval model=sd-turbo/ data=parquet data.path=coco.parquet judge=clip_vit_b32 sample.steps=1   # of diffusers
  python -m eval model=owner/name kind=diffusers data=…                 # from the Hugging Face hub or its cache
  python -m eval model=iris/weights/shapes measure=speed                # latency and memory by part, hard caps
  python -m eval model=iris/weights/shapes measure.what=quality,skills measure.samples=5000
  python -m eval model=iris/weights/shapes --cfg job                    # the composed configuration
  python -m eval.compare A B                                            # paired differences of two results, or models

A folder of images has their captions in metadata.jsonl or metadata.csv (file_name, text) or captions.txt (a line an
image); an array file (.npy, .npz) holds uint8 [N, H, W, 3]. Results go to eval_results/…: results.json, report.md,
index.html, per_image.csv, duplicates.html; and to MLflow. Images and features are kept in runs/stages.
Exit codes: 0 done, 1 a measure failed, 2 a setting, model or data cannot be used, 130 interrupted.

Groups (group=option), and any setting as key=value:"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow each other down
    from iris.errors import SettingError

    try:
        return 0 if answer_options(words, _tree, HELP) else _run(words)
    except SettingError as error:
        return failed(error, 2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with the images that were made", file=sys.stderr)
        return 130


def _run(words: Sequence[str]) -> int:
    from iris.io.progress import Progress

    with Progress() as progress:
        progress.say(f"opening {next((word for word in words if word.startswith('model=')), 'nothing')}")
        from eval.evaluate import MeasureFailed, evaluate  # torch and its like: seconds
        from eval.report.summary import print_summary

        try:
            results, folder = evaluate(words, progress)
        except MeasureFailed as error:
            return failed(error, 1)
        print_summary(results, folder, progress.console)
    return 0


def _tree():
    from eval.settings import TREE

    return TREE


if __name__ == "__main__":
    sys.exit(main())
