"""The process that tells MLflow while commands work: what it says, how long it is waited for, and what it does after them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
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

from ablations.track import follow, store
from iris.errors import SettingError
from iris.io.follower import MARK, Follower, following

pytestmark = pytest.mark.xdist_group("follow")  # one worker: the tests start MLflow in processes of their own

HERE = Path(__file__).parent


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@pytest.fixture
def dead() -> Iterator[str]:
    """The address of a port at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def make_stage(folder: Path, steps: range) -> Path:
    write_metrics(folder, steps)
    (folder / "settings.json").write_text("{}")
    (folder / MARK).write_text(json.dumps({"sent": False}))
    return folder


def test_work_is_told_of_while_it_goes_on_and_as_it_ended(tmp_path, told, monkeypatch):
    monkeypatch.setattr(follow, "LOOK_SECONDS", 0.05)
    record = make_record(tmp_path / "runs", "k1", "grfm")
    (record.folder / "result.json").unlink()
    journal = make_journal(tmp_path / "runs", [record])
    stage = make_stage(tmp_path / "runs" / "stages" / "vae-1", range(1, 3))
    command = Command(told.uri, tmp_path)
    for place in (journal.path, stage):
        command.follow(place)
    until(lambda: len(told.client.search_experiments()) == 3 and runs_of(told.client)[1])
    append_metrics(record.folder, range(420, 440, 20))
    until(lambda: told.runs()[1]["k1"].data.metrics["loss"] == 1 / 420)
    assert (
        told.runs()[0].info.status == told.runs()[1]["k1"].info.status == told.run("training").info.status == "RUNNING"
    )
    (record.folder / "result.json").write_text("{}")
    journal.ended(record)
    journal.closed(make_outcome([record]), None, "FINISHED", None)
    assert command.end() == [] and command.said == []
    assert told.runs()[0].info.status == told.runs()[1]["k1"].info.status == "FINISHED"
    assert told.run("training").info.status == "KILLED" and json.loads((stage / MARK).read_text())["sent"] is False
    assert_curves_equal(told.client, told.runs()[1]["k1"], record.folder)


def test_a_server_that_is_down_is_said_once_and_what_is_missing_in_the_end(tmp_path, dead, monkeypatch):
    monkeypatch.setattr(follow, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(follow, "RETRY_SECONDS", 0.0)
    records = [make_record(tmp_path / "runs", "k1", "grfm")]
    journal = make_journal(tmp_path / "runs", records)
    command = Command(dead, tmp_path)
    command.follow(journal.path)
    until(lambda: command.said)
    journal.ended(records[0])
    (missing,) = command.end()
    ((word, said),) = command.said
    assert word == "said" and f"MLflow at {dead} did not take mixers-" in said and "nothing answers there" in said
    assert (
        missing.startswith(f"MLflow at {dead} has 0 of 1 trials of mixers-") and "python -m ablations sync" in missing
    )
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize("code", [401, 403])
def test_a_server_that_refuses_is_told_with_what_helps(tmp_path, code):
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(code, "you may not")

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    journal = make_journal(tmp_path / "runs", [make_record(tmp_path / "runs", "k1", "grfm")])
    command = Command(f"http://user:secret@127.0.0.1:{server.server_port}", tmp_path)
    command.follow(journal.path)
    missing = command.end()
    server.shutdown()
    server.server_close()
    ((_, said),) = command.said
    assert str(code) in said and "access is refused" in said and "MLFLOW_TRACKING_PASSWORD" in said
    assert len(missing) == 1 and "secret" not in said + missing[0]


def test_a_server_that_takes_a_connection_and_never_answers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "END_SECONDS", 0.5)
    monkeypatch.setattr(follow, "SAY_SECONDS", 0.1)
    journal = make_journal(tmp_path / "runs", [make_record(tmp_path / "runs", "k1", "grfm")])
    with socket.create_server(("127.0.0.1", 0)) as silent:
        command = Command(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path)
        command.follow(journal.path)
        (missing,) = command.end()
    assert (
        "has 0 of 1 trials" in missing and ("said", f"MLflow has 0 of 1 trials of {journal.key} so far") in command.said
    )


def test_a_call_waits_for_an_answer_no_longer_than_half_of_30_seconds():
    """One may wait when a command ends, and one comes after it."""
    assert store.ENVIRONMENT["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "15" and store.ENVIRONMENT["PGCONNECT_TIMEOUT"] == "15"
    assert store.ENVIRONMENT["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


def test_what_another_process_tells_of_is_told_when_that_has_ended(tmp_path, told):
    from ablations.track.work import Stage

    stage = make_stage(tmp_path / "runs" / "stages" / "vae-1", range(1, 3))
    (stage / "result.json").write_text("{}")
    other = Stage(stage)
    other.lock.acquire()
    command = Command(told.uri, tmp_path)
    command.follow(stage)
    command.lines.close()
    time.sleep(0.5)
    assert told.client.get_experiment_by_name("training") is None
    other.lock.release()
    assert command.end() == [] and told.run("training").info.status == "FINISHED"


# -- the process ----------------------------------------------------------------------------------------------------


def test_settings_that_cannot_be_used_are_refused_before_anything_is_done(tmp_path):
    said: list[str] = []
    with pytest.raises(SettingError, match="^track=ftp://me:\\*\\*\\*@x: scheme 'ftp' is unknown; allowed: sqlite"):
        Follower({"uri": "ftp://me:secret@x", "setting": "track"}, said.append)
    with following("none", said.append) as nobody:
        assert nobody is None and said == []


def test_the_password_is_not_on_a_command_line(tmp_path):
    with Follower({"uri": "http://me:secret@127.0.0.1:9"}, print) as process:
        words = Path(f"/proc/{process._process.pid}/cmdline").read_bytes()
        assert b"ablations.track.follow" in words and b"secret" not in words
        assert process.shows == "http://me:***@127.0.0.1:9"


def test_a_process_that_was_killed_is_replaced_and_all_is_sent(tmp_path, told):
    stage = make_stage(tmp_path / "runs" / "stages" / "vae-1", range(1, 4))
    process = Follower({}, lambda text: None)
    process.follow(stage)
    os.kill(process._process.pid, signal.SIGKILL)
    (stage / "result.json").write_text("{}")
    assert process.end() == []
    assert told.run("training").info.status == "FINISHED" and json.loads((stage / MARK).read_text())["sent"] is True


def test_a_command_that_is_killed_leaves_runs_that_say_so(tmp_path, told):
    """Its process ends by itself, with all that was on the disk."""
    stage = make_stage(tmp_path / "runs" / "stages" / "vae-1", range(1, 4))
    code = (
        "import sys, time; from pathlib import Path; from iris.io.follower import Follower\n"
        "process = Follower({}, print); process.follow(Path(sys.argv[1]))\n"
        "print(process._process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, stage], stdout=subprocess.PIPE, text=True) as command:
        pid = int(command.stdout.readline())
        append_metrics(stage, range(4, 6))
        command.kill()
    until(lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes())
    assert told.run("training").info.status == "KILLED"
    assert_curves_equal(told.client, told.run("training"), stage)
