"""A stage's run in MLflow, in a real sqlite store: what arrives, once, whatever happens to store, stage and file."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablations.track import stage_tracking as tracking
from ablations.track.curves import Curves, Place, metric_points, read_rows
from ablations.track.location import SCHEMES, Location
from ablations.track.stage_tracking import Tracker, unsent
from iris.errors import SettingError
from iris.stages.base import save_grid

pytestmark = pytest.mark.xdist_group("stage_tracking")  # one worker: what the module's fixtures make is shared


def row_of(step: int, begun: float = 100.0) -> dict[str, Any]:
    return {
        "step": step,
        "steps": 9,
        "time": begun + step,
        "loss": 1.0 / step,
        "images_per_s": begun,
        "band_psnr/cA": 20.0,
    }


def write_rows(folder: Path, *rows: dict[str, Any], tail: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / ".fresh"
    fresh.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    fresh.replace(folder / "metrics.jsonl")


def points_of(client: Any, run_id: str, name: str) -> list[tuple[int, float, int]]:
    return [(p.step, p.value, p.timestamp) for p in client.get_metric_history(run_id, name)]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("PATIENCE_SECONDS", "END_SECONDS"):  # a busy machine decides nothing
        monkeypatch.setattr(tracking, name, 3600.0)


# -- a stage's run --------------------------------------------------------------------------------------------------


def test_a_run_holds_params_curves_and_pictures_and_is_gone_on_with(tmp_path):
    from mlflow import MlflowClient

    folder, problems = tmp_path / "text-1", []
    write_rows(folder, row_of(1), row_of(2), tail='{"step": 3, "ti')
    stopped = Tracker(folder, {"train.steps": 3}, problems.append, root=tmp_path)
    with pytest.raises(KeyboardInterrupt), stopped as tracker:
        while tracker._run is None:  # an interrupt waits for a slow store, but not for ever
            time.sleep(0.05)
        raise KeyboardInterrupt
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("training").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "KILLED"

    # Step 2 again: it was behind the checkpoint. Its pace is another one.
    write_rows(folder, row_of(1), row_of(2, 500.0), row_of(3, 500.0))
    save_grid(folder / "pictures" / "samples.png", np.zeros((1, 8, 8, 3), np.uint8), 1)
    with Tracker(folder, {"train.steps": 3, "new": 1}, problems.append, root=tmp_path):
        assert unsent(folder)
    (run,) = client.search_runs([experiment])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "text-1")
    assert run.data.params == {"train.steps": "3", "new": "1"}
    assert points_of(client, run.info.run_id, "loss") == [(1, 1.0, 101000), (2, 0.5, 102000), (3, 1 / 3, 503000)]
    paces = points_of(client, run.info.run_id, "images_per_s")
    assert paces == [(1, 100.0, 101000), (2, 100.0, 102000), (3, 500.0, 503000)]
    assert [file.path for file in client.list_artifacts(run.info.run_id, "pictures")] == ["pictures/samples.png"]
    assert problems == [] and not unsent(folder)


def test_a_store_that_is_down_is_told_once_and_gets_everything_later(tmp_path):
    from mlflow import MlflowClient

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nothing listens there
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}"
        folder, problems = tmp_path / "text-1", []
        write_rows(folder)
        with Tracker(folder, {}, problems.append, uri=dead, root=tmp_path) as tracker:
            for step in range(1, 5):
                write_rows(folder, *map(row_of, range(1, step + 1)))
                tracker.news()
    assert len(problems) == 1 and dead in problems[0] and "nothing answers there" in problems[0]
    assert "training goes on" in problems[0] and unsent(folder)
    with Tracker(folder, {}, problems.append, root=tmp_path):
        pass
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("training").experiment_id])
    assert [step for step, *_ in points_of(client, run.info.run_id, "loss")] == [1, 2, 3, 4] and not unsent(folder)


def test_a_folder_that_no_tracker_saw_misses_nothing(tmp_path):
    assert not unsent(tmp_path)


# -- curves ---------------------------------------------------------------------------------------------------------


class LostAnswers:
    """A client whose chosen calls are carried out, and then fail."""

    def __init__(self, client: Any) -> None:
        self.client, self.lose, self.calls = client, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def log_batch(self, *args: Any, **kwargs: Any) -> None:
        self.client.log_batch(*args, **kwargs)
        self.calls += 1
        if self.lose:
            self.lose -= 1
            raise ConnectionError("the answer was lost")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    return Location.of(f"sqlite:///{tmp_path_factory.mktemp('store') / 'a.db'}", Path("/")).connect("curves")


def test_a_call_whose_answer_was_lost_is_not_repeated(store, tmp_path):
    client, experiment = LostAnswers(store[0]), store[1]
    run = client.create_run(experiment).info.run_id
    curves = Curves(tmp_path / "metrics.jsonl", fresh=True)
    write_rows(tmp_path, row_of(1), row_of(2))
    client.lose = 1
    with pytest.raises(ConnectionError):
        curves.send(client, run)
    # Before the next try the training is cut back to step 1 and writes step 2 at another time.
    write_rows(tmp_path, row_of(1), row_of(2, 500.0), row_of(3, 500.0) | {"validation": float("nan")})
    assert curves.send(client, run) == 4 and curves.step == 3
    assert points_of(client, run, "images_per_s") == [(1, 100.0, 101000), (2, 100.0, 102000), (3, 500.0, 503000)]
    ((_, value, _),) = points_of(client, run, "validation")
    assert value != value
    assert curves.send(client, run) == 0 and curves.names() == {"loss", "images_per_s", "band_psnr/cA", "validation"}


def test_points_go_in_few_calls_of_whole_rows(store, tmp_path):
    client, experiment = LostAnswers(store[0]), store[1]
    run = client.create_run(experiment).info.run_id
    write_rows(tmp_path, *(row_of(step) for step in range(1, 401)))
    assert Curves(tmp_path / "metrics.jsonl", fresh=True).send(client, run) == 1200
    assert client.calls == 2  # of 333 rows each, not of 1000 points: a row is there whole or not at all
    assert [step for step, *_ in points_of(client, run, "loss")] == list(range(1, 401))


def test_a_row_of_more_points_than_a_call_takes(store, tmp_path):
    client, experiment = LostAnswers(store[0]), store[1]
    run = client.create_run(experiment).info.run_id
    write_rows(tmp_path, {"step": 1, "time": 1.0} | {f"layer {n}": float(n) for n in range(1500)}, row_of(2))
    assert Curves(tmp_path / "metrics.jsonl", fresh=True).send(client, run) == 1503 and client.calls == 2
    assert points_of(client, run, "layer 1499") == [(1, 1499.0, 1000)]


def test_rows_are_read_from_where_reading_stopped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert read_rows(file) == ([], Place())
    write_rows(tmp_path, row_of(1), row_of(2), tail='{"step": 3, "time": 1')
    rows, place = read_rows(file)
    assert [row["step"] for row in rows] == [1, 2]
    with file.open("a") as stream:
        stream.write('03}\nnoise\n{"step": 2, "time": 1}\n[3]\n{"step": 4, "time": 104}\n')
    rows, place = read_rows(file, place)
    assert [row["step"] for row in rows] == [3, 4]
    assert read_rows(file, place) == ([], place)
    # Replaced by something shorter, and by something longer with the same steps.
    for rows in ([row_of(1)], [row_of(step, 777.0) for step in range(1, 9)]):
        write_rows(tmp_path, *rows)
        assert read_rows(file, place)[0] == rows


def test_points_of_a_row():
    row = {"step": 4, "steps": 9, "time": 2.5, "loss": 0.5, "gap (%)": 1, "note": "x", "on": True}
    assert metric_points(row) == [("loss", 0.5, 2500, 4), ("gap ___", 1.0, 2500, 4)]


# -- tracking URIs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("ftp://somewhere/x", "scheme 'ftp' is unknown; allowed: sqlite, postgresql"),
        ("htp://somewhere", "allowed: sqlite"),
        ("http://", "no host; expected http://host:port"),
        ("http://host:port", "Port could not be cast"),
        ("mlruns", "MLflow no longer writes runs to folders; allowed: sqlite:///mlflow.db"),
        ("file:///tmp/x", "no longer writes runs to folders"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("sqlite:////no/such/folder/x.db", "/no/such/folder does not exist"),
        ("sqlite:////tmp", "/tmp is a folder"),
        ("postgresql+nothing://u:secret@h/x", "postgresql.nothing"),
        ("mysql://u:secret@h/x", "package MySQLdb is not installed"),
    ],
)
def test_a_uri_that_cannot_work_is_refused_with_the_setting(uri, said, tmp_path):
    with pytest.raises(SettingError) as caught:
        Location.of(uri, tmp_path).check()
    message = str(caught.value)
    assert message.startswith("track.uri=") and said in message and "secret" not in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(SettingError, match="closed/x.db cannot be written to"):
        Location.of("sqlite:///closed/x.db", tmp_path).check()


def test_what_can_work_is_taken_as_it_is(tmp_path, monkeypatch):
    for uri in ("http://127.0.0.1:9", "https://user:x@h/prefix", "databricks", f"sqlite:///{tmp_path}/new.db"):
        assert Location.of(uri, tmp_path).check().uri == uri
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert Location.of("file:///x", tmp_path).check().uri == "file:///x"


def test_the_setting_comes_before_the_environment_and_both_before_the_default(tmp_path, monkeypatch):
    default = Location.of(None, tmp_path)
    assert (default.uri, default.is_default) == (f"sqlite:///{tmp_path}/mlflow.db", True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://x")
    with pytest.raises(SettingError, match="MLFLOW_TRACKING_URI=gopher://x"):
        Location.of(None, tmp_path).check()
    assert Location.of("sqlite:///mlflow.db", tmp_path).check() == default  # relative: a file of the root
    assert Location.of("https://me:secret@host/x", tmp_path).shown == "https://me:***@host/x"


def test_the_schemes_are_mlflows():
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry

    theirs = {name for name in _tracking_store_registry._registry if name not in ("", "file", "databricks-uc", "uc")}
    assert theirs == set(SCHEMES)


def test_the_command_refuses_a_uri_before_it_computes(tmp_path, monkeypatch, capsys):
    from iris.training.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://x")
    assert main(["stage=vae", "scale=smoke", f"runs_dir={tmp_path}/runs"]) == 2
    assert "error: MLFLOW_TRACKING_URI=gopher://x: scheme 'gopher' is unknown" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_dead_store_is_not_waited_for(tmp_path, monkeypatch):
    """One that takes a connection and never answers: the end of a stage gives up, and the mark stays."""
    monkeypatch.setattr(tracking, "PATIENCE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        folder = tmp_path / "vae-1"
        write_rows(folder, row_of(1))
        with Tracker(folder, {}, lambda text: None, uri=f"http://127.0.0.1:{silent.getsockname()[1]}", root=tmp_path):
            pass
    assert unsent(folder)
