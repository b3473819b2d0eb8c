"""A stage of training and an evaluation in a real sqlite store, told from their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tracked_grid import assert_curves_equal, row_of, write_metrics

from ablations.track.work import Evaluation, Stage
from iris.io.follower import MARK
from iris.io.pictures import save_grid

pytestmark = pytest.mark.xdist_group("tracking_work")  # one worker: what the module's fixtures make is shared


def test_a_stages_run_holds_params_curves_and_pictures_and_is_gone_on_with(tmp_path, told):
    folder = tmp_path / "runs" / "stages" / "text-1"
    write_metrics(folder, range(1, 3), tail='{"step": 3, "ti')
    (folder / "settings.json").write_text(json.dumps({"train": {"steps": 3}}))
    (folder / MARK).write_text(json.dumps({"command_folder": "/somewhere", "sent": False}))
    stage = Stage(folder)
    for alive, status in ((True, "RUNNING"), (False, "KILLED")):
        told.tell(stage, alive)
        assert told.run("training").info.status == status

    # Step 2 again: it was behind the checkpoint. Its pace is another one.
    write_metrics(folder, range(1, 4), 2_000_000_400.0)
    save_grid(folder / "pictures" / "samples.png", np.zeros((1, 8, 8, 3), np.uint8), 1)
    stage, store = Stage(folder), told.store()
    stage.sync(store, alive=True)
    save_grid(folder / "pictures" / "samples.png", np.ones((1, 8, 8, 3), np.uint8), 1)
    assert json.loads((folder / MARK).read_text())["sent"] is False
    (folder / "result.json").write_text("{}")
    stage.sync(store, alive=True)
    run = told.run("training")
    assert (run.info.status, run.info.run_name) == ("FINISHED", "text-1")
    assert run.data.params == {"train.steps": "3", "command_folder": "/somewhere", "key": "text-1"}
    points = told.client.get_metric_history(run.info.run_id, "images_per_s")
    assert [(point.step, point.value) for point in points] == [(1, 500.0), (2, 500.0), (3, 900.0)]
    place = Path(run.info.artifact_uri.removeprefix("file://"), "pictures", "samples.png")
    assert place.read_bytes() == (folder / "pictures" / "samples.png").read_bytes()
    assert json.loads((folder / MARK).read_text()) == {"command_folder": "/somewhere", "sent": True}


def test_a_stage_that_failed(tmp_path, told):
    folder = tmp_path / "runs" / "stages" / "vae-1"
    write_metrics(folder, range(1, 3))
    (folder / "error.json").write_text("{}")
    told.tell(Stage(folder), alive=True)
    assert told.run("training").info.status == "FAILED"
    assert_curves_equal(told.client, told.run("training"), folder)


def test_an_answer_that_was_lost_costs_no_point_and_doubles_none(tmp_path, told):
    """The call was carried out; before the next one the training is cut back and writes step 2 at another time."""
    folder, store = tmp_path / "runs" / "stages" / "vae-1", told.store()
    write_metrics(folder, range(1, 3))
    stage = Stage(folder)
    stage.sync(store, alive=True)
    write_metrics(folder, range(1, 4))
    real = store._client.log_batch

    def log_batch(*args: Any) -> None:
        real(*args)
        raise ConnectionError("the answer was lost")

    store._client.log_batch = log_batch
    with pytest.raises(ConnectionError):
        stage.sync(store, alive=True)
    assert not stage.told
    del store._client.log_batch
    rows = [row_of(step) for step in range(1, 3)] + [row_of(step, 2_000_000_400.0) for step in range(3, 6)]
    rows[4]["validation"] = float("nan")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage.sync(store, alive=True)
    run = told.run("training").info.run_id
    points = told.client.get_metric_history(run, "images_per_s")
    assert [(p.step, p.value) for p in points] == [(1, 500.0), (2, 500.0), (3, 500.0), (4, 900.0), (5, 900.0)]
    (validation,) = told.client.get_metric_history(run, "validation")
    assert validation.value != validation.value and validation.step == 5


def test_an_evaluation_is_one_run_of_its_results(tmp_path, told):
    folder = tmp_path / "results"
    folder.mkdir()
    number = {"value": 12.5, "standard_error": 0.5, "low": 11.5, "high": None}
    results = {
        "name": "shapes",
        "model": {"kind": "iris", "path": "m", "fingerprint": "f"},
        "data": {"name": "shapes", "fingerprint": "d"},
        "judge": {"name": "shapes", "sha256": "j"},
        "numbers": {"fid/shapes": number, "latency_ms": number | {"standard_error": None}},
        "seconds": {"quality": 3.0},
        "settings": {"measure.samples": 64, "track": None},
        "hardware": {"cores": 2},
        "command": "python -m eval model=m",
        "created": "2026-01-01T00:00:00+00:00",
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "report.md").write_text("a report")
    (folder / "other.bin").write_text("not of the results")
    for _ in range(2):
        assert told.tell(Evaluation(folder)).told
    run = told.run("evaluation")
    values = {"fid": 12.5, "fid_se": 0.5, "fid_low": 11.5}
    expected = {f"{name}/shapes": value for name, value in values.items()}
    assert run.data.metrics == expected | {"latency_ms": 12.5, "latency_ms_low": 11.5, "seconds/quality": 3.0}
    assert run.data.params == {"measure.samples": "64", "track": "None"} and run.data.tags["judge_sha256"] == "j"
    assert {item.path for item in told.client.list_artifacts(run.info.run_id)} == {"results.json", "report.md"}
    (folder / "results.json").write_text(json.dumps(results | {"created": "2026-01-02T00:00:00+00:00"}))
    told.tell(Evaluation(folder))
    assert len(told.client.search_runs([run.info.experiment_id])) == 2
