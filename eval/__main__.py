"""The command: ``python -m eval model=PATH data=… judge=…``. Open, check, measure, say where the numbers are."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

HELP = """\
Measure a text-to-image model, or the images that one made.

  python -m eval model=iris/weights/shapes                              # a saved model of IRIS
  python -m eval model=exported/ measure=speed                          # the same in ONNX Runtime or ExecuTorch (eval.export)
  python -m eval model=samples/ data=folder data.path=photos/ judge=inception    # a folder of images with captions
  python -m eval model=sd-turbo/ data=parquet data.path=coco.parquet judge=clip_vit_b32 sample.steps=1   # of diffusers
  python -m eval model=owner/name kind=diffusers data=…                 # from the Hugging Face hub or its cache
  python -m eval model=iris/weights/shapes measure=speed                # latency and memory by part, hard caps
  python -m eval model=iris/weights/shapes measure.what=quality,skills measure.samples=5000
  python -m eval model=iris/weights/shapes --cfg job                    # the composed configuration
  python -m eval.compare A B                                            # paired differences of two results, or models

A folder of images has their captions in metadata.jsonl or metadata.csv (file_name, text) or captions.txt (a line an
image); an array file (.npy, .npz) holds uint8 [N, H, W, 3]. Results go to eval_results/…: results.json, report.md,
index.html, per_image.csv, duplicates.html; and to MLflow. Images and features of real ones are kept in runs/eval.
Exit codes: 0 done, 1 a measure failed, 2 a setting, model or data cannot be used, 130 interrupted.

Groups (group=option), and any setting as key=value:"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow each other down
    from iris.errors import SettingError

    if "--help" in words or "-h" in words:
        return _help()
    try:
        if _wants_config(words):
            return _show(words)
        return _run(words)
    except SettingError as error:
        return failed(error, 2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with the images that were made", file=sys.stderr)
        return 130


def _run(words: Sequence[str]) -> int:
    from iris.io.progress import Progress

    with Progress() as progress:
        progress.say(f"opening {next((word for word in words if word.startswith('model=')), 'nothing')}")
        from eval.report.summary import print_summary
        from eval.stages.run import MeasureFailed, evaluate  # torch and its like: seconds

        try:
            results, folder = evaluate(words, progress)
        except MeasureFailed as error:
            return failed(error, 1)
        print_summary(results, folder, progress.console)
    return 0


def failed(error: Exception, code: int) -> int:
    """Say why in one line; returns the code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _help() -> int:
    from eval.settings import COMPOSER

    print(HELP)
    for group in COMPOSER.groups:
        print(f"  {group:7} {', '.join(COMPOSER.options(group))}")
    return 0


def _show(words: Sequence[str]) -> int:
    from omegaconf import OmegaConf

    from eval.settings import compose

    print(OmegaConf.to_yaml(compose(words)), end="")
    return 0


def _wants_config(words: list[str]) -> bool:
    """Take ``--cfg job`` out of the words; whether it was there."""
    from iris.errors import SettingError

    for index, word in enumerate(words):
        if word in ("--cfg", "-c") or word.startswith("--cfg="):
            what = word.partition("=")[2] or (words[index + 1] if index + 1 < len(words) else "")
            if what != "job":
                raise SettingError(f"--cfg {what}: only 'job' is there to be shown")
            del words[index : index + (1 if "=" in word else 2)]
            return True
        if word.startswith("-"):
            raise SettingError(f"{word} is no option; allowed: --help, --cfg job, and key=value settings")
    return False


if __name__ == "__main__":
    sys.exit(main())
