"""Commands that look at a runs folder: show, diff, gc, and a grid's status and cancel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ablations import diff, gc, show
from ablations.launch.heartbeat import Listener, heartbeat
from ablations.launch.pool import try_lock
from ablations.launch.trial_state import state_of
from ablations.session import actions
from ablations.session.grid_record import CANCELLED, Entry, GridRecord, load_record, record_path
from iris.errors import SettingError

VALUES = {
    "grid": {"name": "mixers"},
    "model": {"dim": 64},
    "runs_dir": "",
    "launcher": {"name": "local"},
    "action": "status",
}


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def trial(runs: Path, key: str, dim: int = 64, fid: float | None = 3.0, stages: list[str] | None = None) -> Path:
    """A trial's folder as trials leave it; without FID it has failed."""
    folder = runs / "trials" / key
    write(folder / "settings.json", {"model": {"dim": dim, "mixer": "grfm"}, "seed": 0})
    write(folder / "status.json", {"state": "done", "phase": "done", "host": "here"})
    write(folder / "stages.json", stages or [])
    if fid is None:
        write(
            folder / "error.json",
            {"cause": "nan", "message": "step 3: loss nan", "traceback": "Traceback: of the trial"},
        )
    else:
        write(
            folder / "result.json",
            {"metrics": {"fid": fid, "samples": 96}, "seconds": {"train": 36.0}, "environment": {"cpu": "a"}},
        )
        (folder / "checkpoint.safetensors").write_bytes(b"x" * 2_000_000)
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors").write_bytes(b"x" * 1_000_000)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    trial(tmp_path, "aaaa11112222", stages=["data-1"])
    trial(tmp_path, "bbbb11112222", dim=128, fid=4.5, stages=["data-1"])
    trial(tmp_path, "bbbb33334444", fid=None)
    for key in ("data-1", "latent-old"):
        write(tmp_path / "stages" / key / "result.json", {})
    return tmp_path


def text(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_show_prints_settings_results_and_files(runs, capsys):
    assert show.main(["aaaa", f"runs_dir={runs}"]) == 0
    said = text(capsys)
    for part in (
        "trial aaaa11112222: done",
        "dim=64 mixer=grfm",
        "fid 3",
        "cpu a",
        "train, seconds 36.0",
        "checkpoint.safetensors 2.0 MB",
        "model 1.0 MB",
    ):
        assert part in said


def test_show_prints_why_a_trial_failed(runs, capsys):
    assert show.main(["bbbb3", f"runs_dir={runs}"]) == 0
    said = text(capsys)
    assert "failed, nan: step 3: loss nan" in said and "Traceback: of the trial" in said


@pytest.mark.parametrize(
    "words, part", [(["zzzz"], "is no trial in"), (["bbbb"], "is the beginning of bbbb11112222, bbbb33334444")]
)
def test_a_key_must_be_one_trial(runs, capsys, words, part):
    assert show.main([*words, f"runs_dir={runs}"]) == 2
    assert part in capsys.readouterr().err
    assert diff.main(["aaaa", *words, f"runs_dir={runs}"]) == 2


@pytest.mark.parametrize("command", [show.main, diff.main])
def test_other_words_print_the_usage(runs, capsys, command):
    assert command([]) == 2 and "KEY" in capsys.readouterr().err
    assert command(["a", "b", "c", "d=e"]) == 2


def test_diff_prints_only_what_differs(runs, capsys):
    assert diff.main(["aaaa", "bbbb1", f"runs_dir={runs}"]) == 0
    said = text(capsys)
    assert "model.dim 64 128 +100.0%" in said and "fid 3 4.5 +50.0%" in said and "made on: the same" in said
    assert "mixer" not in said and "samples" not in said


def test_gc_lists_before_it_deletes_and_keeps_results(runs, capsys):
    assert gc.main([f"runs_dir={runs}"]) == 0
    said = text(capsys)
    assert (
        "trials/aaaa11112222/checkpoint.safetensors 2.0 MB" in said and "4.0 MB would be deleted (add `delete`)" in said
    )
    assert (runs / "trials" / "aaaa11112222" / "checkpoint.safetensors").exists()
    assert gc.main(["delete", "keys=aaaa", f"runs_dir={runs}"]) == 0
    assert not (runs / "trials" / "aaaa11112222" / "checkpoint.safetensors").exists()
    assert (runs / "trials" / "bbbb11112222" / "checkpoint.safetensors").exists()
    assert {"result.json", "model", "settings.json"} <= {
        path.name for path in (runs / "trials" / "aaaa11112222").iterdir()
    }


def candidates(runs: Path, *words: str) -> set[str]:
    return {str(path.relative_to(runs)) for path in gc.candidates(gc.parse([*words, f"runs_dir={runs}"]))}


def test_gc_knows_what_is_failed_and_unused(runs):
    assert candidates(runs, "what=failed") == {"trials/bbbb33334444"}
    assert candidates(runs, "what=unused") == {"stages/latent-old"}
    assert candidates(runs, "what=trials", "keys=bbbb1") == {"trials/bbbb11112222"}
    write(runs / "stages" / "text-0123" / "settings.json", {})  # a model that python -m iris.training made
    write(runs / "stages" / "vae-0123" / "result.json", {})
    (runs / "stages" / "latents").mkdir()
    assert candidates(runs, "what=unused") == {"stages/latent-old"}
    (runs / "trials" / "aaaa11112222" / "stages.json").unlink()  # it may need any stage
    assert candidates(runs, "what=unused") == set()


def test_gc_keeps_what_waiting_trials_and_queued_jobs_need(runs):
    entry = Entry("cccc55556666", "grfm, seed 0", "trials/cccc55556666")
    record = GridRecord("mixers", "q", "c", "slurm", 1, [entry], [Entry("latent-old", "latent", "stages/latent-old")])
    record.save(runs / "grids" / "mixers-1.json")
    assert candidates(runs, "what=unused") == set()
    for number in ("7", "8"):
        write(runs / "logs" / number / "submitted.pkl", {})
    write(runs / "trials" / "cccc55556666" / "job.json", {"id": "7_0", "log": str(runs / "logs" / "7" / "7_0_log.err")})
    write(runs / "trials" / "cccc55556666" / "stages.json", [])
    assert candidates(runs, "what=unused") == {"logs/8"}
    write(runs / "trials" / "cccc55556666" / "result.json", {"metrics": {}})
    assert candidates(runs, "what=unused") == {"logs/7", "logs/8", "stages/latent-old"}


def test_gc_goes_by_age(runs):
    assert candidates(runs, "what=failed", "older=1h") == set()
    old = time.time() - 7200
    for path in (runs / "trials" / "bbbb33334444").iterdir():
        os.utime(path, (old, old))
    os.utime(runs / "trials" / "bbbb33334444", (old, old))
    assert candidates(runs, "what=failed", "older=1h") == {"trials/bbbb33334444"}


def test_gc_leaves_what_is_at_work(runs):
    lock = try_lock(runs / "trials" / "bbbb33334444" / "claim")
    assert candidates(runs, "what=failed") == set()
    lock.close()
    assert candidates(runs, "what=failed") == {"trials/bbbb33334444"}


@pytest.mark.parametrize(
    "words, part",
    [
        (["what=all"], "allowed: checkpoints, failed, unused, trials"),
        (["older=7"], "such as 7d"),
        (["what=trials"], "needs keys= or older="),
        (["delete=yes"], "allowed: what="),
        (["--force"], "is unknown"),
        (["runs_dir=/nowhere/at/all"], "is not a folder"),
    ],
)
def test_gc_refuses_what_it_does_not_know(capsys, words, part):
    assert gc.main(words) == 2
    assert part in capsys.readouterr().err


# -- a grid's status --------------------------------------------------------------------------------------------------


@pytest.fixture
def values(runs: Path) -> dict[str, Any]:
    """Settings of a grid that was run with the folder's three trials and one that is waiting."""
    values = VALUES | {"runs_dir": str(runs)}
    entries = [
        Entry(key, f"arm {key[0]}, seed 0", f"trials/{key}", f"arm {key[0]}")
        for key in ("aaaa11112222", "bbbb11112222", "bbbb33334444", "cccc11112222")
    ]
    GridRecord("mixers", "Which?", "python -m ablations.run", "local", 1, entries, []).save(record_path(runs, values))
    return values


def test_status_counts_and_names_failures(values, capsys):
    assert actions.status(values, Console(width=160)) == 1
    said = text(capsys)
    assert "mixers: Which?" in said and "4 trials: 2 done, 1 failed, 1 waiting; 0.02 core-hours" in said
    assert (
        "failed" in said and "nan: step 3: loss nan" in said and said.index("bbbb33334444") < said.index("aaaa11112222")
    )


def test_status_does_not_depend_on_how_the_grid_is_run(values, runs):
    other = values | {"launcher": {"name": "slurm"}, "action": "cancel"}
    assert record_path(runs, other) == record_path(runs, values)
    assert record_path(runs, values | {"model": {"dim": 32}}) != record_path(runs, values)


def test_status_of_a_grid_that_was_not_run(values):
    with pytest.raises(
        SettingError, match="action=status: grid mixers was not run with these settings.*grids there: mixers"
    ):
        actions.status(values | {"model": {"dim": 32}}, Console())


def test_cancel_tells_who_follows(values, runs, capsys):
    assert actions.cancel(values | {"action": "cancel"}, Console()) == 0
    assert "stopped 0 workers here and 0 Slurm jobs" in text(capsys)
    assert record_path(runs, values).with_suffix(CANCELLED).exists()


def test_cancel_leaves_another_grid_that_shares_a_trial(values, runs, capsys):
    for name, keys in (
        ("ours", ["prepare-1", "aaaa11112222", "cccc11112222"]),
        ("theirs", ["aaaa11112222", "dddd11112222"]),
    ):
        write(runs / "pool" / f"{name}.json", {"jobs": [{"key": key} for key in keys]})
    assert actions.cancel(values | {"action": "cancel"}, Console()) == 0
    assert [path.name for path in (runs / "pool").glob("*.cancel")] == ["ours.cancel"]


def test_cancel_signals_no_process_of_another_machine(values, runs, capsys, monkeypatch):
    write(runs / "pool" / "ours.json", {"jobs": [{"key": "aaaa11112222"}]})
    write(
        runs / "pool" / "slot-elsewhere-0.json",
        {"pid": os.getpid(), "listing": str(runs / "pool" / "ours.json"), "child": None},
    )
    lock = try_lock(runs / "pool" / "slot-elsewhere-0.lock")
    monkeypatch.setattr(os, "kill", lambda *given: pytest.fail("a process was signalled"))
    assert actions.cancel(values | {"action": "cancel"}, Console()) == 0
    lock.close()
    assert "stopped 0 workers here" in text(capsys)


def test_status_counts_what_a_trial_occupies(values, runs, capsys):
    path = record_path(runs, values)
    replace(load_record(path), cost=[4, "GPU"]).save(path)
    actions.status(values, Console(width=160))
    assert "0.08 GPU-hours" in text(capsys)


def test_an_error_without_words_is_shown(values, runs, capsys):
    write(runs / "trials" / "bbbb33334444" / "error.json", {"cause": "error", "message": ""})
    assert actions.status(values, Console(width=160)) == 1 and "error: no message" in text(capsys)


def test_retry_takes_the_failed_trials(values, runs):
    assert actions.failed_keys(runs, record_path(runs, values)) == {"bbbb33334444"}


def test_a_record_survives_a_move_of_the_runs_folder(values, runs, tmp_path):
    moved = runs.rename(runs.with_name("moved"))
    record = load_record(record_path(moved, values))
    assert [state_of(moved / entry.folder).state for entry in record.trials] == ["done", "done", "failed", "waiting"]


def test_looking_at_a_grid_does_not_import_torch():
    code = (
        "import sys; from ablations import actions, compose, show, diff, gc; compose.composed(['grid=mixers']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False).returncode == 0


# -- who is alive -----------------------------------------------------------------------------------------------------


def test_a_heart_beats_while_something_is_computed(tmp_path):
    listener = Listener()
    assert listener.silence(tmp_path) is None
    with heartbeat(tmp_path, every=0.02):
        beats = set()
        deadline = time.monotonic() + 10
        while len(beats) < 3 and time.monotonic() < deadline:
            beats.add((tmp_path / "alive").read_text() if (tmp_path / "alive").exists() else "")
            time.sleep(0.01)
        assert len(beats) >= 3 and state_of(tmp_path).state == "running"
    assert listener.silence(tmp_path) is None and state_of(tmp_path).state == "waiting"


def test_silence_is_told_by_the_listeners_own_clock(tmp_path):
    now = [100.0]
    listener = Listener(lambda: now[0])
    (tmp_path / "alive").write_text("node1 7 1\n")
    os.utime(tmp_path / "alive", (0, 0))  # the node's clock is decades behind
    assert listener.silence(tmp_path) == 0
    now[0] = 160.0
    assert listener.silence(tmp_path) == 60
    (tmp_path / "alive").write_text("node1 7 2\n")
    assert listener.silence(tmp_path) == 0
