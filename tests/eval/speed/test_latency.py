import os
import subprocess
import sys

import numpy as np
import pytest

from eval.speed.latency import Contention, _summary, measure_models, median_interval, visiting_order
from eval.speed.process import processor_seconds
from eval.speed.workers import Loader, Worker, WorkerError, worker_environment


def test_models_run_in_turn_and_are_told_apart(tmp_path):
    log = tmp_path / "log"
    loaders = {
        name: Loader("measured_models:sleeping", {"ms": ms, "name": name, "log": str(log)})
        for name, ms in (("fast", 5), ("slow", 20))
    }
    results = measure_models(loaders, rounds=4, warmup=1)
    calls = log.read_text().split()
    # two images for memory and one for activations each, one warm-up round, then there and back
    assert calls == ["fast"] * 3 + ["slow"] * 3 + ["fast", "slow"] + ["fast", "slow", "slow", "fast"] * 2
    fast, slow = results["fast"].latency, results["slow"].latency
    assert fast.ratio_to_first == 1.0 and slow.ratio_to_first > 1.0
    for latency in (fast, slow):
        assert 0 < latency.q1_ms <= latency.median_ms <= latency.q3_ms
        assert latency.n == len(latency.times_ms) == 4 and latency.threads == 1 and latency.device == "cpu"
        assert latency.contended == bool(latency.reasons)
    assert results["fast"].memory.weights_mb == 12.0 and results["fast"].memory.peak_memory_mb > 0


def test_order_goes_there_and_back():
    assert visiting_order(3, 3) == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]


def test_ratio_is_taken_inside_a_round():
    first, second = np.array([10.0, 20.0, 40.0, 10.0]), np.array([20.0, 40.0, 80.0, 20.0])
    result = _summary(second, first, second, 1, "cpu", [])
    assert result.ratio_to_first == result.ratio_q1 == result.ratio_q3 == 2.0
    assert result.contended and "interquartile" in result.reasons[0]
    quiet = _summary(np.full(4, 10.0), first, second, 1, "cpu", [])
    assert not quiet.contended and quiet.reasons == ()
    assert _summary(np.full(4, 10.0), first, second, 1, "cpu", ["load"]).reasons == ("load",)


def test_a_medians_interval_is_that_of_order_statistics():
    """Of ten values the lowest and the highest enclose the median with 1 - 2 / 2^10; fewer than eight cannot reach 99 %."""
    values = np.arange(10.0)
    assert median_interval(values) == (0.0, 9.0) and median_interval(values[:7]) is None
    assert median_interval(values, 0.95) == (1.0, 8.0)  # 1 - 2 * 11 / 1024 = 97.9 %
    draws = np.random.default_rng(0).exponential(size=(2000, 30))
    held = [low <= np.log(2) <= high for low, high in map(median_interval, draws)]
    assert 0.985 <= np.mean(held) <= 1


def test_contention_blames_others_only(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.1, 0.1))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    machine, used, clock = [(100.0, 0.0)], [10.0], [0.0]
    monkeypatch.setattr("eval.speed.latency.machine_seconds", lambda: machine[0])
    monkeypatch.setattr("eval.speed.latency.processor_seconds", lambda pid: used[0])
    monkeypatch.setattr("eval.speed.latency.time.perf_counter", lambda: clock[0])
    watch = Contention([1])
    clock[0], machine[0], used[0] = 10.0, (110.0, 0.0), 20.0
    assert watch.reasons() == []
    machine[0] = (115.0, 2.0)
    assert [word for reason in watch.reasons() for word in ("other processes", "hypervisor") if word in reason] == [
        "other processes",
        "hypervisor",
    ]
    monkeypatch.setattr(os, "getloadavg", lambda: (2.5, 0.1, 0.1))
    assert "load average is 2.5 on 2 cores" in watch.reasons()[0]


def test_a_loading_process_beside_marks_the_rows():
    loaders = {"model": Loader("measured_models:computing", 0.2)}
    other = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
    try:
        latency = measure_models(loaders, rounds=4, warmup=0)["model"].latency
        assert processor_seconds(other.pid) > 0
    finally:
        other.kill()
        other.wait()
    assert latency.contended
    assert any(f"of {os.cpu_count()} processors busy" in reason for reason in latency.reasons), latency.reasons


def test_processor_time_has_a_ratio_of_its_own():
    wall, used = np.array([10.0, 10.0]), np.array([4.0, 8.0])
    result = _summary(wall, wall, used, 1, "cpu", [], np.array([2.0, 2.0]))
    assert result.ratio_to_first == 1.0 and result.processor_ratio == 3.0 and result.processor_ms == 6.0
    assert _summary(wall, wall, used, 1, "cpu", [], np.zeros(2)).processor_ratio is None


def test_a_failing_model_is_named_with_its_stderr():
    with pytest.raises(WorkerError, match="(?s)arm seven.*RuntimeError: the checkpoint is missing.*Traceback"):
        measure_models({"arm seven": Loader("measured_models:failing", "load")}, rounds=2)


def test_a_dying_model_is_named_with_its_stderr():
    with pytest.raises(WorkerError, match=r"(?s)arm eight: the process died.*\(exit status 3\).*last words"):
        measure_models({"arm eight": Loader("measured_models:failing", "generate")}, rounds=2)


def test_a_late_model_is_stopped():
    with pytest.raises(WorkerError, match='arm nine: no answer to "load" in 0.2 s'):
        Worker("arm nine", Loader("time:sleep", 60), threads=1, timeout=0.2)


def test_threads_do_not_spin():
    environment = worker_environment(3)
    assert environment["OMP_NUM_THREADS"] == "3" and environment["OMP_WAIT_POLICY"] == "PASSIVE"


def test_bad_settings():
    loader = Loader("time:sleep", 1)
    for kwargs in ({"rounds": 1}, {"warmup": -1}):
        with pytest.raises(ValueError, match="rounds >= 2"):
            measure_models({"a": loader}, **kwargs)
    with pytest.raises(ValueError, match="threads"):
        measure_models({"a": loader}, threads=0)
    with pytest.raises(ValueError, match="module:function"):
        Loader("time.sleep")
    with pytest.raises(ValueError, match="must be JSON"):
        measure_models({"a": Loader("time:sleep", object())})
