"""Hard caps on real processes: what holds, what does not, and what is neither."""

import os
import sys
from pathlib import Path

import pytest

from eval.speed.caps import CapError, CapResult, _write_limit, cap_table, caps_held, proven, reason
from eval.speed.workers import Loader

NEEDS = 120  # MB
# it keeps what it has for a while, because memory is sampled
ALLOCATES = [sys.executable, "-S", "-c", f"import time; x = bytearray({NEEDS}_000_000); time.sleep(0.5)"]
STARTS = [sys.executable, "-S", "-c", "pass"]


@pytest.mark.parametrize("method", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_a_command_under_caps(method):
    results = caps_held(ALLOCATES, (60, 300), method, baseline=STARTS)
    held = {(one.scope, round(one.cap_mb)): one.held for one in results}
    half = round(results[-1].cap_mb)
    assert held == {
        ("process", 60): False,
        ("process", 300): True,
        ("above import", 60): False,
        ("above import", 300): True,
        ("control", half): False,
    }
    assert half == pytest.approx(NEEDS / 2, abs=15) and proven(results)
    for one in results:
        assert one.method == method and one.limit_mb >= one.cap_mb and one.why
        if one.held:
            assert one.peak_mb == pytest.approx(NEEDS + 10, abs=10) and NEEDS < one.charged_mb <= one.limit_mb
        else:
            assert "MemoryError" in one.why
    table = cap_table(results)
    assert len(table) == 2 + len(results) and table[2].count("|") == table[0].count("|")


@pytest.mark.slow
def test_a_model_under_caps():
    results = caps_held(Loader("measured_models:allocating", 200), (150, 600))
    by_scope = {(one.scope, one.cap_mb): one for one in results if one.scope == "above import"}
    assert not by_scope["above import", 150].held and "allocate memory" in by_scope["above import", 150].why
    assert by_scope["above import", 600].held and by_scope["above import", 600].peak_mb > 200
    imported = by_scope["above import", 600].limit_mb - 600
    assert imported > 0 and proven(results)
    assert results[-1].cap_mb == pytest.approx(100, abs=30)
    process = [one for one in results if one.scope == "process"]
    assert [one.limit_mb for one in process] == [150, 600] and not process[0].held


def test_without_a_baseline_only_the_process_is_capped_and_the_control_is_half_of_all():
    results = caps_held(ALLOCATES, (300,))
    assert [one.scope for one in results] == ["process", "control"] and proven(results)


def test_another_failure_is_an_error():
    fails = "import sys, resource; sys.exit(0 if resource.getrlimit(resource.RLIMIT_DATA)[0] < 0 else 'no such file')"
    with pytest.raises(CapError, match="another reason than memory.*(?s:.*)no such file"):
        caps_held([sys.executable, "-S", "-c", fails], (300,))
    with pytest.raises(CapError, match="without a cap the run fails.*(?s:.*)broken"):
        caps_held([sys.executable, "-S", "-c", "raise SystemExit('broken')"], (300,))
    with pytest.raises(CapError, match="the baseline fails"):
        caps_held(STARTS, (300,), baseline=[sys.executable, "-S", "-c", "raise SystemExit(1)"])
    with pytest.raises(CapError, match="more than 0.5 s"):
        caps_held([sys.executable, "-S", "-c", "import time; time.sleep(60)"], (300,), timeout=0.5)


@pytest.mark.parametrize(
    "text",
    [
        "RuntimeError: [enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried",
        "MemoryError",
        "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc",
        "ImportError: libtorch_cpu.so: failed to map segment from shared object",
        "OSError: [Errno 12] Cannot allocate memory",
        "XNN Runtime creation failed with code: xnn_status_out_of_memory",
        "RuntimeError: unable to mmap 335545088 bytes from file",
        "RuntimeError: can't start new thread",
        "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 1.00 GiB for an array",
        "libgomp: Thread creation failed: Resource temporarily unavailable",
        "onnxruntime: bfc_arena.cc Failed to allocate memory for requested buffer of size 4194304",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
    ],
)
def test_what_runtimes_say(text):
    found = reason(f"exit status 1; its stderr ends:\nTraceback\n{text}")
    assert found.strip("…") in text


def test_what_says_nothing_about_memory():
    with pytest.raises(CapError, match="KeyError"):
        reason("exit status 1; its stderr ends:\nKeyError: 'memory'", None)
    with pytest.raises(CapError, match="signal 15"):
        reason("signal 15; its stderr ends:\n", 15)
    assert "SIGKILL" in reason("signal 9; its stderr ends:\n", 9)
    long = "x" * 500 + " DefaultCPUAllocator: can't allocate memory: you tried " + "y" * 500
    assert "can't allocate" in reason(long) and len(reason(long)) < 200


def test_caps_without_a_control_prove_nothing():
    def row(scope, held):
        return CapResult(600, scope, 600, "RLIMIT_DATA", held, 1.0, 1.0, "")

    assert not proven([row("process", True)])
    assert not proven([row("process", True), row("control", True)])
    assert proven([row("process", True), row("control", False)])


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"caps_mb": ()}, "caps_mb"),
        ({"caps_mb": (0,)}, "caps_mb"),
        ({"method": "RLIMIT_RSS"}, "RLIMIT_DATA, RLIMIT_AS, cgroup"),
        ({"start": []}, "start must be"),
        ({"start": "python"}, "start must be"),
        ({"method": "cgroup"}, "group goes with"),
        ({"group": Path("/")}, "group goes with"),
        ({"method": "cgroup", "group": Path("/nowhere")}, "is not a cgroup"),
    ],
)
def test_bad_arguments(kwargs, named):
    with pytest.raises(ValueError, match=named):
        caps_held(**{"start": STARTS} | kwargs)


@pytest.mark.parametrize(
    ("files", "written"),
    [
        (("memory.max", "memory.swap.max"), {"memory.max": "5", "memory.swap.max": "0"}),
        (
            ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
            {"memory.limit_in_bytes": "5", "memory.memsw.limit_in_bytes": "5"},
        ),
        (("memory.max",), {"memory.max": "5"}),
    ],
)
def test_a_groups_limit_is_set_by_the_names_of_its_version(tmp_path, files, written):
    for name in files:
        (tmp_path / name).touch()
    _write_limit(tmp_path, 5)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == written


def test_a_group_without_the_memory_controller_is_refused(tmp_path):
    with pytest.raises(ValueError, match="memory controller"):
        _write_limit(tmp_path, 5)


@pytest.mark.skipif("EVAL_CGROUP" not in os.environ, reason="EVAL_CGROUP names no memory group that tests may use")
def test_a_command_in_a_cgroup():
    results = caps_held(ALLOCATES, (60, 300), "cgroup", baseline=STARTS, group=Path(os.environ["EVAL_CGROUP"]))
    assert [one.held for one in results if one.scope == "process"] == [False, True] and proven(results)
