"""The settings of what MLflow is told, apart from those of a trial, with which torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from iris.settings import setting


@dataclass(frozen=True, kw_only=True)
class Track:
    """Settings track.*: what MLflow is told, and where it is."""

    uri: str | None = setting(None, "MLflow's tracking URI; null: MLFLOW_TRACKING_URI, or mlflow.db in this folder")
    models_mb: float = setting(50, "a finished trial's model is logged too, up to this size; 0: none", low=0)
