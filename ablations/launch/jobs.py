"""What a submitit job runs. Nothing heavy is imported until a job does, so that the main command starts at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ablations.launch import Job
    from ablations.question.grid import Trial


def trial(folder: str, plan: dict[str, Any]) -> None:
    """Run one trial; see ``ablations.trial.trial.run_trial``."""
    from ablations.trial.trial import run_trial

    run_trial(folder, plan)


def stages(folder: str, plan: dict[str, Any]) -> None:
    """Make the shared stages of a trial; see ``ablations.trial.trial.prepare_stages``."""
    from ablations.trial.trial import prepare_stages

    prepare_stages(folder, plan)


def speed(folder: str, plan: dict[str, Any]) -> None:
    """Measure speed and memory of models on the node that this runs on; see ``ablations.trial.speed.measure_speed``."""
    import torch

    from ablations.trial.speed import measure_loaders
    from ablations.trial.trial import environment
    from iris.io.files import write_json

    measured = measure_loaders(plan["loaders"], plan["rounds"], plan["warmup"], plan["threads"])
    write_json(Path(folder) / "result.json", {"speed": measured, "environment": environment(torch.device("cpu"))})


def speed_job(trials: Sequence[Trial], runs: Path, node: str | None) -> Job:
    """The job that measures the models of finished trials, alone on a node; its folder is that of these models.

    ``node``: the features that the node must have.
    """
    from ablations.launch import Job
    from ablations.trial.speed import loaders_of
    from iris.io.hashing import digest

    measure = trials[0].settings["measure"]
    plan = {
        "loaders": loaders_of(trials, runs),
        "rounds": measure["latency_rounds"],
        "warmup": measure["latency_warmup"],
        "threads": 1,
    }
    key = (
        f"speed-{digest([[t.key for t in trials], plan['rounds'], plan['warmup'], 'slurm', *([node] if node else [])])}"
    )
    return Job(key, speed, plan, runs / "speed" / key, exclusive=True)
