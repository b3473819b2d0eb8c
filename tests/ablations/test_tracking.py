"""Tracker against a real sqlite store, read back through MLflow's own client."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from ablations.records import GridOutcome, TrialRecord
from ablations.tracking import Tracker
from ablations.tracking_payload import contact_sheet, dataset_fields, flatten, metric_points

SETTINGS = {"seed": 0, "model": {"mixer": "grfm", "dim": 64, "heads": [1, 2]},
            "many": {f"setting{n}": n for n in range(150)}, "long": "x" * 7000}


def write_metrics(folder: Path, steps: range, start: float = 1_700_000_000.0) -> None:
    """A metrics.jsonl whose values depend on the step only, as a resumed trial's do."""
    lines = [{"step": step, "time": start + step, "loss": 1 / step, "lr": 1e-3, "images_per_s": 500.0,
              "system/cpu_percent": 90.0 + step % 7} for step in steps]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_record(root: Path, key: str, arm: str, state: str = "done", cached: bool = False,
                seed: int = 0) -> TrialRecord:
    folder = root / "runs" / "trials" / key
    write_metrics(folder, range(20, 420, 20))
    settings = SETTINGS | {"model": {"mixer": arm, "dim": 64}, "seed": seed}
    (folder / "settings.json").write_text(json.dumps(settings))
    metrics, error = {}, None
    if state == "done":
        images = np.random.default_rng(0).integers(0, 255, (10, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / "samples.npz", images=images, captions=np.array(["a"] * 10), real=images)
        (folder / "gates.json").write_text('{"layers": []}')
        (folder / "result.json").write_text("{}")
        metrics = {"fid": 12.5 + seed, "clip_score": 31.0, "images_per_s": 510.0, "accuracy_colour": 0.95}
    else:
        (folder / "log.txt").write_text("Traceback …")
        error = {"cause": "nan", "message": "loss is nan at step 40", "traceback": "…", "log": str(folder / "log.txt")}
    return TrialRecord(key=key, arm=arm, values={"model.mixer": arm}, seed=seed, baseline=arm == "grfm", state=state,
                       cached=cached, settings=settings, metrics=metrics, folder=folder, seconds={"train": 60.0},
                       environment={"torch": "2"}, error=error)


def make_outcome(records: list[TrialRecord]) -> GridOutcome:
    return GridOutcome(
        name="mixers", question="Does GRFM earn its pathways?", claim="It does", match="params",
        decide={"metric": "fid", "better": "lower", "practical": 0.05},
        axes={"model.mixer": ["grfm", "attention"]}, records=records,
        judge={"name": "shapes", "sha256": "ab" * 32}, data={"name": "shapes", "fingerprint": "cd" * 32, "train": 4096},
        command="python -m ablations.run grid=mixers", commit="1234567+changes", hardware={"cpu": "x", "cores": 2},
        wall_seconds=12.0)


def open_trial(tracker: Tracker, record: TrialRecord) -> None:
    tracker.trial_started(record.key, record.arm, record.seed, record.baseline, record.settings)


@pytest.fixture(scope="module")
def client_of():
    from mlflow import MlflowClient
    return lambda root: MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, client_of):
    """One invocation: a trial done, one failed, one cached, with the report; and the runs it left."""
    root = tmp_path_factory.mktemp("repo")
    done, failed = make_record(root, "k1", "grfm"), make_record(root, "k2", "attention", state="failed")
    cached = make_record(root, "k3", "grfm", cached=True, seed=1)
    report = root / "reports" / "mixers"
    report.mkdir(parents=True)
    (report / "index.html").write_text("<h1>verdict</h1>")
    outcome = make_outcome([done, failed, cached])
    tracker = Tracker("mixers", f"sqlite:///{root / 'mlflow.db'}", root)
    tracker.prepare()
    assert tracker.ready(), "the store exists before the first trial"
    tracker.start(make_outcome([]), seeds=[0, 1], baseline={"model.mixer": "grfm"})
    for record in (done, failed):
        open_trial(tracker, record)
        tracker.sync(record.key, record.folder)
    for record in (done, failed, cached):
        tracker.trial_finished(record)
    problems = tracker.finish(outcome, report, "FAILED", verdict="supported")
    client = client_of(root)
    runs = client.search_runs([client.get_experiment_by_name("mixers").experiment_id])
    return {"root": root, "problems": problems, "client": client, "tracker": tracker,
            "parent": next(run for run in runs if run.data.tags["kind"] == "grid"),
            "trials": {run.data.tags["key"]: run for run in runs if run.data.tags["kind"] == "trial"}}


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
        lines = (tracked["root"] / "runs/trials" / key / "metrics.jsonl").read_text().splitlines()
        for name in ("loss", "lr", "images_per_s", "system/cpu_percent"):
            history = tracked["client"].get_metric_history(run.info.run_id, name)
            written = [(line["step"], line[name], int(line["time"] * 1000)) for line in map(json.loads, lines)]
            assert [(point.step, point.value, point.timestamp) for point in history] == written
    metrics = tracked["trials"]["k1"].data.metrics
    assert metrics["fid"] == 12.5 and metrics["images_per_s_final"] == 510.0 and metrics["seconds/train"] == 60.0


def test_artifacts_and_inputs(tracked) -> None:
    client, trials = tracked["client"], tracked["trials"]
    files = {item.path for item in client.list_artifacts(trials["k1"].info.run_id)}
    assert files >= {"settings.json", "gates.json", "result.json", "samples.png", "real.png", "images", "metrics.jsonl"}
    assert trials["k1"].info.artifact_uri.startswith((tracked["root"] / "mlartifacts").as_uri())
    assert [item.path for item in client.list_artifacts(trials["k2"].info.run_id, "logs")] == ["logs/log.txt"]
    inputs = {item.tags[0].value: item.dataset for item in trials["k1"].inputs.dataset_inputs}
    assert inputs["training"].name == "shapes" and inputs["training"].digest == ("cd" * 18)
    assert inputs["judge"].digest == "ab" * 18


def test_command(tracked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, root = tracked["tracker"], tracked["root"]
    monkeypatch.chdir(root)
    assert tracker.command == "uv run mlflow ui"
    from mlflow.tracking._tracking_service.utils import _get_default_tracking_uri
    assert _get_default_tracking_uri() == "sqlite:///mlflow.db", "what a plain `mlflow ui` opens here"
    monkeypatch.chdir(tmp_path)
    assert tracker.command == f"uv run mlflow ui --backend-store-uri sqlite:///{root / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example:5000")
    assert Tracker("mixers", None, tmp_path).command == "http://tracking.example:5000"


def test_resumed_trial_and_half_written_line(tracked, client_of) -> None:
    """A second invocation; its trial is cut back to a checkpoint while it runs, and its last line is half there."""
    root = tracked["root"]
    record = make_record(root, "k4", "attention")
    file = record.folder / "metrics.jsonl"
    tracker = Tracker("mixers", None, root)
    tracker.start(make_outcome([]), seeds=[0], baseline={})
    open_trial(tracker, record)
    for steps, tail in ((range(20, 220, 20), '{"step": 220, "ti'), (range(20, 120, 20), ""), (range(20, 420, 20), "")):
        write_metrics(record.folder, steps)
        with file.open("a") as stream:
            stream.write(tail)
        tracker.sync(record.key, record.folder)
        while tracker._queued_syncs or not tracker._queue.empty():
            time.sleep(0.02)
    tracker.trial_finished(record)
    assert tracker.finish(make_outcome([record]), None) == []
    client = client_of(root)
    run = client.search_runs([client.get_experiment_by_name("mixers").experiment_id], "tags.key = 'k4'")[0]
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == list(range(20, 420, 20))


def test_interrupt_and_abandoned_runs(tracked, client_of) -> None:
    """Ctrl-C leaves nothing RUNNING; runs of a driver that was killed hard are ended by the next one."""
    root, client = tracked["root"], tracked["client"]
    experiment = client.get_experiment_by_name("mixers").experiment_id
    dead = client.create_run(experiment, tags={"kind": "grid", "host": os.uname().nodename, "pid": "99999999"})
    record = make_record(root, "k5", "attention")
    with pytest.raises(KeyboardInterrupt), Tracker("mixers", None, root) as tracker:
        tracker.start(make_outcome([]), seeds=[0], baseline={})
        open_trial(tracker, record)
        raise KeyboardInterrupt
    child = client.search_runs([experiment], "tags.key = 'k5'")[0]
    states = [client.get_run(run).info.status for run in (tracker.parent_id, child.info.run_id, dead.info.run_id)]
    assert states == ["KILLED"] * 3 and child.data.tags["state"] == "killed"


def test_unreachable_server_never_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    said: list[str] = []
    record = make_record(tmp_path, "k1", "grfm")
    tracker = Tracker("mixers", None, tmp_path, warn=said.append)
    assert tracker.ready() is False
    tracker.start(make_outcome([]), seeds=[0], baseline={})
    open_trial(tracker, record)
    tracker.sync("k1", record.folder)
    tracker.trial_finished(record)
    problems = tracker.finish(make_outcome([record]), None)
    assert len(said) == 1 and "http://127.0.0.1:9" in said[0]
    assert len(problems) == 1 and "does not have anything of this grid" in problems[0]
    assert not (tmp_path / "mlflow.db").exists()


def test_a_server_that_comes_back_gets_everything(tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    from ablations.mlflow_store import GridStore
    root, client = tracked["root"], tracked["client"]
    record, real, fails = make_record(root, "k6", "grfm"), GridStore.complete, [True]

    def complete(self: GridStore, *args) -> None:
        if fails.pop() if fails else False:
            raise ConnectionError("the server went away")
        real(self, *args)

    monkeypatch.setattr(GridStore, "complete", complete)
    said: list[str] = []
    tracker = Tracker("mixers", None, root, warn=said.append)
    tracker.start(make_outcome([]), seeds=[0], baseline={})
    open_trial(tracker, record)
    tracker.trial_finished(record)
    assert tracker.finish(make_outcome([record]), None) == [] and "went away" in said[0]
    run = client.search_runs([client.get_experiment_by_name("mixers").experiment_id], "tags.key = 'k6'")[0]
    assert run.info.status == "FINISHED" and run.data.metrics["fid"] == 12.5


def test_finish_names_the_allowed_statuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="FINISHED, FAILED, KILLED"):
        Tracker("mixers", None, tmp_path).finish(None, None, "DONE")


def test_payload(tmp_path: Path) -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, 2]}) == {"a.b": "1", "a.c": "{}", "d": "[1, 2]"}
    assert dataset_fields({"name": "parquet", "path": "x.parquet"}, "fingerprint")["source"] == '{"uri": "x.parquet"}'
    assert contact_sheet(np.zeros((10, 32, 32, 3), np.uint8)).size == (4 + 8 * 100, 4 + 2 * 100)
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 2, "time": 1, "loss": NaN, "note": "x"}\n{"step": 1, "time": 2, "loss": 1}\nnoise\n')
    points = list(metric_points(file))
    assert [(point.name, point.step) for point in points] == [("loss", 2)] and points[0].value != points[0].value
