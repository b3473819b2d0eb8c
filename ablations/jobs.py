"""What a submitit job runs. Nothing heavy is imported until a job does, so that the main command starts at once."""

from __future__ import annotations

from typing import Any


def trial(folder: str, plan: dict[str, Any]) -> None:
    """Run one trial; see ``ablations.trial.run_trial``."""
    from ablations.trial import run_trial

    run_trial(folder, plan)


def stages(folder: str, plan: dict[str, Any]) -> None:
    """Make the shared stages of a trial; see ``ablations.trial.prepare_stages``."""
    from ablations.trial import prepare_stages

    prepare_stages(folder, plan)
