"""A grid in a real sqlite store, told from its journal and its trials' folders; read back through MLflow's own client."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tracked_grid import append_metrics, assert_curves_equal, make_journal, make_outcome, make_record, write_metrics

from ablations.answer.records import PlannedTrial
from ablations.track.grid import Grid, data_inputs, dataset
from ablations.track.journal import Journal
from ablations.track.location import Location
from ablations.track.store import Runs, Store
from ablations.track.work import as_params

pytestmark = pytest.mark.xdist_group("tracking")  # one worker: what the module's fixtures make is shared


@pytest.fixture(scope="module")
def ended(module_told):
    """A grid that ended: a trial done, one failed, one cached, with the report; and the trials' records."""
    told, root = module_told, module_told.root
    records = [
        make_record(root / "runs", "k1", "grfm"),
        make_record(root / "runs", "k2", "attention", state="failed"),
        make_record(root / "runs", "k3", "grfm", cached=True, seed=1),
    ]
    (root / "reports" / "pages").mkdir(parents=True)
    (root / "reports" / "index.html").write_text("<h1>verdict</h1>")
    (root / "reports" / "pages" / "one.html").write_text("one")
    journal = make_journal(root / "runs", records)
    end(journal, records, root / "reports", "FAILED", "supported")
    assert told.tell(Grid(journal.path, 50.0)).told
    return told, records


def end(
    journal: Journal, records: list, report: Path | None = None, status: str = "FINISHED", verdict: str | None = None
) -> None:
    for record in records:
        journal.ended(record)
    journal.closed(make_outcome(records), report, status, verdict)


def test_the_grids_run(ended) -> None:
    told, _ = ended
    parent, _ = told.runs()
    assert parent.info.status == "FAILED" and parent.data.tags["verdict"] == "supported"
    assert parent.data.tags["question"] == "Does GRFM earn its pathways?"
    assert parent.data.tags["git_commit"] == "1234567+changes" and parent.data.tags["hardware.cores"] == "2"
    assert parent.data.params == {"seeds": "0, 1"}
    assert parent.data.metrics["trials"] == 3 and parent.data.metrics["trials_failed"] == 1
    assert parent.data.metrics["summary/fid grfm"] == 13.0, "mean over seeds"
    report = {item.path for item in told.client.list_artifacts(parent.info.run_id, "report")}
    assert report == {"report/index.html", "report/pages"}


def test_a_trials_run(ended) -> None:
    told, _ = ended
    parent, trials = told.runs()
    assert {run.data.tags["mlflow.parentRunId"] for run in trials.values()} == {parent.info.run_id}
    assert [trials[key].info.status for key in ("k1", "k2", "k3")] == ["FINISHED", "FAILED", "FINISHED"]
    assert trials["k1"].info.run_name == "grfm, seed 0" and trials["k3"].info.start_time < 1_700_001_000_000
    params = trials["k1"].data.params
    assert params["model.mixer"] == "grfm" and params["many.setting149"] == "149" and len(params["long"]) == 6000
    tags = trials["k1"].data.tags
    assert (tags["baseline"], tags["state"], tags["cached"], tags["judge"]) == ("true", "done", "false", "shapes")
    assert tags["judge_sha256"] == "ab" * 32 and tags["data_fingerprint"] == "cd" * 32
    assert trials["k3"].data.tags["cached"] == "true"
    assert trials["k2"].data.tags["error.cause"] == "nan"
    assert trials["k2"].data.tags["error.message"] == "loss is nan at step 40"


def test_curves_equal_the_jsonl_and_measures_have_their_own_names(ended) -> None:
    told, records = ended
    _, trials = told.runs()
    for record in records:
        assert_curves_equal(told.client, trials[record.key], record.folder)
    metrics = trials["k1"].data.metrics
    assert metrics["fid"] == 12.5 and metrics["images_per_s_final"] == 510.0 and metrics["seconds/train"] == 60.0


def test_artifacts_and_inputs(ended) -> None:
    told, _ = ended
    _, trials = told.runs()
    files = {item.path for item in told.client.list_artifacts(trials["k1"].info.run_id)}
    assert files == {"settings.json", "gates.json", "result.json", "samples.png", "real.png", "images", "metrics.jsonl"}
    assert trials["k1"].info.artifact_uri.startswith((told.root / "mlartifacts").as_uri())
    assert [item.path for item in told.client.list_artifacts(trials["k2"].info.run_id, "logs")] == ["logs/log.txt"]
    inputs = {item.tags[0].value: item.dataset for item in trials["k1"].inputs.dataset_inputs}
    assert {context: dataset.name for context, dataset in inputs.items()} == {
        "train": "shapes/train",
        "validation": "shapes/validation",
        "judge": "shapes",
    }
    assert inputs["train"].digest == inputs["validation"].digest == "cd" * 18 and inputs["judge"].digest == "ab" * 18


def test_told_again_only_what_is_new_is_added(ended, monkeypatch) -> None:
    """All cached, in another order, and the speed of one was measured by now."""
    told, records = ended
    before, runs = told.runs()
    sent: list[str] = []
    monkeypatch.setattr(Runs, "_send_files", lambda self, known, content, stamps: sent.append(content.name))
    journal = make_journal(told.root / "runs", list(reversed(records)))
    records = [dataclasses.replace(record, cached=record.state == "done") for record in records]
    end(journal, records, told.root / "reports", "FAILED", "supported")
    assert told.tell(Grid(journal.path, 50.0)).told and not sent
    records[0] = dataclasses.replace(records[0], metrics=records[0].metrics | {"latency_ms": 4.0, "fid": 12.0})
    monkeypatch.undo()
    (told.root / "reports" / "index.html").write_text("<h1>another verdict</h1>")
    end(journal, records, told.root / "reports", "FINISHED", "refuted")
    assert told.tell(Grid(journal.path, 50.0)).told
    parent, trials = told.runs()
    assert parent.info.run_id == before.info.run_id and parent.data.tags["verdict"] == "refuted"
    assert parent.info.status == "FINISHED"
    place = Path(parent.info.artifact_uri.removeprefix("file://"))
    assert "another" in (place / "report" / "index.html").read_text()
    assert {key: run.info.run_id for key, run in trials.items()} == {key: run.info.run_id for key, run in runs.items()}
    run_id = trials["k1"].info.run_id
    assert [point.value for point in told.client.get_metric_history(run_id, "fid")] == [12.5, 12.0]
    assert trials["k1"].data.metrics["fid"] == 12.0, "the newer one counts, though it is lower"
    for name in ("clip_score", "latency_ms", "seconds/train"):
        assert len(told.client.get_metric_history(run_id, name)) == 1
    for record in records:
        assert_curves_equal(told.client, trials[record.key], record.folder)
    assert len(told.client.list_artifacts(run_id, "images")) == 2  # a png and a webp, of one picture
    assert len(told.client.get_run(run_id).inputs.dataset_inputs) == 3


def test_a_failed_trial_that_is_run_again_goes_on_with_its_run(told) -> None:
    record = make_record(told.root / "runs", "k1", "attention", state="failed")
    journal = make_journal(told.root / "runs", [record])
    end(journal, [record], status="FAILED")
    told.tell(Grid(journal.path, 50.0))
    first = told.runs()[1]["k1"]
    assert first.info.status == "FAILED" and first.data.tags["error.cause"] == "nan"
    (record.folder / "error.json").unlink()
    journal.began("k1")
    grid = told.tell(Grid(journal.path, 50.0), alive=True)
    parent, trials = told.runs()
    assert parent.info.status == trials["k1"].info.status == "RUNNING" and trials["k1"].data.tags["state"] == "running"
    again = make_record(told.root / "runs", "k1", "attention")
    end(journal, [again])
    grid.sync(told.store(), alive=True)
    parent, trials = told.runs()
    assert (
        parent.info.status == trials["k1"].info.status == "FINISHED" and trials["k1"].info.run_id == first.info.run_id
    )
    tags = trials["k1"].data.tags
    assert tags["state"] == "done" and "error.cause" not in tags and trials["k1"].data.metrics["fid"] == 12.5
    assert_curves_equal(told.client, trials["k1"], again.folder)


def test_a_trial_that_is_cut_back_to_a_checkpoint_while_it_is_told_of(told) -> None:
    record = make_record(told.root / "runs", "k1", "attention")
    (record.folder / "result.json").unlink()
    journal = make_journal(told.root / "runs", [record])
    journal.began("k1")
    grid, store = Grid(journal.path, 50.0), told.store()
    for steps, begun, tail in (
        (range(20, 220, 20), 100.0, '{"step": 220, "ti'),
        (range(20, 120, 20), 100.0, ""),
        (range(20, 420, 20), 5000.0, ""),
    ):
        write_metrics(record.folder, steps, begun, tail)
        grid.sync(store, alive=True)
    run = told.runs()[1]["k1"]
    history = told.client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / step) for step in range(20, 420, 20)]
    assert [point.timestamp for point in history if point.step in (200, 220)] == [300_000, 5_220_000]


def test_what_a_killed_driver_left(told) -> None:
    """It knew of no end: one trial had finished, one was training, one was waiting; its last line is half there."""
    runs = told.root / "runs"
    records = [make_record(runs, key, "grfm") for key in ("k1", "k2", "k3")]
    (records[1].folder / "result.json").unlink()
    shutil.rmtree(records[2].folder)
    journal = make_journal(runs, records)
    journal.began("k1")
    with journal.path.open("a") as file:
        file.write('{"kind": "trial k1", "state": "do')
    told.tell(Grid(journal.path, 50.0))
    parent, trials = told.runs()
    assert parent.info.status == "KILLED" and trials.keys() == {"k1", "k2"}
    assert [trials[key].info.status for key in ("k1", "k2")] == ["FINISHED", "KILLED"]
    assert trials["k1"].data.metrics["fid"] == 12.5 and trials["k2"].data.tags["state"] == "killed"
    # The grid goes on, and ends.
    append_metrics(records[1].folder, range(420, 440, 20))
    journal.release()
    journal = make_journal(runs, records)
    journal.began("k2")
    told.tell(Grid(journal.path, 50.0), alive=True)
    assert [run.info.status for run in (told.runs()[0], told.runs()[1]["k2"])] == ["RUNNING"] * 2
    end(journal, records[:2])
    assert told.tell(Grid(journal.path, 50.0)).points == 0
    parent, trials = told.runs()
    assert parent.info.status == trials["k2"].info.status == "FINISHED"
    assert_curves_equal(told.client, trials["k2"], records[1].folder)


def test_a_driver_that_was_stopped_and_one_that_left(told) -> None:
    record = make_record(told.root / "runs", "k1", "attention")
    (record.folder / "result.json").unlink()
    journal = make_journal(told.root / "runs", [record])

    def states() -> list[str]:
        told.tell(Grid(journal.path, 50.0))
        parent, trials = told.runs()
        return [parent.info.status, trials["k1"].info.status]

    journal.began("k1")
    journal.closed(None, None, "KILLED", None)
    assert states() == ["KILLED"] * 2
    journal.left()  # from a look at what was stopped: nothing runs
    assert states() == ["KILLED"] * 2
    journal.began("k1")
    journal.left()
    assert states() == ["RUNNING"] * 2
    journal.began("k1")  # followed again, by a driver that is killed
    assert states() == ["KILLED"] * 2


def test_trials_share_the_curves_of_a_stage(told) -> None:
    runs = told.root / "runs"
    write_metrics(runs / "stages" / "flow-1", range(20, 420, 20))
    write_metrics(runs / "stages" / "vae-2", range(1, 3))
    shared = ("stages/vae-2/metrics.jsonl", "stages/flow-1/metrics.jsonl")
    records = [
        make_record(runs, f"k{seed}", "grfm", seed=seed, curves=shared, model="stages/flow-1/weights")
        for seed in (0, 1)
    ]
    for record in records:
        (record.folder / "metrics.jsonl").unlink()
    journal = make_journal(runs, records)
    assert journal.read().trials == [PlannedTrial.of(record) for record in records]
    end(journal, records)
    assert told.tell(Grid(journal.path, 50.0)).points == 2 * (20 * 4 + 2 * 4)
    for run in told.runs()[1].values():
        assert_curves_equal(told.client, run, runs / "stages" / "flow-1")
        history = told.client.get_metric_history(run.info.run_id, "vae/loss")
        assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5)]
        assert {"metrics.jsonl", "vae"} <= {item.path for item in told.client.list_artifacts(run.info.run_id)}


def test_a_store_that_fails_half_way_gets_everything_later_and_once(told, monkeypatch) -> None:
    records = [make_record(told.root / "runs", f"k{seed}", "grfm", seed=seed) for seed in (1, 2)]
    journal = make_journal(told.root / "runs", records)
    end(journal, records)
    real, fails = Runs._send_files, ["of k1", "of k2"]

    def send_files(self: Runs, *args: Any) -> None:
        real(self, *args)
        if fails:
            raise ConnectionError(fails.pop(0))

    monkeypatch.setattr(Runs, "_send_files", send_files)
    grid = told.tell(Grid(journal.path, 50.0))
    assert not grid.told and [str(error) for error in grid.problems.values()] == ["of k1", "of k2"]
    grid.sync(told.store(), alive=False)
    assert grid.told and not grid.problems
    for record in records:
        run = told.runs()[1][record.key]
        assert run.info.status == "FINISHED" and len(told.client.get_metric_history(run.info.run_id, "fid")) == 1
        assert len(told.client.list_artifacts(run.info.run_id, "images")) == 2
        assert_curves_equal(told.client, run, record.folder)


def test_runs_that_lost_calls_made_are_deleted_and_those_of_others_are_not(told) -> None:
    record = make_record(told.root / "runs", "k1", "grfm")
    journal = make_journal(told.root / "runs", [record])
    end(journal, [record])
    told.tell(Grid(journal.path, 50.0))
    parent, trials = told.runs()
    for run in (parent, trials["k1"]):
        own = {name: value for name, value in run.data.tags.items() if name != "mlflow.runName"}
        told.client.create_run(run.info.experiment_id, start_time=1, tags=own)
    mine = {"mlflow.parentRunId": parent.info.run_id, "kind": "a person's"}
    others = [told.client.create_run(parent.info.experiment_id, tags=mine).info.run_id for _ in range(2)]
    told.tell(Grid(journal.path, 50.0))
    assert told.runs()[0].info.run_id == parent.info.run_id
    assert told.runs()[1]["k1"].info.run_id == trials["k1"].info.run_id
    assert [told.client.get_run(run_id).info.lifecycle_stage for run_id in others] == ["active"] * 2


def test_more_points_and_more_params_than_a_call_takes(told) -> None:
    record = make_record(told.root / "runs", "k1", "grfm")
    row = {"step": 1, "time": 1.0} | {f"layer {n}": float(n) for n in range(2500)}
    (record.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    journal = make_journal(told.root / "runs", [record])
    end(journal, [record])
    assert told.tell(Grid(journal.path, 50.0)).points == 2500
    run = told.runs()[1]["k1"]
    assert run.data.metrics["layer 2499"] == 2499.0 and len(run.data.params) == 156


def test_an_experiment_that_was_deleted_is_restored_and_that_is_said(told) -> None:
    experiment = told.client.create_experiment("mixers")
    told.client.delete_experiment(experiment)
    said: list[str] = []
    Store(Location.of(told.uri, told.root), said.append).runs("mixers")
    assert told.client.get_experiment(experiment).lifecycle_stage == "active"
    assert said == ["The experiment mixers was deleted in MLflow; it is restored, with the runs that it had."]


def test_a_store_that_a_kill_left_half_made_is_made_anew(tmp_path, monkeypatch) -> None:
    """Its name is there with all of its tables, or not at all."""

    def kill(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as killed, pytest.raises(SystemExit):
        killed.setattr(Path, "replace", kill)
        Store(Location.of(None, tmp_path)).runs("mixers")
    (new,) = tmp_path.glob(".mlflow.db.new*")
    assert not (tmp_path / "mlflow.db").exists()
    new.with_name(f"{new.name}-journal").touch()
    Store(Location.of(None, tmp_path)).runs("mixers")
    assert MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").get_experiment_by_name("mixers") is not None
    assert [path.name for path in tmp_path.glob(".mlflow*")] == []


# -- the journal ----------------------------------------------------------------------------------------------------


def test_a_journal_grows_only_by_what_is_new(tmp_path):
    records = [make_record(tmp_path / "runs", "k1", "grfm"), make_record(tmp_path / "runs", "k2", "grfm", seed=1)]
    journal = make_journal(tmp_path / "runs", records)
    end(journal, records, tmp_path / "reports", "FINISHED", "supported")
    journal.release()
    before = journal.path.read_text()
    again = make_journal(tmp_path / "runs", records, wall_seconds=99.0)
    again.ended(make_record(tmp_path / "runs", "k1", "grfm", cached=True))
    again.closed(make_outcome(records, wall_seconds=99.0), tmp_path / "reports", "FINISHED", "supported")
    assert again.path == journal.path and again.path.read_text() == before
    for _ in range(2):
        again.ended(make_record(tmp_path / "runs", "k1", "grfm", metrics={"fid": float("nan")}))
    assert again.path.read_text().count('"kind": "trial k1"') == 2 and again.path.read_text().startswith(before)
    assert not again.end  # something came after the end
    again.release()


def test_a_line_that_a_kill_cut_off_is_no_line(tmp_path):
    record = make_record(tmp_path / "runs", "k1", "grfm")
    journal = make_journal(tmp_path / "runs", [record])
    with journal.path.open("a") as file:
        file.write('{"kind": "end", "status": "FINI')
    journal.release()
    journal = make_journal(tmp_path / "runs", [record])
    journal.ended(record)
    read = Journal(journal.path).read()
    assert not read.end and read.facts(read.trials[0])["metrics"] == record.metrics
    journal.release()


# -- what goes in ---------------------------------------------------------------------------------------------------


def test_payload() -> None:
    assert as_params({"a": {"b": 1}, "d": [1, 2], "e": None}) == {"a.b": "1", "d": "[1, 2]", "e": "None"}
    assert dataset({"path": "x.parquet"}, "fingerprint", "parquet")["source"] == '{"uri": "x.parquet"}'
    held = {"data": {"name": "shapes", "fingerprint": "x", "heldout": 64}, "judge": {}}
    assert [context for context, _ in data_inputs(held)] == ["train", "validation", "heldout"]
