"""What MLflow missed is sent later, by another command, from the runs folder alone: once, wherever the folder lies."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tracked_grid import append_metrics, assert_curves_equal, make_outcome, make_record, runs_of, write_metrics

from ablations.track import stage_tracking, tracking
from ablations.track.journal import Journal, PlannedTrial, journals
from ablations.track.sync import main
from ablations.track.tracking import Tracker

pytestmark = pytest.mark.xdist_group("tracking_sync")  # one worker: what the module's fixtures make is shared

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("PATIENCE_SECONDS", "END_SECONDS"):  # a busy machine decides nothing
        monkeypatch.setattr(tracking, name, 3600.0)
    monkeypatch.setattr(stage_tracking, "END_SECONDS", 3600.0)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sqlite store with its tables, which take seconds to make."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> Any:
    """A client of a new store at mlflow.db of the current folder."""
    from mlflow import MlflowClient

    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")


def journal_of(runs: Path, records: list, **others: Any) -> Journal:
    """The journal of a driver that planned these trials."""
    journal = Journal.of(runs, "mixers", [record.key for record in records])
    assert journal.acquire()
    journal.plan(make_outcome([], **others), [PlannedTrial.of(record) for record in records], {"seeds": "0"})
    return journal


def test_a_grid_whose_server_was_down_is_sent_later_and_once(tmp_path, store, capsys):
    records = [
        make_record(tmp_path / "runs", "k1", "grfm"),
        make_record(tmp_path / "runs", "k2", "attention", state="failed"),
    ]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nothing listens there
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}"
        tracker = Tracker("mixers", dead, tmp_path, tmp_path / "runs", lambda text: None)
        tracker.start(make_outcome([]), records, [0], {"model.mixer": "grfm"})
        for record in records:
            tracker.trial_finished(record)
        (tmp_path / "reports").mkdir()
        (tmp_path / "reports" / "index.html").write_text("<h1>")
        assert (
            "ablations.track.sync"
            in tracker.finish(make_outcome(records), tmp_path / "reports", "FAILED", "refuted")[0]
        )
        assert main([f"track.uri={dead}"]) == 1 and "nothing answers there" in capsys.readouterr().err

    # All of it moves to another place, and is sent from there, twice.
    (tmp_path / "moved").mkdir()
    for name in ("runs", "reports"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    for points in (160, 0):
        assert main([f"runs_dir={tmp_path / 'moved' / 'runs'}"]) == 0
        assert f"2 trials, {points} points" in capsys.readouterr().out
    (parent,), trials = runs_of(store)
    assert parent.info.status == "FAILED" and parent.data.tags["verdict"] == "refuted"
    assert parent.data.params["seeds"] == "0" and parent.data.metrics["trials_failed"] == 1
    assert [item.path for item in store.list_artifacts(parent.info.run_id, "report")] == ["report/index.html"]
    for record, status in zip(records, ("FINISHED", "FAILED"), strict=True):
        (run,) = trials[record.key]
        assert run.info.status == status and run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert_curves_equal(store, run, tmp_path / "moved" / "runs" / "trials" / record.key)
    assert len(store.get_metric_history(trials["k1"][0].info.run_id, "fid")) == 1
    assert [item.path for item in store.list_artifacts(trials["k2"][0].info.run_id, "logs")] == ["logs/log.txt"]


def test_a_new_store_is_built_from_the_runs_folder(tmp_path, store, empty_store, capsys):
    from mlflow import MlflowClient

    records = [make_record(tmp_path / "runs", f"k{seed}", "grfm", seed=seed) for seed in (0, 1)]
    tracker = Tracker("mixers", None, tmp_path, tmp_path / "runs")
    tracker.start(make_outcome([]), records, [0, 1], {})
    for record in records:
        tracker.trial_finished(record)
    assert tracker.finish(make_outcome(records), None, verdict="supported") == []
    (journal,) = journals(tmp_path / "runs")
    assert journal.has_sent(f"sqlite:///{tmp_path / 'mlflow.db'}") and not journal.has_sent("sqlite:///other.db")

    shutil.copy(empty_store, tmp_path / "second.db")
    assert main(["grid=mixers", "track.uri=sqlite:///second.db"]) == 0
    other = MlflowClient(f"sqlite:///{tmp_path / 'second.db'}")
    (first,), trials = runs_of(store)
    (second,), rebuilt = runs_of(other)

    def facts(run: Any) -> tuple[Any, ...]:
        own = {"mlflow.parentRunId", "host", "pid", "cached"}
        tags = {name: value for name, value in run.data.tags.items() if name not in own}
        measured = {name: value for name, value in run.data.metrics.items() if name != "trials_cached"}
        return run.info.status, run.data.params, measured, tags

    assert facts(first)[1:3] == facts(second)[1:3] and second.data.tags["verdict"] == "supported"
    for record in records:
        assert facts(trials[record.key][0]) == facts(rebuilt[record.key][0])
        assert_curves_equal(other, rebuilt[record.key][0], record.folder)


def test_what_a_killed_driver_left(tmp_path, store, capsys):
    """It knew of no end: one trial had finished, one was training, one was waiting; its last line is half there."""
    runs = tmp_path / "runs"
    records = [make_record(runs, key, "grfm") for key in ("k1", "k2", "k3")]
    (records[1].folder / "result.json").unlink()
    shutil.rmtree(records[2].folder)
    journal = journal_of(runs, records)
    journal.release()
    with journal.path.open("a") as file:
        file.write('{"kind": "trial k1", "state": "do')
    assert main([]) == 0
    (parent,), trials = runs_of(store)
    assert parent.info.status == "KILLED" and trials.keys() == {"k1", "k2"}
    assert [trials[key][0].info.status for key in ("k1", "k2")] == ["FINISHED", "KILLED"]
    assert trials["k1"][0].data.metrics["fid"] == 12.5
    # The grid goes on, and ends.
    append_metrics(records[1].folder, range(420, 440, 20))
    tracker = Tracker("mixers", None, tmp_path, runs)
    tracker.start(make_outcome([]), records, [0], {})
    tracker.trial_started("k2")
    for record in records[:2]:
        tracker.trial_finished(record)
    assert tracker.finish(make_outcome(records[:2]), None) == []
    (parent,), trials = runs_of(store)
    assert parent.info.status == "FINISHED" and [run.info.status for run in trials["k2"]] == ["FINISHED"]
    assert_curves_equal(store, trials["k2"][0], records[1].folder)


def test_two_drivers_of_one_grid_tell_of_it_once(tmp_path, store, capsys):
    records = [make_record(tmp_path / "runs", "k1", "grfm")]
    first, second = (Tracker("mixers", None, tmp_path, tmp_path / "runs", lambda text: None) for _ in range(2))
    for tracker in (first, second):
        tracker.start(make_outcome([]), records, [0], {})
        tracker.trial_started("k1")
    assert main([]) == 0 and "is run now" in capsys.readouterr().out
    second.trial_finished(records[0])
    problems = second.finish(make_outcome(records), None)
    assert problems == ["Another command runs this grid too; that one tells MLflow of it."]
    third = Tracker("mixers", None, tmp_path, tmp_path / "runs", lambda text: None)
    third.start(make_outcome([]), records, [0], {})
    third.trial_finished(records[0])
    first.detach()  # its person leaves; the third takes over
    assert third.finish(make_outcome(records), None) == []
    (parent,), trials = runs_of(store)
    assert parent.info.status == "FINISHED" and [run.info.status for run in trials["k1"]] == ["FINISHED"]
    assert_curves_equal(store, trials["k1"][0], records[0].folder)


def test_drivers_that_meet_on_a_missing_sqlite_file(tmp_path):
    """Without a lock they lose runs, and may leave a store that nobody can use."""
    from mlflow import MlflowClient

    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parents[2])])}
    grids = {"mixers": "a1,a2", "depth": "b1,b2"}
    drivers = [
        subprocess.Popen(
            [sys.executable, HERE.parent / "track_grid.py", grid, "", tmp_path, keys, tmp_path / "go"],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for grid, keys in grids.items()
    ]
    (tmp_path / "go").touch()
    for driver in drivers:
        said, errors = driver.communicate(timeout=300)
        assert (driver.returncode, said) == (0, "[]\n"), errors
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    for grid, keys in grids.items():
        (parent,), trials = runs_of(client, grid)
        assert parent.info.status == "FINISHED" and sorted(trials) == keys.split(",")
        for key, (run,) in trials.items():
            assert_curves_equal(client, run, tmp_path / "runs" / "trials" / key)


def test_a_finished_stage_of_training_is_sent_too(tmp_path, store, capsys):
    folder = tmp_path / "runs" / "stages" / "text-1"
    write_metrics(folder, range(1, 4))
    for name, content in ((stage_tracking.MARK, {"settings": {"train.steps": 3}, "sent": False}), ("result.json", {})):
        (folder / name).write_text(json.dumps(content))
    assert main([]) == 0 and "text-1: a stage of training" in capsys.readouterr().out
    assert not stage_tracking.unsent(folder)
    (run,) = store.search_runs([store.get_experiment_by_name("training").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params == {"train.steps": "3"}
    assert_curves_equal(store, run, folder)


def test_a_journal_grows_only_by_what_is_new(tmp_path):
    records = [make_record(tmp_path / "runs", "k1", "grfm"), make_record(tmp_path / "runs", "k2", "grfm", seed=1)]
    journal = journal_of(tmp_path / "runs", records)
    journal.ended(records[0])
    journal.closed(make_outcome(records), tmp_path / "reports", "FINISHED", "supported")
    journal.sent("sqlite:///a.db")
    journal.release()
    before = journal.path.read_text()
    again = journal_of(tmp_path / "runs", records, wall_seconds=99.0)
    assert again.path == journal.path and again.has_sent("sqlite:///a.db")
    again.ended(make_record(tmp_path / "runs", "k1", "grfm", cached=True))
    again.closed(make_outcome(records, wall_seconds=99.0), tmp_path / "reports", "FINISHED", "supported")
    assert again.path.read_text() == before
    again.ended(make_record(tmp_path / "runs", "k1", "grfm", metrics={"fid": float("nan")}))
    again.ended(make_record(tmp_path / "runs", "k1", "grfm", metrics={"fid": float("nan")}))
    assert not again.has_sent("sqlite:///a.db")
    assert again.path.read_text().count('"kind": "trial k1"') == 2 and again.path.read_text().startswith(before)
    again.release()


def test_a_full_or_closed_disk_is_told_and_stops_nothing(tmp_path, store):
    """The tracking folder cannot be made; MLflow is told all the same."""
    said: list[str] = []
    records = [make_record(tmp_path / "runs", "k1", "grfm")]
    (tmp_path / "runs" / "tracking").write_text("in the way")
    tracker = Tracker("mixers", None, tmp_path, tmp_path / "runs", said.append)
    tracker.start(make_outcome([]), records, [0], {})
    tracker.trial_finished(records[0])
    assert tracker.finish(make_outcome(records), None) == []
    assert len(said) == 1 and "cannot be written down" in said[0] and "tracking" in said[0]
    assert [run.info.status for run in runs_of(store)[1]["k1"]] == ["FINISHED"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mixer"], "grid 'mixer' was not run in .* .did you mean mixers..; there are: mixers"),
        (["runs_dir=nowhere"], "runs_dir=.*nowhere: there is no such folder"),
        (["track.url=x"], "track.url is no setting .* .did you mean track.uri..; allowed: grid, runs_dir, track.uri"),
        (["track.uri=ftp://x"], "track.uri=ftp://x: scheme 'ftp' is unknown; allowed: sqlite"),
        (["track.models_mb=much"], "track.models_mb=much must be a number of at least 0"),
    ],
)
def test_a_command_line_that_cannot_be_used(tmp_path, capsys, words, said):
    journal_of(tmp_path / "runs", [make_record(tmp_path / "runs", "k1", "grfm")]).release()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(said, error), error
