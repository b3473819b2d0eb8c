"""What a submitit job runs. Nothing heavy is imported until a job does, so that the main command starts at once."""

from __future__ import annotations

from typing import Any


def trial(folder: str, plan: dict[str, Any]) -> None:
    """Run one trial; see ``ablations.session.work.run_trial``."""
    from ablations.session.work import run_trial

    run_trial(folder, plan)


def stages(folder: str, plan: dict[str, Any]) -> None:
    """Make stages that several trials share; see ``ablations.session.work.make_shared``."""
    from ablations.session.work import make_shared

    make_shared(folder, plan)


def speed(folder: str, plan: dict[str, Any]) -> None:
    """Measure speed and memory of models on the node that this runs on; see ``ablations.session.work.measure_speed``."""
    from ablations.session.work import measure_speed

    measure_speed(folder, plan)


def preload() -> None:
    """Import what the jobs will need: their own code, and what most judges' networks are made of."""
    import open_clip.model  # noqa: F401

    import ablations.session.work  # noqa: F401
