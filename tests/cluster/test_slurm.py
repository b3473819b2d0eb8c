"""The launcher on a real Slurm: arrays, limits, dependencies, requeues, and every way in which a job can end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import slurm_jobs
from slurm_jobs import SCRIPT

from ablations.launch import slurm
from ablations.launch.backend import JobRun, run_jobs
from ablations.launch.job import Job
from ablations.question.settings import Launcher
from iris.errors import SettingError
from iris.io.files import read_json

pytestmark = pytest.mark.slow
# Steps of 0.2 s: more than a minute, in which a job of a minute that is told to stop 30 s before that cannot be through.
PATIENT = 350


@pytest.fixture(scope="session", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slurm, "ASK_SECONDS", 0.3)
        patch.setattr(slurm, "SETTLE_SECONDS", 3.0)
        yield


either_way = pytest.mark.parametrize("cluster", ["none"], indirect=True, ids=["no accounting"])


class Place:
    """Jobs of one test and what became of them."""

    def __init__(self, root: Path, **changes: Any) -> None:
        self.root, self.ended, self.started = root, dict[str, Any](), []
        small = {"workers": 4, "timeout_min": 15, "memory_gb": 1, "signal_s": 30}
        self.backend = slurm.Slurm(Launcher(name="slurm", **small | changes), root, 1)

    def job(
        self,
        key: str,
        function: Callable[..., None],
        needs: tuple[Path, ...] = (),
        how: dict[str, bool] | None = None,
        **plan: Any,
    ) -> Job:
        return Job(key, function, plan, self.root / "jobs" / key, needs, **(how or {}))

    @property
    def scripts(self) -> list[str]:
        return [path.read_text() for path in (self.root / "logs").glob("*/*_submission.sh")]

    def begin(self, jobs: list[Job]) -> JobRun:
        return JobRun(
            jobs,
            self.backend,
            lambda job: self.started.append(job.key),
            lambda job, error: self.ended.update({job.key: error}),
        )

    def run(self, jobs: list[Job], tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
        run_jobs(self.begin(jobs), tick)
        return self.ended

    def result(self, key: str) -> dict[str, Any]:
        return json.loads((self.root / "jobs" / key / "result.json").read_text())

    def parts(self, key: str) -> list[list[str]]:
        path = self.root / "jobs" / key / "parts"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def counted(self, key: str) -> int:
        path = self.root / "jobs" / key / "counted"
        return int(path.read_text()) if path.exists() else 0

    def number(self, key: str) -> str:
        return (read_json(self.root / "jobs" / key / "job.json") or {})["id"]


@pytest.fixture
def place(cluster: Path, tmp_path: Path) -> Place:
    return Place(tmp_path)


def command(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout


def once(when: Callable[[], bool], act: Callable[[], Any]) -> Callable[[], None]:
    """A tick that acts the first time that ``when`` holds."""
    done: list[bool] = []

    def tick() -> None:
        if not done and when():
            done.append(True)
            act()

    return tick


# -- every way to end, all jobs at once --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ends(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Jobs that are requeued, preempted, told to stop, cancelled, too large, broken or too slow, beside one left alone."""
    root = tmp_path_factory.mktemp("ends")
    place, short = Place(root, workers=8), Place(root, timeout_min=1, requeues=0, signal_s=30)
    patient = Place(root, timeout_min=1, requeues=5, signal_s=30)
    # Of one node's memory there is enough for one of these.
    low, high = (Place(root, memory_gb=3, partition=name, sbatch={"nodelist": "node3"}) for name in ("debug", "high"))
    others = [
        short.begin([short.job("slow", slurm_jobs.count_up, to=10_000)]),
        patient.begin([patient.job("patient", slurm_jobs.count_up, to=PATIENT)]),
        low.begin([low.job("preempted", slurm_jobs.count_up, to=40)]),
    ]
    counting = {"requeued": 40, "stopped": 40, "early": 25, "cancelled": 10_000, "alone": 20}
    run = place.begin(
        [
            *(place.job(key, slurm_jobs.count_up, to=number) for key, number in counting.items()),
            place.job("large", slurm_jobs.fill_memory),
            place.job("broken", slurm_jobs.raise_an_error),
        ]
    )
    acts = [
        once(
            lambda: place.counted("preempted") >= 5,
            lambda: others.append(high.begin([high.job("urgent", slurm_jobs.count_up, to=5)])),
        ),
        once(lambda: place.counted("requeued") >= 5, lambda: command("scontrol", "requeue", place.number("requeued"))),
        once(
            lambda: place.counted("stopped") >= 5, lambda: command("scancel", place.number("stopped"), "--signal=USR2")
        ),
        once(
            lambda: "early" in place.backend.running(),
            lambda: command("scancel", place.number("early"), "--signal=USR2"),
        ),
        once(lambda: place.counted("cancelled") >= 2, lambda: command("scancel", place.number("cancelled"))),
    ]

    def tick() -> None:
        for act in acts:
            act()
        for other in others:
            other.look()

    run_jobs(run, tick)
    for other in others:
        run_jobs(other, tick)
    for other in (short, patient, low, high):
        place.ended |= other.ended
    return place


def test_a_job_beside_others_that_fail_is_left_alone(ends):
    assert ends.ended["alone"] is None and ends.result("alone") == {"counted": 20} and len(ends.parts("alone")) == 1


def test_a_requeued_job_goes_on_where_it_was(ends):
    assert ends.ended["requeued"] is None and ends.result("requeued") == {"counted": 40}
    assert len(ends.parts("requeued")) == 2 and ends.started.count("requeued") == 1


def test_a_job_told_to_stop_before_its_time_is_over_is_queued_again(ends):
    assert (
        ends.ended["stopped"] is None and ends.result("stopped") == {"counted": 40} and len(ends.parts("stopped")) == 2
    )


def test_a_job_told_to_stop_while_it_starts_is_not_lost(ends):
    assert ends.ended["early"] is None and ends.result("early") == {"counted": 25}


def test_a_cancelled_job_is_told(ends):
    assert ends.ended["cancelled"]["cause"] == "killed" and Path(ends.ended["cancelled"]["log"]).exists()


def test_a_job_over_its_memory_is_told(ends):
    assert ends.ended["large"]["cause"] == "oom" and "launcher.memory_gb" in ends.ended["large"]["message"]


def test_a_job_that_raises_is_told_with_its_reason(ends):
    assert (
        ends.ended["broken"]["cause"] == "error"
        and ends.ended["broken"]["message"] == "ValueError: this job's own reason"
    )


def test_a_job_over_its_time_is_told(ends):
    assert ends.ended["slow"]["cause"] == "timeout" and "launcher.timeout_min" in ends.ended["slow"]["message"]


def test_a_job_over_its_time_is_queued_again_and_goes_on(ends):
    assert (
        ends.ended["patient"] is None
        and ends.result("patient") == {"counted": PATIENT}
        and len(ends.parts("patient")) >= 2
    )


def test_a_preempted_job_is_queued_again_and_goes_on(ends):
    assert ends.ended["urgent"] is None and ends.parts("urgent")[0][0] == "node3"
    assert (
        ends.ended["preempted"] is None
        and ends.result("preempted") == {"counted": 40}
        and len(ends.parts("preempted")) == 2
    )


# -- what accounting makes no difference to ----------------------------------------------------------------------------


@either_way
def test_an_array_with_a_limit_and_what_a_job_is_given(cluster, tmp_path):
    wrapper = tmp_path / "wrapper.sh"
    wrapper.write_text(f'IRIS_WRAPPED=yes exec {sys.executable} "$@"\n')
    place = Place(
        tmp_path,
        workers=2,
        gpus_per_trial=1,
        setup=["export IRIS_TEST_SETUP=done"],
        python=f"bash {wrapper}",
        account="lab",
        sbatch={"comment": "ablation"},
    )
    jobs = [place.job(f"job{i}", slurm_jobs.say) for i in range(5)]
    assert place.run(jobs) == dict.fromkeys(job.key for job in jobs)
    results = [place.result(job.key) for job in jobs]
    assert len({result["SLURM_ARRAY_JOB_ID"] for result in results}) == 1
    assert all(result["OMP_NUM_THREADS"] == "1" and result["IRIS_TEST_SETUP"] == "done" for result in results)
    assert {result["CUDA_VISIBLE_DEVICES"] for result in results} <= {"0", "1"}
    assert {result["IRIS_WRAPPED"] for result in results} == {"yes"}
    script = place.scripts[0]
    for words in ("--array=0-4%2", "--gpus-per-node=1", "--account=lab", "--comment=ablation"):
        assert words in script


@either_way
def test_speed_is_measured_on_the_kind_of_node_asked_for_alone(cluster, tmp_path):
    place = Place(tmp_path, speed_constraint="fast")
    assert place.run([place.job("job", slurm_jobs.say, how={"exclusive": True})]) == {"job": None}
    assert place.result("job")["SLURMD_NODENAME"] == "node0"
    assert all(f"--{words}\n" in place.scripts[0] for words in ("exclusive", "constraint=fast", "mem=0"))


@either_way
def test_a_trial_has_a_process_for_each_of_its_gpus(cluster, tmp_path):
    place = Place(tmp_path, gpus_per_trial=2)
    jobs = [place.job("trial", slurm_jobs.say, how={"spread": True}), place.job("shared", slurm_jobs.say)]
    assert place.run(jobs) == {"trial": None, "shared": None}
    assert place.result("trial")["SLURM_NTASKS"] == "2" and place.result("trial")["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert place.result("shared")["SLURM_NTASKS"] == "1"


@either_way
def test_two_drivers_that_start_at_once_submit_each_job_once(cluster, tmp_path):
    drivers = [Place(tmp_path) for _ in range(2)]
    jobs = [drivers[0].job(f"job{i}", slurm_jobs.count_up, to=10) for i in range(3)]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda driver: driver.backend.begin(jobs), drivers))
    assert drivers[0].backend.ids == drivers[1].backend.ids
    assert drivers[0].run(jobs) == dict.fromkeys(job.key for job in jobs)
    assert all(len(drivers[0].parts(job.key)) == 1 for job in jobs)


@either_way
def test_jobs_wait_for_what_they_need(place):
    first = place.job("first", slurm_jobs.count_up, to=5)
    after = [place.job(f"after{i}", slurm_jobs.say, needs=(first.folder,)) for i in range(2)]
    assert place.run([*after, first]) == {"first": None, "after0": None, "after1": None}
    assert next(iter(place.ended)) == "first"
    assert any(f"--dependency=afterany:{place.number('first')}" in script for script in place.scripts)


@either_way
def test_a_job_of_a_node_that_dies_moves(cluster, place):
    job = place.job("job", slurm_jobs.count_up, to=40)
    lost: list[str] = []

    def die() -> None:
        """Kill all that makes up the node, and let the controller know at once instead of after SlurmdTimeout."""
        node, process = place.parts("job")[0]
        lost.append(node)
        subprocess.run(["pkill", "-9", "-f", f"slurmstepd.*{place.number('job')}"], check=False)
        for number in ((cluster / f"slurmd.{node}.pid").read_text(), process):
            subprocess.run(["kill", "-9", number.strip()], check=False)
        command("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    try:
        assert place.run([job], once(lambda: place.counted("job") >= 5, die)) == {"job": None}
    finally:
        for node in lost:
            command("bash", str(SCRIPT), "node", node, str(cluster))
    assert place.result("job") == {"counted": 40}
    assert place.parts("job")[0][0] == lost[0] != place.parts("job")[-1][0]


@either_way
def test_a_second_driver_takes_over_what_the_first_submitted(place):
    job = place.job("job", slurm_jobs.count_up, to=20)
    place.backend.begin([job])  # and this driver is gone
    other = Place(place.root)
    assert other.run([job]) == {"job": None}
    assert other.number("job") == place.backend.ids["job"] and len(place.parts("job")) == 1


@either_way
def test_a_queued_job_of_another_user_is_followed_not_submitted_again(place):
    jobs = [place.job(name, slurm_jobs.nothing) for name in ("theirs", "lost")]
    held = command(
        "sbatch", "--parsable", "--hold", "--uid=nobody", "--chdir=/tmp", "--output=/dev/null", "--wrap=sleep 60"
    ).strip()
    for job, number, user in zip(jobs, (held, "1"), ("nobody", "a-user-of-another-machine"), strict=True):
        job.folder.mkdir(parents=True)
        (job.folder / "job.json").write_text(json.dumps({"id": number, "log": "", "time": 0, "user": user}))

    def end() -> None:
        assert place.backend.places()["theirs"] == "JobHeldUser"
        command("scancel", held)
        (jobs[0].folder / "result.json").write_text("{}")

    try:
        assert place.run(jobs, once(lambda: "lost" in place.ended, end)) == {"theirs": None, "lost": None}
    finally:
        command("scancel", held)
    assert place.backend.ids["theirs"] == held and place.number("lost") != "1"


@either_way
def test_cancel_ends_what_is_queued_and_what_runs(place):
    jobs = [place.job(f"job{i}", slurm_jobs.count_up, to=10_000) for i in range(6)]
    place.backend.begin(jobs)
    deadline = time.monotonic() + 60
    while not place.backend.running() and time.monotonic() < deadline:
        time.sleep(0.2)
    place.backend.cancel()
    while command("squeue", "--noheader", "--user=root") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not command("squeue", "--noheader", "--user=root")


@either_way
def test_what_the_cluster_refuses_names_the_settings(cluster, tmp_path):
    place = Place(tmp_path, partition="nowhere")
    with pytest.raises(SettingError, match="launcher=slurm: sbatch refused.*launcher.partition"):
        place.run([place.job("job", slurm_jobs.nothing)])
