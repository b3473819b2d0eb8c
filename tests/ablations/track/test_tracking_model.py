"""A finished trial's model in MLflow: found by its run, loaded by MLflow's own call, and making the trial's images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tracked_grid import make_journal, make_outcome, make_record, runs_of, tell

from ablations.track import mlflow_model
from ablations.track.grid import Grid
from ablations.track.mlflow_model import SavedModel, log_model
from iris.diffusion.sampling import SamplingSettings
from iris.errors import SettingError
from iris.latents import build_latent
from iris.model import TextToLatent
from iris.nn.generator import Generator, GeneratorConfig
from iris.pipeline import IrisPipeline
from iris.randomness import initialise
from iris.text import Vocabulary, WordEncoder

pytestmark = pytest.mark.xdist_group("tracking_model")  # one worker: what the module's fixtures make is shared

CAPTIONS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory):
    """A trial with weights and one whose weights are too large, both finished; and the client."""
    root = tmp_path_factory.mktemp("repo")
    records = [make_record(root / "runs", "k1", "grfm"), make_record(root / "runs", "k2", "attention")]
    encoder = WordEncoder(Vocabulary.from_captions(CAPTIONS, 6), 12, layers=1)
    config = GeneratorConfig(
        channels=12,
        text_width=12,
        dim=16,
        heads=2,
        prelude=1,
        core=1,
        coda=1,
        iterations=2,
        ffn_ratio=2.0,
        mixer="grfm",
    )
    model = initialise(TextToLatent(encoder, Generator(config)), 0)
    with torch.no_grad():
        for part in model.parameters():  # the output layer starts at zero
            part.add_(0.05)
    pipeline = IrisPipeline(model, build_latent("haar", levels=1), "haar", {"levels": 1}, 8)
    for record in records:
        pipeline.save(record.folder / "model")
    (records[1].folder / "model" / "more.bin").write_bytes(b"0" * 3_000_000)
    journal = make_journal(root / "runs", records)
    for record in records:
        journal.ended(record)
    journal.closed(make_outcome(records), None, "FINISHED", None)
    assert tell(Grid(journal.path, models_mb=2.0), f"sqlite:///{root / 'mlflow.db'}").told
    from mlflow import MlflowClient

    return root, MlflowClient(f"sqlite:///{root / 'mlflow.db'}"), pipeline


def models_of(client: Any, run: Any) -> list[Any]:
    mine = f"source_run_id = '{run.info.run_id}'"
    return list(client.search_logged_models([run.info.experiment_id], filter_string=mine))


def test_a_model_loads_back_and_makes_the_same_images(logged, monkeypatch):
    import mlflow

    root, client, pipeline = logged
    (run,) = runs_of(client)[1]["k1"]
    (model,) = models_of(client, run)
    assert (model.name, str(model.status), model.model_type) == ("model", "READY", "text-to-image")
    assert model.tags["key"] == "k1"
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{root / 'mlflow.db'}")
    try:
        loaded = mlflow.pyfunc.load_model(f"models:/{model.model_id}")
    finally:
        mlflow.set_tracking_uri(before)
    images = loaded.predict(CAPTIONS)
    assert images.shape == (2, 8, 8, 3) and images.std() > 0
    assert (images == pipeline.generate(CAPTIONS, SamplingSettings(2, guidance=3.0)).numpy()).all()
    others = loaded.predict(["a red circle"], params={"steps": 5, "seed": 3})
    assert (others == pipeline.generate(["a red circle"], SamplingSettings(5, guidance=3.0), seed=3).numpy()).all()


def test_a_student_is_served_as_it_says(logged, tmp_path):
    from ablations.track.served_model import TextToImage

    own = SamplingSettings(2, "stochastic", shift=2.0)
    student = IrisPipeline(*logged[2].parts[:5], own, 2.5)
    student.save(tmp_path)
    served, context = TextToImage(), SimpleNamespace(artifacts={"pipeline": str(tmp_path)}, model_config={"sample": {}})
    served.load_context(context)
    assert (served.predict(context, CAPTIONS) == student.generate(CAPTIONS, own).numpy()).all()
    with pytest.raises(SettingError, match="guidance 2.5 distilled"):
        served.predict(context, CAPTIONS, {"guidance": 2.0})


def test_a_model_over_the_limit_is_left_out(logged):
    _, client, _ = logged
    (run,) = runs_of(client)[1]["k2"]
    assert run.info.status == "FINISHED" and models_of(client, run) == []


def test_logging_again_changes_nothing_and_goes_on_where_it_stopped(logged, monkeypatch, tmp_path):
    _root, client, pipeline = logged
    (run,) = runs_of(client)[1]["k2"]
    place = tmp_path / "pipeline"
    pipeline.save(place)
    saved = SavedModel(place, {"steps": 2}, {"key": "k2"})
    assert 0 < saved.megabytes < 1

    def fail(*args: Any) -> None:
        raise ConnectionError("the server went away")

    arguments = client, run.info.experiment_id, run.info.run_id, saved
    with monkeypatch.context() as broken, pytest.raises(ConnectionError):
        broken.setattr(mlflow_model, "_write", fail)
        log_model(*arguments)
    assert [str(model.status) for model in models_of(client, run)] == ["PENDING"]
    ids = {log_model(*arguments) for _ in range(2)}
    assert {model.model_id for model in models_of(client, run)} == ids and len(ids) == 1
    assert len(client.get_run(run.info.run_id).outputs.model_outputs) == 1


def test_nothing_of_a_model_is_pickled(logged):
    _root, client, _ = logged
    (model,) = models_of(client, runs_of(client)[1]["k1"][0])
    place = Path(model.artifact_location.removeprefix("file://"))
    files = {path.name for path in place.rglob("*") if path.is_file()}
    assert {"MLmodel", "served_model.py", "model.safetensors", "config.json"} <= files
    assert not [name for name in files if name.endswith((".pkl", ".pt", ".bin"))] and "uv.lock" not in files
