"""Tracking by real servers on sqlite and on PostgreSQL: killed in mid-batch, slow, gone, with each answer lost once.
What they have in the end is what the trials wrote: each point, once."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow_servers import Postgres, Proxy, Server, free_port, postgres_programs
from real_command import command
from tracked_grid import (
    Command,
    append_metrics,
    assert_curves_equal,
    make_journal,
    make_outcome,
    make_record,
    runs_of,
    write_metrics,
)

from ablations.__main__ import main as ablations
from ablations.track import follow
from ablations.track.curves import NO_CURVES
from ablations.track.journal import Journal
from ablations.track.location import Location

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("mlflow_server"),
]  # one worker: what the module's fixtures make is shared

ROOT = Path(__file__).parents[2]
BACKENDS = ("sqlite", "postgresql")


@pytest.fixture(scope="module")
def cluster():
    """A private PostgreSQL, or why there is none."""
    programs = postgres_programs()
    if programs is None:
        yield "PostgreSQL is not installed: apt-get install postgresql"
    elif importlib.util.find_spec("psycopg2") is None:
        yield "PostgreSQL's driver is not installed: uv sync --extra postgres"
    else:
        running = Postgres(programs)
        yield running
        running.stop()


@pytest.fixture(scope="module")
def servers(cluster: Postgres | str, tmp_path_factory: pytest.TempPathFactory):
    """A server a backend, starting at the same time."""
    folders = {backend: tmp_path_factory.mktemp(backend) for backend in BACKENDS}
    running = {"sqlite": Server(folders["sqlite"], f"sqlite:///{folders['sqlite'] / 'mlflow.db'}")}
    if isinstance(cluster, Postgres):
        running["postgresql"] = Server(folders["postgresql"], cluster.database("mlflow"))
    try:
        for server in running.values():
            server.launch()
        yield running
    finally:
        for server in running.values():
            server.kill()


@pytest.fixture(scope="module", params=BACKENDS)
def server(request: pytest.FixtureRequest, servers: dict[str, Server], cluster: Postgres | str) -> Server:
    if request.param not in servers:
        pytest.skip(cluster)
    servers[request.param].ready()
    return servers[request.param]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(follow, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(follow, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(follow, "END_SECONDS", 3600.0)  # a busy machine decides nothing
    monkeypatch.chdir(tmp_path)


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def end(journal: Journal, records: list, name: str) -> None:
    """All trials of a grid ended, and it did."""
    for record in records:
        journal.ended(record)
    journal.closed(make_outcome(records, name=name), None, "FINISHED", None)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def assert_all_there_once(uri: str, grid: str, records: list, status: str = "FINISHED") -> None:
    client = client_of(uri)
    (parent,), trials = runs_of(client, grid)
    assert parent.info.status == status and trials.keys() == {record.key for record in records}
    for record in records:
        (run,) = trials[record.key]
        assert run.info.status == "FINISHED" and run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert_curves_equal(client, run, record.folder)
        for name, value in {"fid": 12.5, "images_per_s_final": 510.0, "seconds/train": 60.0}.items():
            assert [point.value for point in client.get_metric_history(run.info.run_id, name)] == [value]
        assert len(run.inputs.dataset_inputs) == 3 and len(run.data.params) > 150
        files = [item.path for item in client.list_artifacts(run.info.run_id)]
        assert {"metrics.jsonl", "result.json", "samples.png"} <= set(files)
        assert len(client.list_artifacts(run.info.run_id, "images")) == 2  # one picture, in two forms


def test_a_server_killed_in_mid_batch_and_started_again(server, tmp_path):
    """Trials train on, and one ends, while it is down."""
    records = [make_record(tmp_path / "runs", key, "grfm") for key in ("a1", "a2", "a3")]
    for record in records:
        write_metrics(record.folder, range(0))
        (record.folder / "result.json").rename(record.folder / "result")
    batches, died = itertools.count(1), threading.Event()

    def judge(method: str, path: str, body: bytes) -> str:
        if path.endswith("log-batch") and b'"metrics"' in body and next(batches) == 4:
            server.kill()  # it has the points, and may have kept them
            died.set()
        return "pass"

    proxy = Proxy(server.port, judge)
    journal, command = make_journal(tmp_path / "runs", records, name="killed"), Command(proxy.uri, tmp_path)
    command.follow(journal.path)
    after = 0
    for step in itertools.count(20, 20):
        for record in records:
            append_metrics(record.folder, range(step, step + 1))
        if not died.wait(0.02):
            continue
        after += 1
        if after == 20:
            (records[0].folder / "result").rename(records[0].folder / "result.json")
        if after == 40:
            break
    server.start()
    for record in records[1:]:
        (record.folder / "result").rename(record.folder / "result.json")
    end(journal, records, "killed")
    until(lambda: len(command.following.works[0].settled) == 3)
    assert command.end() == []
    assert_all_there_once(server.uri, "killed", records)
    proxy.close()


def test_each_kind_of_call_loses_its_first_answer(server, tmp_path):
    """It was carried out, and nobody knows: the tracker must neither leave it out nor do it twice."""
    records = [make_record(tmp_path / "runs", "b1", "grfm")]
    lost: Counter[str] = Counter()

    def judge(method: str, path: str, body: bytes) -> str:
        kind = f"{method} {re.sub('[0-9a-f-]{8,}', '', path.rpartition('/')[2])}"
        lost[kind] += 1
        return "lose" if lost[kind] == 1 else "pass"

    proxy = Proxy(server.port, judge)
    journal, command = make_journal(tmp_path / "runs", records, name="lossy"), Command(proxy.uri, tmp_path)
    command.follow(journal.path)
    end(journal, records, "lossy")
    problems = command.end()
    journal.release()
    for _ in range(200):
        if not problems:
            break
        problems = ablations(["sync", f"track.uri={proxy.uri}"])
    assert not problems and lost["POST create"] > 2 and lost["POST log-batch"] > 0 and len(lost) > 10, lost
    assert_all_there_once(server.uri, "lossy", records)
    proxy.close()


def test_drivers_that_meet_on_an_empty_postgresql(cluster, tmp_path):
    """Without a server between: by the database's own URI."""
    if not isinstance(cluster, Postgres):
        pytest.skip(cluster)
    uri = cluster.database("direct")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "ablations"), str(ROOT)])}
    grids = {"mixers": "d1", "depth": "e1"}
    driver = ROOT / "tests" / "ablations" / "track_grid.py"
    drivers = [
        subprocess.Popen(
            [sys.executable, driver, grid, uri, tmp_path, keys, tmp_path / "go"],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for grid, keys in grids.items()
    ]
    (tmp_path / "go").touch()
    for driver in drivers:
        said, errors = driver.communicate(timeout=600)
        assert (driver.returncode, said) == (0, "[]\n"), errors
    client = client_of(uri)
    for grid, key in grids.items():
        (parent,), trials = runs_of(client, grid)
        assert parent.info.status == "FINISHED" and trials.keys() == {key}
        assert_curves_equal(client, trials[key][0], tmp_path / "runs" / "trials" / key)
    assert (tmp_path / "mlartifacts").is_dir(), "a database keeps no files, and MLflow would take ./mlruns"
    assert "unused" not in Location.of(uri, tmp_path).shown


def training_of(place: Path) -> Path:
    """The folder of the only training of a grid on a latent that needs none."""
    (curve,) = (place / "runs" / "stages").glob("*/metrics.jsonl")
    return curve.parent


def test_the_command_goes_on_without_a_server_and_another_sends_the_rest(servers, tmp_path):
    """The real grid, at smoke scale."""
    dead, server = f"http://127.0.0.1:{free_port()}", servers["sqlite"]
    words = [
        "grid=mixers",
        "scale=smoke",
        "grid.axes={model.mixer:[grfm]}",
        "latent=haar",
        "launcher=inline",
        "threads=1",
        "data.train=64",
        "measure.samples=16",
        "measure.heldout=0",
        "train.steps=20",
    ]
    done = command(tmp_path, *words, tracking=dead)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert f"MLflow at {dead} did not take" in said and "nothing answers there" in said
    assert "has 0 of 1 trials" in said and "python -m ablations sync, sends the rest without training" in said

    server.ready()
    done = command(tmp_path, "sync", f"track.uri={server.uri}", module="ablations", tracking=dead)
    assert done.returncode == 0 and "1 of 1 trials" in done.stdout, done.stdout + done.stderr
    client = client_of(server.uri)
    (parent,), trials = runs_of(client, "mixers")
    ((key, (run,)),) = trials.items()
    assert parent.info.status == run.info.status == "FINISHED" and parent.data.tags["verdict"]
    result = json.loads((tmp_path / "runs" / "trials" / key / "result.json").read_text())
    folder = training_of(tmp_path)
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert run.data.metrics["fid"] == result["metrics"]["fid"] and run.data.metrics["latency_ms"] > 0
    assert_curves_equal(client, run, folder, tuple(name for name in first if name not in NO_CURVES))
    assert len(run.outputs.model_outputs) == 1


def test_a_server_that_goes_and_comes_back_while_a_grid_trains(servers, tmp_path):
    """The real grid, at smoke scale."""
    server = servers["sqlite"]
    server.ready()
    words = [
        "grid=opponents",
        "scale=smoke",
        "grid.axes={model.mixer:[grfm]}",
        "latent=haar",
        "launcher.workers=1",
        "threads=1",
        "data.train=64",
        "measure.samples=16",
        "measure.heldout=0",
        "train.steps=400",
        "model.iterations=1",
        "track.models_mb=0",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": server.uri}
    with open(tmp_path / "said", "w") as said:
        command = subprocess.Popen(
            [sys.executable, "-m", "ablations.run", *words],
            cwd=tmp_path,
            env=environment,
            stdout=said,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    client = client_of(server.uri)

    def rows() -> int:
        """What the trial has written."""
        return sum(
            len(path.read_text().splitlines()) for path in (tmp_path / "runs" / "stages").glob("*/metrics.jsonl")
        )

    def until(condition: Callable[[], bool]) -> None:
        while not condition():
            assert command.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.1)

    until(lambda: client.get_experiment_by_name("opponents") is not None)
    until(lambda: rows() > 0)
    server.kill()
    down = rows()
    until(lambda: rows() >= down + 5)
    server.start()
    assert command.wait(600) == 0, (tmp_path / "said").read_text()
    (parent,), trials = runs_of(client, "opponents")
    assert parent.info.status == "FINISHED" and len(trials) == 1
    for (run,) in trials.values():
        assert run.info.status == "FINISHED"
        assert_curves_equal(client, run, training_of(tmp_path), ("loss", "lr", "grad_norm"))
