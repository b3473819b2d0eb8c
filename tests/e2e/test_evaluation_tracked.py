"""``python -m eval`` and MLflow: the numbers, settings and files of an evaluation are a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from eval.__main__ import main
from eval.results import FILES, read_results

SHIPPED = Path(__file__).parents[2] / "iris" / "weights" / "shapes"
WORDS = (f"model={SHIPPED}", "measure=smoke", "measure.what=quality,alignment", "threads=1", "out=ran")


@pytest.mark.filterwarnings("ignore::eval.metrics.fid.RankDeficientWarning")
def test_an_evaluation_is_a_run_with_the_numbers_the_settings_and_the_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*WORDS, "track=sqlite:///store.db"]) == 0
    assert "look at runs: uv run mlflow ui --backend-store-uri sqlite:///" in " ".join(capsys.readouterr().out.split())
    client = MlflowClient(f"sqlite:///{tmp_path / 'store.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("evaluation").experiment_id])
    results = read_results(tmp_path / "ran")
    assert run.info.status == "FINISHED" and run.info.run_name == results.name
    for name, number in results.numbers.items():
        assert run.data.metrics[name] == pytest.approx(number.value), name
    assert run.data.metrics["fid_se/shapes"] == pytest.approx(results.numbers["fid/shapes"].standard_error)
    assert run.data.params["measure.what"] == '["quality", "alignment"]' and run.data.tags["judge"] == "shapes"
    assert run.data.tags["model_fingerprint"] == results.model["fingerprint"]
    files = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert files == {name for name in FILES if (tmp_path / "ran" / name).exists()} and len(files) > 3


def test_a_uri_that_cannot_work_is_refused_before_the_model_is_opened(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*WORDS, "model=nowhere", "track=ftp://me:secret@host"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: track=ftp://me:***@host: scheme 'ftp' is unknown") and not list(tmp_path.iterdir())
