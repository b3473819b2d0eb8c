"""The command: ``python -m iris.training stage=text``. Compose, check, make what is missing, say where it is."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from iris.io.command import answer_options, failed

HELP = """\
Train IRIS, a stage at a time. A stage that needs an earlier one finds it or makes it.

  python -m iris.training stage=vae latent=wavelet_vae data=shapes
  python -m iris.training stage=class data=cifar10 data.path=cifar10/
  python -m iris.training stage=text data=shapes                    # from nothing
  python -m iris.training stage=text data=shapes start=class        # from the class stage's generator
  python -m iris.training stage=aesthetic data=parquet data.path=rows.parquet data.score_column=score data.min_score=5
  python -m iris.training stage=distill student.steps=1,2,4         # start=text, class, aesthetic, a key or a folder
  python -m iris.training stage=text scale=smoke out=model          # seconds; the weights go to model/
  python -m iris.training stage=text --cfg job                      # the composed configuration
  python -m iris.training --help train                              # the settings of a group
  torchrun --nproc-per-node 8 -m iris.training stage=text scale=gpu # the processes share each batch

How each stage is trained: vae.* (vae), pretrain.* (class), train.* (text), finetune.* (aesthetic), distill.* and student.*
(distill); compute.* says on what. Run again after a stop: a stage goes on where it was, a finished one is taken as it is.
A grid with the same settings finds it too.
Exit codes: 0 done, 1 training failed, 2 a setting cannot be used, 130 interrupted, 128 + n after signal n.

Groups (group=option), and any setting as key=value:"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow each other down
    from iris.errors import SettingError
    from iris.io.files import FULL
    from iris.training.safety import DiskFull, LostWorker, NonFiniteLoss, OutOfMemory, ShareError

    try:
        if not answer_options(words, _tree, HELP):
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
    from iris.stages import Context, stage_of
    from iris.stages.engine import unobserved
    from iris.stages.processes import Processes
    from iris.training.publishing import check_out, publish

    if not any(word.startswith("stage=") for word in words):
        raise _stage_missing()
    settings = _tree().build(words)
    check_out(settings.out)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    processes = Processes(settings.compute.device)
    with Progress(quiet=not processes.first) as progress, following(settings.log, progress.say) as follower:
        observe = follower.observe if follower and processes.first else unobserved
        stage = stage_of(settings, Context(Path(settings.runs_dir), progress, processes, observe))
        place = stage.make()
        if follower and processes.first:
            for told in follower.catch_up(one.folder for one in stage.chain()):
                progress.say(f"{told}: MLflow gets what it missed")
        if processes.first and settings.out is not None:
            place = publish(place, settings.out)
        progress.say(f"weights   {place}")
        for line in stage.usage(place):
            progress.say(f"use them  {line}")
    return place


def _tree():
    from iris.stages.settings import TREE

    return TREE


def _stage_missing() -> Exception:
    from iris.errors import SettingError
    from iris.stages.settings import STAGES

    return SettingError(f"stage is missing; allowed: {', '.join(STAGES)}")


def _failed(error: Exception | str, code: int, shared: bool = True) -> int:
    """Say why: once what all processes have (``shared``), else whichever of them has it."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or not shared:
        failed(error, code, "" if rank == "0" else f" (process {rank})")
    return code


if __name__ == "__main__":
    sys.exit(main())
