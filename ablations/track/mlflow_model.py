"""A trial's trained model in MLflow: a LoggedModel of the trial's run, that ``mlflow.pyfunc.load_model`` gives back.

The client's calls are used, not ``mlflow.pyfunc.log_model``, which needs a tracking URI and an active run that the
whole process shares. Loading needs this package; the model names the commit it was made with.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

NAME, KIND = "model", "text-to-image"
NEEDED = ("torch", "numpy", "safetensors", "huggingface_hub", "mlflow")
TYPES = {bool: "boolean", int: "long", float: "double", str: "string"}


@dataclass(frozen=True)
class SavedModel:
    """A pipeline to log.

    Attributes:
        folder: that ``IrisPipeline.save`` wrote.
        sample: how images are made unless a call says otherwise, fields of ``SamplingSettings``; what is left
            out is as the pipeline says.
        tags: of the model.
    """

    folder: Path
    sample: dict[str, Any]
    tags: dict[str, str]

    def files(self) -> dict[str, Path]:
        """Its files, by their path in the folder."""
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)): path for path in found}

    @property
    def megabytes(self) -> float:
        """Size of the files."""
        return sum(path.stat().st_size for path in self.files().values()) / 1e6


def log_model(client: Any, experiment_id: str, run_id: str, saved: SavedModel) -> str:
    """Log a saved pipeline as the run's model, once; returns the model's id, for ``models:/<id>``."""
    from mlflow.entities import LoggedModelOutput

    mine = f"source_run_id = '{run_id}' AND name = '{NAME}'"
    found = client.search_logged_models([experiment_id], filter_string=mine)
    model = max(found, key=_ready, default=None)
    if model is None:
        model = client.create_logged_model(experiment_id, NAME, run_id, saved.tags, model_type=KIND)
    if not _ready(model):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "model"
            _write(place, saved, model.model_id)
            client.log_model_artifacts(model.model_id, str(place))
        client.finalize_logged_model(model.model_id, "READY")
    outputs = client.get_run(run_id).outputs
    if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    return model.model_id


def _ready(model: Any) -> bool:
    return str(model.status) == "READY"


def _write(place: Path, saved: SavedModel, model_id: str) -> None:
    import mlflow.pyfunc
    from mlflow.models import Model
    from mlflow.models.signature import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    chosen = {name: value for name, value in saved.sample.items() if type(value) in TYPES}
    params = [ParamSpec(name, TYPES[type(value)], value) for name, value in ({"seed": 0} | chosen).items()]
    warnings.filterwarnings("ignore", message=".*An input example was not provided")
    mlflow.pyfunc.save_model(
        place,
        python_model=str(Path(__file__).with_name("served_model.py")),
        artifacts={"pipeline": str(saved.folder)},
        mlflow_model=Model(model_id=model_id),
        model_config={"sample": saved.sample},
        signature=ModelSignature(inputs=Schema([ColSpec("string")]), params=ParamSchema(params)),
        pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in NEEDED],
    )
