"""Tracker against a real sqlite store, read back through MLflow's own client."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from tracked_grid import assert_curves_equal, make_outcome, make_record, runs_of, write_metrics

from ablations.track import tracking
from ablations.track.mlflow_store import GridStore
from ablations.track.tracking import Tracker
from ablations.track.tracking_payload import contact_sheet, data_inputs, dataset_fields, flatten
from iris.errors import SettingError

pytestmark = pytest.mark.xdist_group("tracking")  # one worker: what the module's fixtures make is shared


def tracker_of(root: Path, records: list, **options) -> Tracker:
    """A tracker that was told of a grid of these trials."""
    tracker = Tracker("mixers", options.pop("uri", None), root, root / "runs", **options)
    tracker.start(make_outcome([]), records, seeds=[0, 1], baseline={"model.mixer": "grfm"})
    return tracker


@pytest.fixture(scope="module")
def client_of():
    from mlflow import MlflowClient

    return lambda root: MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")


@pytest.fixture(autouse=True, scope="module")
def surroundings():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name in ("PATIENCE_SECONDS", "END_SECONDS"):  # a busy machine decides nothing
            patch.setattr(tracking, name, 3600.0)
        yield


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, client_of):
    """One invocation: a trial done, one failed, one cached, with the report; and the runs it left."""
    root = tmp_path_factory.mktemp("repo")
    done = make_record(root / "runs", "k1", "grfm")
    failed = make_record(root / "runs", "k2", "attention", state="failed")
    cached = make_record(root / "runs", "k3", "grfm", cached=True, seed=1)
    records = [done, failed, cached]
    report = root / "reports" / "mixers"
    report.mkdir(parents=True)
    (report / "index.html").write_text("<h1>verdict</h1>")
    tracker = tracker_of(root, records)
    for record in (done, failed):
        tracker.trial_started(record.key)
        tracker.sync(record.key)
    for record in records:
        tracker.trial_finished(record)
    problems = tracker.finish(make_outcome(records), report, "FAILED", verdict="supported")
    client = client_of(root)
    (parent,), trials = runs_of(client)
    return {
        "root": root,
        "problems": problems,
        "client": client,
        "tracker": tracker,
        "records": records,
        "report": report,
        "parent": parent,
        "trials": {key: run for key, (run,) in trials.items()},
    }


def test_parent_run(tracked) -> None:
    parent, client = tracked["parent"], tracked["client"]
    assert tracked["problems"] == [] and parent.info.run_id == tracked["tracker"].parent_id
    assert parent.info.status == "FAILED" and parent.data.tags["verdict"] == "supported"
    assert parent.data.tags["question"] == "Does GRFM earn its pathways?"
    assert parent.data.tags["git_commit"] == "1234567+changes" and parent.data.tags["hardware.cores"] == "2"
    assert parent.data.params["axis.model.mixer"] == "grfm, attention" and parent.data.params["seeds"] == "0, 1"
    assert parent.data.metrics["trials"] == 3 and parent.data.metrics["trials_failed"] == 1
    assert parent.data.metrics["summary/fid grfm"] == 13.0, "mean over seeds"
    assert [item.path for item in client.list_artifacts(parent.info.run_id, "report")] == ["report/index.html"]


def test_child_runs(tracked) -> None:
    parent, trials = tracked["parent"], tracked["trials"]
    assert {run.data.tags["mlflow.parentRunId"] for run in trials.values()} == {parent.info.run_id}
    assert [trials[key].info.status for key in ("k1", "k2", "k3")] == ["FINISHED", "FAILED", "FINISHED"]
    assert trials["k1"].info.run_name == "grfm, seed 0"
    params = trials["k1"].data.params
    assert params["model.mixer"] == "grfm" and params["many.setting149"] == "149" and len(params["long"]) == 6000
    tags = trials["k1"].data.tags
    assert (tags["baseline"], tags["state"], tags["cached"], tags["judge"]) == ("true", "done", "false", "shapes")
    assert tags["judge_sha256"] == "ab" * 32 and tags["data_fingerprint"] == "cd" * 32
    assert trials["k3"].data.tags["cached"] == "true" and trials["k3"].info.start_time < 1_700_001_000_000
    assert trials["k2"].data.tags["error.cause"] == "nan"
    assert trials["k2"].data.tags["error.message"] == "loss is nan at step 40"


def test_curves_equal_the_jsonl(tracked) -> None:
    for key, run in tracked["trials"].items():
        others = ("loss", "lr", "system/cpu_percent", "images_per_s")
        assert_curves_equal(tracked["client"], run, tracked["root"] / "runs/trials" / key, others)
    metrics = tracked["trials"]["k1"].data.metrics
    assert metrics["fid"] == 12.5 and metrics["images_per_s_final"] == 510.0 and metrics["seconds/train"] == 60.0


def test_artifacts_and_inputs(tracked) -> None:
    client, trials = tracked["client"], tracked["trials"]
    files = {item.path for item in client.list_artifacts(trials["k1"].info.run_id)}
    assert files >= {"settings.json", "gates.json", "result.json", "samples.png", "real.png", "images", "metrics.jsonl"}
    assert trials["k1"].info.artifact_uri.startswith((tracked["root"] / "mlartifacts").as_uri())
    assert [item.path for item in client.list_artifacts(trials["k2"].info.run_id, "logs")] == ["logs/log.txt"]
    inputs = {item.tags[0].value: item.dataset for item in trials["k1"].inputs.dataset_inputs}
    assert {context: dataset.name for context, dataset in inputs.items()} == {
        "train": "shapes/train",
        "validation": "shapes/validation",
        "judge": "shapes",
    }
    assert inputs["train"].digest == inputs["validation"].digest == "cd" * 18 and inputs["judge"].digest == "ab" * 18


def test_command(tracked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, root = tracked["tracker"], tracked["root"]
    monkeypatch.chdir(root)
    assert tracker.command == "uv run mlflow ui"
    from mlflow.tracking._tracking_service.utils import _get_default_tracking_uri

    assert _get_default_tracking_uri() == "sqlite:///mlflow.db", "what a plain `mlflow ui` opens here"
    monkeypatch.chdir(tmp_path)
    assert tracker.command == f"uv run mlflow ui --backend-store-uri sqlite:///{root / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example:5000")
    assert Tracker("mixers", None, tmp_path, tmp_path).command == "http://tracking.example:5000"


def test_the_same_trials_again_are_the_same_runs_and_only_what_is_new_is_added(tracked) -> None:
    """All cached, and the speed of one was measured by now."""
    root, client = tracked["root"], tracked["client"]
    records = [dataclasses.replace(record, cached=record.state == "done") for record in tracked["records"]]
    records[0] = dataclasses.replace(records[0], metrics=records[0].metrics | {"latency_ms": 4.0, "fid": 12.0})
    tracker = tracker_of(root, list(reversed(records)))
    for record in records:
        tracker.trial_finished(record)
    assert tracker.finish(make_outcome(records), tracked["report"], "FINISHED", verdict="refuted") == []
    (parent,), trials = runs_of(client)
    assert parent.info.run_id == tracked["parent"].info.run_id and parent.data.tags["verdict"] == "refuted"
    assert {key: [run.info.run_id for run in runs] for key, runs in trials.items()} == {
        key: [run.info.run_id] for key, run in tracked["trials"].items()
    }
    run_id = trials["k1"][0].info.run_id
    assert [point.value for point in client.get_metric_history(run_id, "fid")] == [12.5, 12.0]
    assert trials["k1"][0].data.metrics["fid"] == 12.0, "the newer one counts, though it is lower"
    for name in ("clip_score", "latency_ms", "seconds/train"):
        assert len(client.get_metric_history(run_id, name)) == 1
    for key in ("k1", "k2"):
        assert_curves_equal(client, trials[key][0], root / "runs/trials" / key)
    assert len(client.list_artifacts(run_id, "images")) == 2  # a png and a webp, of one picture
    assert len(client.get_run(run_id).inputs.dataset_inputs) == 3


def test_a_failed_trial_that_is_run_again_goes_on_with_its_run(tracked) -> None:
    root, client = tracked["root"], tracked["client"]
    again = make_record(root / "runs", "k2", "attention")
    (again.folder / "error.json").unlink()
    tracker = tracker_of(root, tracked["records"])
    tracker.trial_started("k2")
    tracker.trial_finished(again)
    assert tracker.finish(make_outcome([again]), None) == []
    (run,) = runs_of(client)[1]["k2"]
    assert run.info.run_id == tracked["trials"]["k2"].info.run_id and run.info.status == "FINISHED"
    assert run.data.tags["state"] == "done" and "error.cause" not in run.data.tags and run.data.metrics["fid"] == 12.5
    assert_curves_equal(client, run, again.folder)


def test_resumed_trial_and_half_written_line(tracked, client_of) -> None:
    """A trial is cut back to a checkpoint while it runs, and its last line is half there."""
    root = tracked["root"]
    record = make_record(root / "runs", "k4", "attention")
    tracker = tracker_of(root, [record])
    tracker.trial_started("k4")
    for steps, begun, tail in (
        (range(20, 220, 20), 100.0, '{"step": 220, "ti'),
        (range(20, 120, 20), 100.0, ""),
        (range(20, 420, 20), 5000.0, ""),
    ):
        write_metrics(record.folder, steps, begun, tail)
        tracker.sync("k4")
        tracker.wait()
    tracker.trial_finished(record)
    assert tracker.finish(make_outcome([record]), None) == []
    client = client_of(root)
    (run,) = runs_of(client)[1]["k4"]
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / step) for step in range(20, 420, 20)]
    assert [point.timestamp for point in history if point.step in (200, 220)] == [300_000, 5_220_000]


def test_interrupt_and_abandoned_runs(tracked, client_of) -> None:
    """Ctrl-C leaves nothing RUNNING; runs of a driver that was killed hard are ended by the next one."""
    root, client = tracked["root"], tracked["client"]
    experiment = client.get_experiment_by_name("mixers").experiment_id
    dead = client.create_run(experiment, tags={"kind": "grid", "host": os.uname().nodename, "pid": "99999999"})
    record = make_record(root / "runs", "k5", "attention")
    with pytest.raises(KeyboardInterrupt), tracker_of(root, [record]) as tracker:
        tracker.trial_started("k5")
        raise KeyboardInterrupt
    (child,) = runs_of(client)[1]["k5"]
    states = [client.get_run(run).info.status for run in (tracker.parent_id, child.info.run_id, dead.info.run_id)]
    assert states == ["KILLED"] * 3 and child.data.tags["state"] == "killed"
    # The same trials again, and the person leaves them running.
    tracker = tracker_of(root, [record])
    tracker.trial_started("k5")
    tracker.detach()
    assert tracker.finish(None, None) == []
    assert {client.get_run(run).info.status for run in (tracker.parent_id, child.info.run_id)} == {"RUNNING"}
    client.delete_run(dead.info.run_id)


def test_unreachable_server_never_raises(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nothing listens there
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}"
        said: list[str] = []
        record = make_record(tmp_path / "runs", "k1", "grfm")
        tracker = tracker_of(tmp_path, [record], uri=dead, warn=said.append)
        tracker.trial_started("k1")
        tracker.sync("k1")
        tracker.trial_finished(record)
        problems = tracker.finish(make_outcome([record]), None)
    assert len(said) == 1 and dead in said[0] and "nothing answers there" in said[0]
    assert len(problems) == 1 and "does not have anything of this grid" in problems[0]
    assert "python -m ablations.track.sync" in problems[0]
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize("code", [401, 403])
def test_a_server_that_refuses_is_told_with_what_helps(tmp_path: Path, code: int) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(code, "you may not")

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    said: list[str] = []
    record = make_record(tmp_path / "runs", "k1", "grfm")
    uri = f"http://user:secret@127.0.0.1:{server.server_port}"
    tracker = tracker_of(tmp_path, [record], uri=uri, warn=said.append)
    tracker.trial_finished(record)
    problems = tracker.finish(make_outcome([record]), None)
    server.shutdown()
    server.server_close()
    assert len(said) == 1 and str(code) in said[0]
    assert "access is refused" in said[0] and "MLFLOW_TRACKING_PASSWORD" in said[0]
    assert len(problems) == 1 and "secret" not in said[0] + problems[0]


def test_a_store_that_fails_for_a_while_gets_everything(tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    root, client = tracked["root"], tracked["client"]
    record, real, fails = make_record(root / "runs", "k6", "grfm"), GridStore._log_files, [True]

    def log_files(self: GridStore, *args) -> None:
        real(self, *args)
        if fails.pop() if fails else False:
            raise ConnectionError("the server went away")

    monkeypatch.setattr(GridStore, "_log_files", log_files)
    said: list[str] = []
    tracker = tracker_of(root, [record], warn=said.append)
    tracker.trial_started("k6")
    tracker.trial_finished(record)
    tracker.wait()
    assert tracker.finish(make_outcome([record]), None) == [] and "went away" in said[0]
    (run,) = runs_of(client)[1]["k6"]
    assert run.info.status == "FINISHED" and len(client.get_metric_history(run.info.run_id, "fid")) == 1
    assert len(client.list_artifacts(run.info.run_id, "images")) == 2
    assert_curves_equal(client, run, record.folder)


def test_what_cannot_work_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match="track.uri=ftp://x: scheme 'ftp' is unknown; allowed: sqlite"):
        Tracker("mixers", "ftp://x", tmp_path, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////no/where/x.db")
    with pytest.raises(SettingError, match="MLFLOW_TRACKING_URI=.*the folder /no/where does not exist"):
        Tracker("mixers", None, tmp_path, tmp_path)


def test_a_store_that_a_kill_left_half_made_is_made_anew(tmp_path: Path) -> None:
    code = "from pathlib import Path; from ablations.track.location import Location; Location.of(None, Path.cwd()).connect('mixers')"
    command, new = [sys.executable, "-c", code], tmp_path / ".mlflow.db.new"
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment) as process:
        while process.poll() is None and not (new.exists() and new.stat().st_size > 100_000):
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL and new.exists() and not (tmp_path / "mlflow.db").exists()
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert (
        MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").get_experiment_by_name("mixers") is not None
        and not new.exists()
    )


def test_finish_names_the_allowed_statuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="FINISHED, FAILED, KILLED"):
        Tracker("mixers", None, tmp_path, tmp_path).finish(None, None, "DONE")


def test_payload() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, 2]}) == {"a.b": "1", "a.c": "{}", "d": "[1, 2]"}
    assert dataset_fields({"name": "parquet", "path": "x.parquet"}, "fingerprint")["source"] == '{"uri": "x.parquet"}'
    assert contact_sheet(np.zeros((10, 32, 32, 3), np.uint8)).size == (4 + 8 * 100, 4 + 2 * 100)
    held = make_outcome([], data={"name": "shapes", "fingerprint": "x", "heldout": 64}, judge={})
    assert [context for context, _ in data_inputs(held)] == ["train", "validation", "heldout"]
