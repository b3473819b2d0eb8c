"""The command: ``python -m iris.training stage=text``. Compose, check, make what is missing, say where it is."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

HELP = """\
Train IRIS, a stage at a time. A stage that needs an earlier one finds it or makes it.

  python -m iris.training stage=vae latent=wavelet_vae data=shapes
  python -m iris.training stage=class data=cifar10 data.path=cifar10/
  python -m iris.training stage=text data=shapes                    # from nothing
  python -m iris.training stage=text data=shapes from=class         # from the class stage's generator
  python -m iris.training stage=aesthetic data=parquet data.path=rows.parquet data.score_column=score data.min_score=5
  python -m iris.training stage=distill student.steps=1,2,4         # from=text, class, aesthetic, a key or a folder
  python -m iris.training stage=text scale=smoke out=model          # seconds; the weights go to model/
  python -m iris.training stage=text --cfg job                      # the composed configuration
  torchrun --nproc-per-node 8 -m iris.training stage=text scale=gpu # the processes share each batch

train.* and student.* belong to the stage that is named; one made on the way has its own values, and shares the data,
the latent, the model and the scale. Run again after a stop: a stage goes on where it was, a finished one is taken as
it is.
Exit codes: 0 done, 1 training failed, 2 a setting cannot be used, 130 interrupted, 128 + n after signal n.

Groups (group=option), and any setting as key=value:"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow each other down
    from iris.errors import SettingError
    from iris.io.files import FULL
    from iris.training.safety import DiskFull, LostWorker, NonFiniteLoss, OutOfMemory, ShareError

    if "--help" in words or "-h" in words:
        return _help()
    try:
        if _wants_config(words):
            return _show(words)
        run(words)
    except ShareError as error:
        return _failed(error, 2, shared=False)
    except SettingError as error:
        return _failed(error, 2)
    except NonFiniteLoss as error:
        return _failed(error, 1)
    except (LostWorker, OutOfMemory) as error:
        return _failed(error, 1, shared=False)
    except DiskFull as error:
        return _failed(error.strerror, 1, shared=False)
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = f" to {error.filename2 or error.filename}" if error.filename else ""
        return _failed(
            f"no space left to write{where}; free some space and run the same command again", 1, shared=False
        )
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where this stopped", file=sys.stderr)
        return 130
    return 0


def run(words: Sequence[str]) -> Path:
    """Make the stage of a command line, and what it builds on; returns the folder of its weights.

    Raises:
        SettingError: a setting that cannot be used.
        NonFiniteLoss, OutOfMemory, DiskFull, LostWorker, Stopped: as ``iris.training.loop.fit``.
    """
    import torch

    from iris.io.follower import following
    from iris.io.progress import Progress
    from iris.stages import stage_of
    from iris.stages.base import RESULT, Desk, check_out, publish
    from iris.stages.processes import Processes
    from iris.stages.settings import settings_of

    settings = settings_of(words)
    check_out(settings.out)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    processes = Processes(settings.train.device)
    with Progress(quiet=not processes.first) as progress, following(settings.log, progress.say) as follower:
        stage = stage_of(words, Desk(Path(settings.runs_dir), progress, processes, follower))
        place = stage.make()
        if processes.first and settings.out is not None:
            place = publish(place, settings.out)
        result = json.loads((stage.folder / RESULT).read_text())
        progress.say(f"weights   {place}")
        for line in stage.usage(place, result):
            progress.say(f"use them  {line}")
    return place


def _failed(error: Exception | str, code: int, shared: bool = True) -> int:
    """Say why in one line: once what all processes have (``shared``), else whichever of them has it."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or not shared:
        process = "" if rank == "0" else f" (process {rank})"
        print(f"error{process}: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _help() -> int:
    from iris.stages.settings import COMPOSER

    print(HELP)
    for group in COMPOSER.groups:
        print(f"  {group:7} {', '.join(COMPOSER.options(group))}")
    return 0


def _show(words: Sequence[str]) -> int:
    from omegaconf import OmegaConf

    from iris.stages.settings import compose

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
