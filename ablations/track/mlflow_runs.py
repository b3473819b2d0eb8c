"""Calls to MLflow that may be repeated: whether an earlier one was carried out or not, the run is the same then."""

from __future__ import annotations

import math
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

PARAMS_PER_BATCH, METRICS_PER_BATCH = 100, 1000  # MLflow's own limits (mlflow/utils/validation.py)
PARAM_LENGTH, TAG_LENGTH = 6000, 5000
RUNS_PER_PAGE = 100  # a sqlite store needs about 0.2 MB of memory for each while it looks them up
THUMBNAIL = 256  # pixels of the copy that MLflow's charts show


def find_runs(client: Any, experiment_id: str, filter_string: str) -> Iterator[Any]:
    """All runs that a filter finds, the oldest first."""
    token = None
    while True:
        page = client.search_runs(
            [experiment_id], filter_string, order_by=["start_time ASC"], max_results=RUNS_PER_PAGE, page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def log_params(client: Any, run_id: str, params: Mapping[str, str], there: Mapping[str, str]) -> None:
    """Params that are not ``there``: MLflow takes no other value for one that it has."""
    from mlflow.entities import Param

    fresh = [Param(name, value[:PARAM_LENGTH]) for name, value in params.items() if name not in there]
    for batch in _batches(fresh, PARAMS_PER_BATCH):
        client.log_batch(run_id, params=batch)


def log_values(client: Any, run_id: str, values: Mapping[str, float], time_ms: int, there: Mapping[str, float]) -> None:
    """Final measures that are not ``there``, at step 0, where MLflow's charts draw bars across runs."""
    from mlflow.entities import Metric

    fresh = [Metric(name, value, time_ms, 0) for name, value in values.items() if not _same(there.get(name), value)]
    for batch in _batches(fresh, METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=batch)


def set_tags(client: Any, run_id: str, tags: Mapping[str, str], there: Mapping[str, str] = {}) -> None:
    """Tags that are not ``there``, replacing what the run has under their names."""
    from mlflow.entities import RunTag

    fresh = [RunTag(name, value) for name, value in short(tags).items() if there.get(name) != value]
    for batch in _batches(fresh, PARAMS_PER_BATCH):
        client.log_batch(run_id, tags=batch)


def log_picture(client: Any, run_id: str, picture: Image.Image, key: str, step: int, time_ms: int) -> None:
    """A picture in the form that MLflow's charts put side by side for several runs.

    Named as ``MlflowClient.log_image`` does, but for its random part: repeated, the picture would be there twice.
    """
    name = f"{key}+step+{step}+timestamp+{time_ms}+{uuid.uuid5(uuid.NAMESPACE_OID, f'{run_id} {key} {step}')}"
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    with tempfile.TemporaryDirectory() as folder:
        picture.save(Path(folder) / f"{name}.png")
        small.save(Path(folder) / f"{name}+compressed.webp")
        client.log_artifacts(run_id, folder, "images")
    client.set_tag(run_id, "mlflow.loggedImages", "True")


def short(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags cut to the length that MLflow takes."""
    return {name: value[:TAG_LENGTH] for name, value in tags.items()}


def _same(one: float | None, other: float) -> bool:
    return one is not None and (one == other or (math.isnan(one) and math.isnan(other)))


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
