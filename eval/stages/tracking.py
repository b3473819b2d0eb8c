"""The results as a run in MLflow, sent when they are on disk: a store that does not answer costs nothing."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ablations.track.location import Location
from eval.results import FILES, Results
from iris.io.progress import Progress

EXPERIMENT = "evaluation"
METRICS, PARAMS, LENGTH, TAG = 1000, 100, 6000, 5000  # MLflow's limits: of a call, of a value, of a tag

Item = TypeVar("Item")


def track_results(results: Results, folder: Path, location: Location, progress: Progress) -> str | None:
    """One finished run with the numbers, their errors, the settings and the files; its id, None if MLflow failed."""
    progress.say(f"sending the results to MLflow at {location.shown}")
    try:
        client, experiment = location.connect(EXPERIMENT)
        run = client.create_run(experiment, tags=_tags(results), run_name=results.name)
        _log(client, run.info.run_id, results)
        for name in FILES:
            if (folder / name).is_file():
                client.log_artifact(run.info.run_id, str(folder / name))
        client.set_terminated(run.info.run_id, "FINISHED")
    except Exception as error:  # MLflow, its server and its database raise everything
        progress.say(f"MLflow at {location.shown}: {location.explained(error)}; the results are in {folder}")
        return None
    progress.say(f"look at runs: {location.command}")
    return run.info.run_id


def _log(client: Any, run_id: str, results: Results) -> None:
    from mlflow.entities import Metric, Param

    now = int(_timestamp(results) * 1000)
    values: dict[str, float] = {}
    for name, number in results.numbers.items():
        base, _, rest = name.partition("/")
        for suffix, value in (
            ("", number.value),
            ("_se", number.standard_error),
            ("_low", number.low),
            ("_high", number.high),
        ):
            if value is not None:
                values[f"{base}{suffix}/{rest}" if rest else f"{base}{suffix}"] = float(value)
    values |= {f"seconds/{name}": value for name, value in results.seconds.items()}
    for part in _batches([Metric(name, value, now, 0) for name, value in values.items()], METRICS):
        client.log_batch(run_id, metrics=part)
    params = [Param(name, str(value)[:LENGTH]) for name, value in results.settings.items()]
    for part in _batches(params, PARAMS):
        client.log_batch(run_id, params=part)


def _tags(results: Results) -> dict[str, str]:
    model, data, judge = results.model, results.data, results.judge
    tags = {
        "kind": "evaluation",
        "model": model["path"],
        "model_kind": model["kind"],
        "model_fingerprint": model["fingerprint"],
        "data": data["name"],
        "data_fingerprint": data["fingerprint"],
        "judge": judge.get("name", "none"),
        "judge_sha256": judge.get("sha256", ""),
        "command": results.command,
        "host": socket.gethostname(),
        "mlflow.user": _user(),
        "mlflow.source.name": "eval",
        "mlflow.source.type": "LOCAL",
    }
    tags |= {f"hardware.{name}": value for name, value in results.hardware.items()}
    return {name: str(value)[:TAG] for name, value in tags.items()}


def _timestamp(results: Results) -> float:
    from datetime import datetime

    return datetime.fromisoformat(results.created).timestamp()


def _batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    for first in range(0, len(items), size):
        yield list(items[first : first + size])


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
