"""What MLflow missed is sent later, by another command, from the runs folder alone: once, wherever the folder lies."""

from __future__ import annotations

import json
import re
import shutil
import socket
from typing import Any

import pytest
from tracked_grid import assert_curves_equal, make_journal, make_outcome, make_record, runs_of, write_metrics

from ablations.__main__ import main
from ablations.track.grid import Grid
from iris.io.follower import MARK

pytestmark = pytest.mark.xdist_group("tracking_sync")  # one worker: what the module's fixtures make is shared


def test_a_grid_whose_server_was_down_is_sent_later_and_once(tmp_path, told, capsys):
    records = [
        make_record(tmp_path / "runs", "k1", "grfm"),
        make_record(tmp_path / "runs", "k2", "attention", state="failed"),
    ]
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "index.html").write_text("<h1>")
    journal = make_journal(tmp_path / "runs", records)
    for record in records:
        journal.ended(record)
    journal.closed(make_outcome(records), tmp_path / "reports", "FAILED", "refuted")
    journal.release()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nothing listens there
        assert main(["sync", f"track.uri=http://me:secret@127.0.0.1:{taken.getsockname()[1]}"]) == 1
    errors = capsys.readouterr().out
    assert "nothing answers there" in errors and "me:***@127" in errors and "secret" not in errors

    # All of it moves to another place, and is sent from there, twice.
    (tmp_path / "moved").mkdir()
    for name in ("runs", "reports"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    for points in (160, 0):
        assert main(["sync", f"runs_dir={tmp_path / 'moved' / 'runs'}"]) == 0
        assert f"2 of 2 trials of {journal.key}, {points} points that were missing" in capsys.readouterr().out
    parent, trials = told.runs()
    assert parent.info.status == "FAILED" and parent.data.tags["verdict"] == "refuted"
    assert parent.data.params["seeds"] == "0, 1" and parent.data.metrics["trials_failed"] == 1
    assert [item.path for item in told.client.list_artifacts(parent.info.run_id, "report")] == ["report/index.html"]
    for record, status in zip(records, ("FINISHED", "FAILED"), strict=True):
        run = trials[record.key]
        assert run.info.status == status and run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert_curves_equal(told.client, run, tmp_path / "moved" / "runs" / "trials" / record.key)
    assert len(told.client.get_metric_history(trials["k1"].info.run_id, "fid")) == 1
    assert [item.path for item in told.client.list_artifacts(trials["k2"].info.run_id, "logs")] == ["logs/log.txt"]


def test_a_new_store_is_built_from_the_runs_folder(tmp_path, told, empty_store, capsys):
    from mlflow import MlflowClient

    records = [make_record(tmp_path / "runs", f"k{seed}", "grfm", seed=seed) for seed in (0, 1)]
    journal = make_journal(tmp_path / "runs", records)
    for record in records:
        journal.ended(record)
    journal.closed(make_outcome(records), None, "FINISHED", "supported")
    told.tell(Grid(journal.path, 50.0))
    shutil.copy(empty_store, tmp_path / "second.db")
    assert main(["sync", "mixers", "track.uri=sqlite:///second.db"]) == 0
    other = MlflowClient(f"sqlite:///{tmp_path / 'second.db'}")
    first, trials = told.runs()
    (second,), rebuilt = runs_of(other)

    def facts(run: Any) -> tuple[Any, ...]:
        tags = {name: value for name, value in run.data.tags.items() if name != "mlflow.parentRunId"}
        return run.info.status, run.data.params, run.data.metrics, tags

    assert facts(first) == facts(second) and second.data.tags["verdict"] == "supported"
    for record in records:
        assert facts(trials[record.key]) == facts(rebuilt[record.key][0])
        assert_curves_equal(other, rebuilt[record.key][0], record.folder)


def test_a_grid_that_is_told_of_now_is_left_alone(tmp_path, told, capsys):
    record = make_record(tmp_path / "runs", "k1", "grfm")
    (record.folder / "result.json").unlink()
    grid = Grid(make_journal(tmp_path / "runs", [record]).path, 50.0)
    grid.lock.acquire()
    assert main(["sync"]) == 0 and "is run now, by a command that sends it itself" in capsys.readouterr().out
    assert told.client.get_experiment_by_name("mixers") is None
    grid.lock.release()  # the command was killed, and what told of it, too
    assert main(["sync"]) == 0 and told.runs()[0].info.status == told.runs()[1]["k1"].info.status == "KILLED"


def test_a_stage_of_training_is_sent_too(tmp_path, told, capsys):
    folder = tmp_path / "runs" / "stages" / "text-1"
    write_metrics(folder, range(1, 4))
    for name, content in ((MARK, {"sent": False}), ("settings.json", {"train": {"steps": 3}}), ("result.json", {})):
        (folder / name).write_text(json.dumps(content))
    assert main(["sync"]) == 0 and "all of text-1, 12 points" in capsys.readouterr().out
    run = told.run("training")
    assert run.info.status == "FINISHED" and run.data.params == {"train.steps": "3", "key": "text-1"}
    assert_curves_equal(told.client, run, folder)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mixer"], "grid 'mixer' was not run in .* .did you mean mixers..; there are: mixers"),
        (["runs_dir=nowhere"], "runs_dir=.*nowhere: there is no such folder"),
        (["track.url=x"], "track.url is not a setting .did you mean track.uri..; allowed: track.models_mb, track.uri"),
        (["track.uri=ftp://x"], "track.uri=ftp://x: scheme 'ftp' is unknown; allowed: sqlite"),
        (["track.models_mb=much"], "track.models_mb=.much. must be float"),
    ],
)
def test_a_command_line_that_cannot_be_used(tmp_path, capsys, words, said):
    make_journal(tmp_path / "runs", [make_record(tmp_path / "runs", "k1", "grfm")]).release()
    assert main(["sync", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(said, error), error
