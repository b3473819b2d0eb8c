"""Local workers: shared slots, jobs that wait for others, deaths of workers and drivers, stopping."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import launched
import pytest
from test_launch import launcher

from ablations.launch import pool
from ablations.launch.backend import JobRun, run_jobs
from ablations.launch.job import Job, failure
from iris.io.files import read_json

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
    monkeypatch.setattr(pool.Pool, "poll_seconds", 0.05)


def drive(root: Path, workers: int, seconds: float, *keys: str) -> int:
    """A driver, to be run in a process of its own; its exit code."""
    jobs = [Job(key, launched.count, {"seconds": seconds}, root / "jobs" / key) for key in keys]
    ended: dict[str, Any] = {}
    run_jobs(make(root, jobs, ended, workers), lambda: None)
    return 1 if any(ended.values()) else 0


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return value


def marks(root: Path, key: str, name: str) -> list[str]:
    path = root / "jobs" / key / name
    return path.read_text().splitlines() if path.exists() else []


def make(root: Path, jobs: list[Job], ended: dict[str, Any], workers: int = 1, **changes: Any) -> JobRun:
    backend = pool.Pool(launcher(workers=workers, **changes), root, 1)
    return JobRun(jobs, backend, lambda job: None, lambda job, error: ended.update({job.key: error}))


def slot(root: Path, number: int = 0) -> dict[str, Any]:
    return read_json(pool.slot_file(root / "pool", number, ".json")) or {}


def test_two_drivers_share_slots_and_run_each_job_once(tmp_path):
    keys = [f"job{i}" for i in range(5)]
    assert forked.together(lambda rank: drive(tmp_path, 2, 0.3, *keys), [{}, {}], timeout=120) == [0, 0]
    for key in keys:
        assert len(marks(tmp_path, key, "began")) == len(marks(tmp_path, key, "ended")) == 1
    spans = [tuple(float(marks(tmp_path, key, name)[0].split()[1]) for name in ("began", "ended")) for key in keys]
    assert max(sum(start <= moment < end for start, end in spans) for moment, _ in spans) <= 2


def test_workers_go_on_when_the_driver_is_killed(tmp_path):
    first = forked.start(lambda: drive(tmp_path, 1, 0.5, "a", "b"))
    until(lambda: marks(tmp_path, "a", "began"))
    os.kill(first, signal.SIGKILL)
    assert until(lambda: forked.ended(first)) == -signal.SIGKILL
    assert forked.together(lambda rank: drive(tmp_path, 1, 0.5, "a", "b"), [{}], timeout=120) == [0]
    assert [len(marks(tmp_path, key, "began")) for key in "ab"] == [1, 1]


def test_a_killed_worker_is_replaced_and_its_job_is_not_run_beside_itself(tmp_path):
    ended: dict[str, Any] = {}
    run = make(tmp_path, [Job(key, launched.count, {"seconds": 1.0}, tmp_path / "jobs" / key) for key in "ab"], ended)
    killed: list[int] = []

    def tick() -> None:
        if not killed and slot(tmp_path).get("child"):
            killed.append(slot(tmp_path)["pid"])
            os.kill(killed[0], signal.SIGKILL)

    run_jobs(run, tick)
    assert killed and ended == {"a": None, "b": None} and slot(tmp_path)["pid"] != killed[0]
    assert [len(marks(tmp_path, key, "began")) for key in "ab"] == [1, 1]


def test_a_job_waits_for_what_it_needs_and_stops_when_that_failed(tmp_path):
    ended: dict[str, Any] = {}
    good = Job("good", launched.count, {"seconds": 0.5}, tmp_path / "jobs" / "good")
    bad = Job("bad", launched.fail_and_say_why, {}, tmp_path / "jobs" / "bad")
    after = [
        Job(f"after {job.key}", launched.count, {}, tmp_path / "jobs" / f"after-{job.key}", needs=(job.folder,))
        for job in (good, bad)
    ]
    run_jobs(make(tmp_path, [*after, good, bad], ended, workers=2), lambda: None)
    assert ended["good"] is None and ended["after good"] is None and ended["bad"]["cause"] == "nan"
    assert ended["after bad"]["cause"] == "nan" and "shared work failed: step 3" in ended["after bad"]["message"]
    assert not marks(tmp_path, "after-bad", "began")
    finished = float(marks(tmp_path, "good", "ended")[0].split()[1])
    assert float(marks(tmp_path, "after-good", "began")[0].split()[1]) >= finished


def test_cancel_ends_workers_and_jobs_and_the_rest_can_be_run_later(tmp_path):
    ended: dict[str, Any] = {}
    jobs = [Job(key, launched.count, {"seconds": 30.0}, tmp_path / "jobs" / key) for key in "ab"]
    run = make(tmp_path, jobs, ended)
    until(lambda: slot(tmp_path).get("child") and marks(tmp_path, "a", "began"))
    child = slot(tmp_path)["child"]
    run.backend.cancel()
    until(lambda: not pool.is_locked(pool.slot_file(tmp_path / "pool", 0, ".lock")))
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert not any(job.succeeded or job.failed for job in jobs) and not marks(tmp_path, "b", "began")


def test_workers_that_never_come_up_are_told(tmp_path, monkeypatch):
    ended: dict[str, Any] = {}
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the job's module is not found there
    run_jobs(make(tmp_path, [Job("a", launched.count, {}, tmp_path / "jobs" / "a")], ended), lambda: None)
    assert "no worker could be started" in ended["a"]["message"] and "launched" in ended["a"]["traceback"]


def test_a_job_that_takes_its_worker_along_is_given_up(tmp_path):
    ended: dict[str, Any] = {}
    run_jobs(
        make(tmp_path, [Job("a", launched.take_the_worker_along, {}, tmp_path / "jobs" / "a")], ended), lambda: None
    )
    assert ended["a"]["cause"] == "killed" and "no worker could be started that finishes a job" in ended["a"]["message"]
    assert marks(tmp_path, "a", "calls") == ["called"] * pool.IDLE_STARTS


def test_a_job_that_outlives_its_worker_is_stopped_with_the_others(tmp_path):
    run = make(tmp_path, [Job("a", launched.count, {"seconds": 60.0}, tmp_path / "jobs" / "a")], {})
    until(lambda: slot(tmp_path).get("child") and marks(tmp_path, "a", "began"))
    os.kill(slot(tmp_path)["pid"], signal.SIGKILL)
    run.backend.cancel()
    until(lambda: not pool.is_locked(pool.slot_file(tmp_path / "pool", 0, ".lock")))
    assert not marks(tmp_path, "a", "ended")


def test_a_job_says_more_than_the_launcher(tmp_path):
    (tmp_path / "error.json").write_text('{"cause": "oom", "message": "out of memory"}')
    told = failure(Job("a", launched.count, {}, tmp_path), "killed", "ended", "log")
    assert (told["cause"], told["message"], told["log"]) == ("oom", "out of memory", "log")
