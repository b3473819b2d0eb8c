"""The grid's tracker: what a driver writes down, and that it never waits for MLflow nor fails by it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tracked_grid import assert_curves_equal, make_outcome, make_record, runs_of

from ablations.track import tracking
from ablations.track.journal import journals
from ablations.track.tracking import Tracker
from iris.errors import SettingError

pytestmark = pytest.mark.xdist_group("tracker")  # one worker: the tests start MLflow in processes of their own

HERE = Path(__file__).parent


class Noting:
    """A follower that notes what it is to do, and says that something is missing."""

    made: ClassVar[list[Noting]] = []

    def __init__(self, settings: dict[str, Any], say: Any) -> None:
        self.settings, self.places, self.ended = settings, [], False
        self.made.append(self)

    def follow(self, place: Path) -> None:
        self.places.append(place)

    def end(self) -> list[str]:
        self.ended = True
        return ["something is missing"]


@pytest.fixture
def noting(monkeypatch: pytest.MonkeyPatch) -> list[Noting]:
    monkeypatch.setattr(Noting, "made", [])
    monkeypatch.setattr(tracking, "Follower", Noting)
    return Noting.made


def tracker_of(root: Path, records: list, **options: Any) -> Tracker:
    """A tracker that was told of a grid of these trials."""
    tracker = Tracker("mixers", options.pop("uri", None), root, root / "runs", **options)
    tracker.start(make_outcome([]), records, seeds=[0, 1], baseline={"model.mixer": "grfm"})
    return tracker


def test_what_a_driver_says_is_written_down_before_anything_is_told(tmp_path, noting):
    records = [make_record(tmp_path / "runs", "k1", "grfm"), make_record(tmp_path / "runs", "k2", "grfm", seed=1)]
    uri = "http://me:secret@127.0.0.1:9"
    tracker = tracker_of(tmp_path, records, uri=uri, models_mb=3.0)
    tracker.trial_started("k1")
    tracker.trial_finished(records[0])
    (journal,) = journals(tmp_path / "runs")
    assert [(one.settings, one.places) for one in noting] == [
        ({"uri": uri, "root": str(tmp_path), "models_mb": 3.0}, [journal.path])
    ]
    assert (
        journal.lines["grid"]["params"]["axis.model.mixer"] == "grfm, attention"
        and journal.lines["grid"]["params"]["seeds"] == "0, 1"
    )
    assert [journal.facts(trial)["metrics"]["fid"] for trial in journal.trials] == [12.5, 13.5]
    assert not journal.end and not noting[0].ended
    assert tracker.finish(make_outcome(records), tmp_path / "reports", "FAILED", "refuted") == ["something is missing"]
    assert tracker.finish(None, None, "KILLED") == ["something is missing"]  # it has ended
    assert journal.read().end["report"] == "../reports" and journal.end["status"] == "FAILED" and noting[0].ended
    assert "secret" not in journal.path.read_text() + tracker.command
    assert journal.acquire()  # another driver may write now
    journal.release()


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "KILLED"), (ValueError, "FAILED"), (None, "RUNNING")]
)
def test_how_a_driver_that_did_not_finish_left(tmp_path, noting, error, status):
    record = make_record(tmp_path / "runs", "k1", "attention")
    if error is None:
        tracker_of(tmp_path, [record]).detach()
    else:
        with pytest.raises(error), tracker_of(tmp_path, [record]) as tracker:
            tracker.trial_started("k1")
            raise error
    (journal,) = journals(tmp_path / "runs")
    assert journal.end["status"] == status and noting[0].ended


def test_two_drivers_of_one_grid_write_and_tell_of_it_once(tmp_path, noting):
    records = [make_record(tmp_path / "runs", "k1", "grfm")]
    first, second, third = (tracker_of(tmp_path, records) for _ in range(3))
    for tracker in (first, second, third):
        tracker.trial_started("k1")
    assert len(noting) == 1
    assert second.finish(make_outcome(records), None) == [
        "Another command runs this grid too; that one tells MLflow of it."
    ]
    first.detach()  # its person leaves; the third takes over
    third.trial_finished(records[0])
    assert len(noting) == 2 and third.finish(make_outcome(records), None) == ["something is missing"]
    (journal,) = journals(tmp_path / "runs")
    assert journal.end["status"] == "FINISHED" and journal.facts(journal.trials[0])["state"] == "done"


def test_a_full_or_closed_disk_is_told_and_stops_nothing(tmp_path, noting):
    """The tracking folder cannot be made."""
    said: list[str] = []
    records = [make_record(tmp_path / "runs", "k1", "grfm")]
    (tmp_path / "runs" / "tracking").write_text("in the way")
    tracker = tracker_of(tmp_path, records, warn=said.append)
    tracker.trial_finished(records[0])
    (problem,) = tracker.finish(make_outcome(records), None)
    assert len(said) == 1 and "cannot be written down" in said[0] and "tracking" in said[0]
    assert "cannot be written down" in problem and noting == []


def test_what_cannot_work_is_refused_at_once(tmp_path, monkeypatch):
    with pytest.raises(SettingError, match="track.uri=ftp://x: scheme 'ftp' is unknown; allowed: sqlite"):
        Tracker("mixers", "ftp://x", tmp_path, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////no/where/x.db")
    with pytest.raises(SettingError, match="MLFLOW_TRACKING_URI=.*the folder /no/where does not exist"):
        Tracker("mixers", None, tmp_path, tmp_path)


def test_finish_names_the_allowed_statuses(tmp_path):
    with pytest.raises(ValueError, match="FINISHED, FAILED, KILLED"):
        Tracker("mixers", None, tmp_path, tmp_path).finish(None, None, "DONE")


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
