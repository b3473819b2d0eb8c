"""Looking at a grid and stopping it, from files alone: status, cancel, and which trials a retry takes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from planned import plan_of, settings_from
from rich.console import Console
from stored_trials import write, write_runs

from ablations.launch.pool import try_lock
from ablations.launch.trial_state import state_of
from ablations.question.settings import Settings
from ablations.session import actions
from ablations.session.grid_record import CANCELLED, Entry, GridRecord, cost_of, load_record, record_path
from iris.errors import SettingError


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return write_runs(tmp_path / "runs")


@pytest.fixture
def settings(runs: Path) -> Settings:
    """Of a grid that was run with the folder's three trials and one that is waiting."""
    settings = settings_from("grid=mixers", f"runs_dir={runs}", "action=status")
    entries = [
        Entry(key, f"arm {key[0]}, seed 0", f"trials/{key}", f"arm {key[0]}")
        for key in ("aaaa11112222", "bbbb11112222", "bbbb33334444", "cccc11112222")
    ]
    stages = [Entry("text-1", "text", "stages/text-1"), Entry("text-9", "text", "stages/text-9")]
    record = GridRecord("mixers", "Which?", "python -m ablations.run", "local", 1, entries, stages, [1, "core"])
    record.save(record_path(settings))
    return settings


def text(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_status_counts_and_names_failures(settings, capsys):
    assert actions.status(settings, Console(width=160)) == 1
    said = text(capsys)
    assert "mixers: Which?" in said and "4 trials: 2 done, 1 failed, 1 waiting; 0.02 core-hours" in said
    assert "nan: step 3: loss nan" in said and said.index("bbbb33334444") < said.index("aaaa11112222")


def test_status_names_the_shared_work_that_runs(settings, runs, capsys):
    write(runs / "stages" / "text-9" / "status.json", {"state": "running", "phase": "train text"})
    lock = try_lock(runs / "stages" / "text-9" / "lock")
    actions.status(settings, Console(width=160))
    assert "text: running, train text" in text(capsys)
    lock.close()
    actions.status(settings, Console(width=160))
    assert "text: stopped, train text" in text(capsys)


def test_status_lists_those_that_matter_of_many(settings, runs, capsys):
    path = record_path(settings)
    many = [Entry(f"dddd{n:08d}", f"arm {n}", f"trials/dddd{n:08d}") for n in range(60)]
    replace(load_record(path), trials=[*many, Entry("bbbb33334444", "bad", "trials/bbbb33334444")]).save(path)
    assert actions.status(settings, Console(width=160)) == 1
    said = text(capsys)
    assert "bbbb33334444" in said and "and 21 more" in said and "61 trials: 1 failed, 60 waiting" in said


def test_a_record_is_the_same_however_the_grid_is_run(settings):
    words = ("grid=mixers", f"runs_dir={settings.runs_dir}")
    for how in ("launcher=slurm", "action=cancel", "threads=3", "reports_dir=x", "track.models_mb=0"):
        assert record_path(settings_from(*words, how)) == record_path(settings)
    for what in ("model.dim=32", "seeds=[1]", "grid.match=none", "measure.samples=9"):
        assert record_path(settings_from(*words, what)) != record_path(settings)


def test_a_record_has_what_was_planned(tmp_path):
    words = ("grid=mixers", "grid.match=none", "scale=smoke", "seeds=[0,1]", f"runs_dir={tmp_path}")
    plan, settings = plan_of(*words), settings_from(*words)
    record = GridRecord.of(plan, "mixers", "Which?", "the command", settings.launcher)
    record.save(record_path(settings))
    found = load_record(record_path(settings))
    assert found == record and [entry.key for entry in found.trials] == [trial.key for trial in plan.trials]
    assert {entry.key for entry in found.stages} == {s.key for trial in plan.trials for s in plan.stages(trial)}


def test_a_trial_occupies_the_gpus_or_the_cores_of_its_nodes():
    for words, cost in (
        ([], (2, "core")),
        (["launcher.gpus_per_trial=1"], (1, "GPU")),
        (["launcher=slurm", "launcher.nodes=2", "launcher.gpus_per_trial=4"], (8, "GPU")),
        (["launcher=slurm", "launcher.nodes=2", "launcher.gpus_per_trial=0"], (4, "core")),
    ):
        assert cost_of(settings_from(*words).launcher, 2) == cost


def test_status_of_a_grid_that_was_not_run(settings):
    words = ("grid=mixers", f"runs_dir={settings.runs_dir}", "model.dim=32", "action=status")
    told = "action=status: grid mixers was not run with these settings.*grids there: mixers"
    with pytest.raises(SettingError, match=told):
        actions.status(settings_from(*words), Console())


def test_cancel_tells_who_follows(settings, capsys):
    assert actions.cancel(settings, Console()) == 0
    assert "stopped 0 workers here and 0 Slurm jobs" in text(capsys)
    assert record_path(settings).with_suffix(CANCELLED).exists()


def listing(runs: Path, name: str, *folders: str) -> Path:
    """A list of jobs as workers read it."""
    path = runs / "pool" / f"{name}.json"
    write(path, {"jobs": [{"key": folder.rpartition("/")[2], "folder": str(runs / folder)} for folder in folders]})
    return path


def test_cancel_leaves_another_grid_that_shares_a_trial(settings, runs, capsys):
    listing(runs, "ours", "stages/latent-new", "trials/aaaa11112222", "trials/cccc11112222")
    listing(runs, "theirs", "stages/latent-new", "trials/aaaa11112222", "trials/dddd11112222")
    assert actions.cancel(settings, Console()) == 0
    assert [path.name for path in (runs / "pool").glob("*.cancel")] == ["ours.cancel"]


def test_cancel_signals_no_process_of_another_machine(settings, runs, capsys, monkeypatch):
    ours = listing(runs, "ours", "trials/aaaa11112222")
    told = {"pid": os.getpid(), "listing": str(ours), "child": None}
    write(runs / "pool" / "slot-elsewhere-0.json", told)
    lock = try_lock(runs / "pool" / "slot-elsewhere-0.lock")
    monkeypatch.setattr(os, "kill", lambda *given: pytest.fail("a process was signalled"))
    assert actions.cancel(settings, Console()) == 0
    lock.close()
    assert "stopped 0 workers here" in text(capsys)


def test_status_counts_what_a_trial_occupies(settings, capsys):
    path = record_path(settings)
    replace(load_record(path), cost=[4, "GPU"]).save(path)
    actions.status(settings, Console(width=160))
    assert "0.08 GPU-hours" in text(capsys)


def test_an_error_without_words_is_shown(settings, runs, capsys):
    write(runs / "trials" / "bbbb33334444" / "error.json", {"cause": "error", "message": ""})
    assert actions.status(settings, Console(width=160)) == 1 and "error: no message" in text(capsys)


def test_retry_takes_the_failed_trials(settings, runs):
    assert actions.failed_keys(runs, record_path(settings)) == {"bbbb33334444"}
    with pytest.raises(SettingError, match="action=retry: this grid was not run with these settings"):
        actions.failed_keys(runs, runs / "grids" / "none.json")


def test_a_record_survives_a_move_of_the_runs_folder(settings, runs):
    moved = runs.rename(runs.with_name("moved"))
    record = load_record(record_path(settings_from("grid=mixers", f"runs_dir={moved}")))
    assert [state_of(moved / entry.folder).state for entry in record.trials] == ["done", "done", "failed", "waiting"]
