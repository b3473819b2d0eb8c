"""Slots over submitit's real local executor, and jobs in this process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launched
import pytest
import submitit.core.core

from ablations.launch import pool
from ablations.launch.backend import JobRun, make_backend, run_jobs
from ablations.launch.gpus import slots
from ablations.launch.job import Job
from ablations.launch.processes import thread_environment
from ablations.question.settings import Launcher
from iris.errors import SettingError

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find the package and the job functions; slots are looked at often."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
    monkeypatch.setattr(pool.Pool, "poll_seconds", 0.05)
    # How long submitit waits for the result of a process that has died without one.
    monkeypatch.setattr(submitit.core.core.Job, "_results_timeout_s", 1)


def launcher(name: str = "local", **changes: Any) -> Launcher:
    """Settings of a launcher; unchecked, so that a time limit may be seconds."""
    return Launcher(**{"name": name, "workers": 1, "timeout_min": 5, "interrupt": "detach", "signal_s": 30} | changes)


class Seen:
    """Runs jobs and keeps what the launcher says of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started, self.ended, self.ticks = folder, [], {}, 0

    def job(self, key: str, function: Callable[[str, dict[str, Any]], None], **plan: Any) -> Job:
        return Job(key, function, plan, self.folder / key)

    def run(self, jobs: list[Job], chosen: Launcher, threads: int = 1) -> dict[str, dict[str, str] | None]:
        run = JobRun(
            jobs,
            make_backend(chosen, self.folder, threads),
            lambda job: self.started.append(job.key),
            lambda job, error: self.ended.update({job.key: error}),
        )
        run_jobs(run, self._tick)
        return self.ended

    def _tick(self) -> None:
        self.ticks += 1

    def result(self, key: str) -> dict[str, Any]:
        return json.loads((self.folder / key / "result.json").read_text())


@pytest.fixture
def seen(tmp_path: Path) -> Seen:
    return Seen(tmp_path)


def most_at_once(spans: list[tuple[float, float]]) -> int:
    return max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)


@pytest.mark.parametrize("workers", [1, 2])
def test_never_more_at_once_than_workers(seen, workers):
    keys = [f"job{i}" for i in range(4)]
    ended = seen.run([seen.job(key, launched.finish, seconds=0.4) for key in keys], launcher(workers=workers))
    started = seen.started if workers == 1 else sorted(seen.started)  # two begin at the same time
    assert ended == dict.fromkeys(keys) and started == keys and seen.ticks > 4
    spans = [(seen.result(key)["start"], seen.result(key)["end"]) for key in keys]
    assert most_at_once(spans) <= workers
    processes = {seen.result(key)["pid"] for key in keys}
    assert len(processes) == 4 and os.getpid() not in processes


def test_failures_are_told_with_cause_and_log_and_the_others_go_on(seen):
    jobs = [
        seen.job("told", launched.fail_and_say_why),
        seen.job("killed", launched.be_killed),
        seen.job("silent", launched.fail_silently),
        seen.job("good", launched.finish, seconds=0),
    ]
    ended = seen.run(jobs, launcher(workers=2))
    assert ended["good"] is None and seen.result("good")["plan"] == {"seconds": 0}
    assert (ended["told"]["cause"], ended["told"]["kind"]) == ("nan", "NonFiniteLoss")
    assert ended["told"]["message"] == "step 3: loss nan"
    assert ended["killed"]["cause"] == "killed" and "killed from outside" in ended["killed"]["message"]
    for key in ("told", "killed", "silent"):
        assert {"cause", "kind", "message", "traceback", "log"} <= ended[key].keys()
        assert Path(ended[key]["log"]).is_file()
    assert "no error.json from me" in ended["silent"]["traceback"]
    assert len({ended[key]["log"] for key in ("told", "killed", "silent")}) == 3
    assert (seen.folder / "told" / "calls").read_text() == "called\n"


def test_a_job_that_raised_is_not_called_killed(seen):
    assert seen.run([seen.job("silent", launched.fail_silently)], launcher())["silent"]["cause"] == "error"


def test_an_old_error_is_forgotten(seen):
    (seen.folder / "again").mkdir()
    (seen.folder / "again" / "error.json").write_text('{"cause": "nan", "message": "of an earlier run"}')
    assert seen.run([seen.job("again", launched.be_killed)], launcher())["again"]["cause"] == "killed"


def test_a_job_over_its_time_is_a_timeout(seen):
    ended = seen.run([seen.job("slow", launched.sleep_long)], launcher(timeout_min=0.02))
    assert ended["slow"]["cause"] == "timeout" and "launcher.timeout_min" in ended["slow"]["message"]
    assert Path(ended["slow"]["log"]).is_file()


def test_threads_sleep_while_they_wait_and_this_process_is_left_alone(seen, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    seen.run([seen.job("job", launched.finish)], launcher(), threads=3)
    environment = seen.result("job")["environment"]
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "3"
    assert thread_environment(3).items() <= environment.items() | {"TOKENIZERS_PARALLELISM": "false"}.items()
    assert os.environ["OMP_NUM_THREADS"] == "7" and "OMP_WAIT_POLICY" not in os.environ


def visible(result):
    return result["environment"]["CUDA_VISIBLE_DEVICES"]


@pytest.mark.parametrize("names", ["0,1", "5,3", "GPU-8932f937,GPU-0aa4"])
def test_each_slot_has_its_own_of_the_visible_gpus(seen, monkeypatch, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    keys = [f"job{i}" for i in range(4)]
    seen.run([seen.job(key, launched.finish, seconds=0.3) for key in keys], launcher(workers=3, gpus_per_trial=1))
    results = [seen.result(key) for key in keys]
    assert {visible(result) for result in results} == set(names.split(","))
    for gpu in names.split(","):
        spans = [(result["start"], result["end"]) for result in results if visible(result) == gpu]
        assert most_at_once(spans) == 1  # three workers are allowed, and two have a GPU


@pytest.mark.parametrize(
    ("device", "names", "changes", "expected"),
    [
        ("cpu", "0,1", {}, [[], []]),
        ("auto", "3", {}, [["3"]]),  # on a GPU, not in silence on the processor
        ("auto", "", {}, [[], []]),
        ("auto", "-1", {}, [[], []]),
        ("cuda", "3", {"trials_per_gpu": 2}, [["3"], ["3"]]),
        ("cuda", "3,4,7", {"workers": 8}, [["3"], ["4"], ["7"]]),
    ],
)
def test_gpus_of_slots(monkeypatch, device, names, changes, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    assert slots(launcher(**{"workers": 2} | changes), device) == expected


def test_gpus_that_are_not_there_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    backend = make_backend(launcher(), tmp_path, 1, "cuda")  # as a report makes it, which needs none
    with pytest.raises(SettingError, match="compute.device=cuda: no GPUs"):
        backend.begin([])
    for device, changes, named in (
        ("cuda", {}, "compute.device=cuda"),
        ("auto", {"gpus_per_trial": 1}, "launcher.gpus_per_trial=1"),
    ):
        with pytest.raises(SettingError, match=f"{named}: no GPUs are visible here .CUDA_VISIBLE_DEVICES=.; allowed"):
            slots(launcher(**changes), device)


def test_set_up_commands_run_before_a_job(seen):
    seen.run([seen.job("job", launched.finish)], launcher(setup=["export IRIS_TEST_SETUP=done"]))
    assert seen.result("job")["environment"]["IRIS_TEST_SETUP"] == "done"


def test_inline_runs_in_this_process(seen):
    ended = seen.run([seen.job("one", launched.finish), seen.job("two", launched.finish)], launcher("inline"))
    assert ended == {"one": None, "two": None}
    assert {seen.result(key)["pid"] for key in ended} == {os.getpid()}


@pytest.fixture
def no_debugger(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """submitit opens pdb when its debug executor's job failed; this only notes that it did."""
    import pdb

    opened: list[str] = []
    monkeypatch.setattr(pdb, "post_mortem", lambda *a: opened.append("opened"))
    return opened


def test_inline_failures_are_told_and_the_others_go_on(seen, no_debugger):
    jobs = [seen.job("told", launched.fail_and_say_why), seen.job("good", launched.finish)]
    ended = seen.run(jobs, launcher("inline"))
    assert ended["good"] is None
    assert (ended["told"]["cause"], ended["told"]["message"]) == ("nan", "step 3: loss nan")
    assert (seen.folder / "told" / "calls").read_text() == "called\n"
    assert Path(ended["told"]["log"]).is_file()


def test_nothing_is_submitted_while_squeue_does_not_answer(tmp_path, monkeypatch):
    """A living job of an earlier driver would be submitted a second time."""
    from ablations.launch import slurm
    from iris.errors import SettingError

    asked: list[int] = []
    monkeypatch.setattr(slurm, "ASK_AGAIN", (0.0, 0.0))
    monkeypatch.setattr(slurm, "listed_jobs", lambda others: asked.append(1))
    backend = slurm.Slurm(launcher("slurm"), tmp_path, 1)
    with pytest.raises(SettingError, match="squeue does not answer; nothing was submitted"):
        backend.begin([Job("job", launched.finish, {}, tmp_path / "job")])
    assert len(asked) == 3 and not backend.ids
