"""The smaller commands, ``python -m ablations VERB``, which look at a runs folder: show, diff, gc."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stored_trials import write, write_runs, write_stage

from ablations.__main__ import VERBS, main
from ablations.launch.pool import try_lock
from ablations.session.grid_record import Entry, GridRecord
from ablations.verbs import gc
from iris.settings import Tree


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return write_runs(tmp_path)


def text(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


# -- what every verb has --------------------------------------------------------------------------------------------


def test_help_names_every_verb_and_each_says_more(capsys):
    assert main(["--help"]) == 0 and main([]) == 2
    said = text(capsys)
    for verb in VERBS:
        assert f"python -m ablations {verb}" in said
        assert main([verb, "--help"]) == 0
        shown = text(capsys)
        assert f"python -m ablations {verb}" in shown and "runs_dir=" in shown


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["shw"], "'shw' is no verb (did you mean show?); allowed: show, diff, gc, sync"),
        (["show"], "show: 0 names given; write: python -m ablations show KEY"),
        (["show", "a", "b"], "show: 2 names given"),
        (["diff", "a"], "diff: 1 names given; write: python -m ablations diff KEY KEY"),
        (["gc", "all"], "gc: 1 names given"),
        (["show", "a", "runs=x"], "runs is not a setting (did you mean runs_dir?)"),
        (["gc", "--force"], "--force is no option"),
    ],
)
def test_what_no_verb_takes_is_told_in_a_line(words, part, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and part in said and said.count("\n") == 1


def test_looking_at_a_runs_folder_does_not_import_torch():
    modules = [f"ablations.verbs.{verb}" for verb in VERBS] + ["ablations.__main__", "ablations.session.actions"]
    code = f"import sys, {', '.join(modules)}; print({{'torch', 'mlflow'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


# -- show and diff --------------------------------------------------------------------------------------------------


def test_show_prints_settings_results_and_files(runs, capsys):
    assert main(["show", "aaaa", f"runs_dir={runs}"]) == 0
    said = text(capsys)
    for part in (
        "trial aaaa11112222: done",
        "dim=64 mixer=grfm",
        "fid 3",
        "cpu a",
        "train, seconds 36.0",
        "samples.npz 3.0 MB",
    ):
        assert part in said


def test_show_prints_why_a_trial_failed(runs, capsys):
    assert main(["show", "bbbb3", f"runs_dir={runs}"]) == 0
    said = text(capsys)
    assert "failed, nan: step 3: loss nan" in said and "Traceback: of the trial" in said


@pytest.mark.parametrize(
    ("key", "part"), [("zzzz", "is no trial in"), ("bbbb", "is the beginning of bbbb11112222, bbbb33334444")]
)
def test_a_key_must_be_one_trial(runs, capsys, key, part):
    for words in (["show", key], ["diff", "aaaa", key]):
        assert main([*words, f"runs_dir={runs}"]) == 2
        assert part in capsys.readouterr().err


def test_diff_prints_only_what_differs(runs, capsys):
    assert main(["diff", "aaaa", "bbbb1", f"runs_dir={runs}"]) == 0
    said = text(capsys)
    assert "model.dim 64 128 +100.0%" in said and "fid 3 4.5 +50.0%" in said and "made on: the same" in said
    assert "mixer" not in said and "samples" not in said


# -- gc -------------------------------------------------------------------------------------------------------------


def candidates(runs: Path, *words: str) -> set[str]:
    choice = Tree(gc.Settings, {}).build([*words, f"runs_dir={runs}"])
    return {str(path.relative_to(runs)) for path in gc.candidates(choice)}


def test_gc_lists_before_it_deletes_and_keeps_results(runs, capsys):
    assert main(["gc", f"runs_dir={runs}"]) == 0
    said = text(capsys)
    assert "stages/text-1/checkpoint-12 2.0 MB" in said
    assert "2 of checkpoints, 4.0 MB would be deleted (add delete=true)" in said
    assert (runs / "stages" / "text-1" / "checkpoint-12").exists()
    assert main(["gc", "delete=true", "keys=text-1", f"runs_dir={runs}"]) == 0
    assert "1 of checkpoints, 2.0 MB deleted" in text(capsys)
    assert {path.name for path in (runs / "stages" / "text-1").iterdir()} == {"result.json", "weights", "settings.json"}
    assert candidates(runs) == {"stages/text-2/checkpoint-12"}


def test_gc_keeps_the_checkpoints_of_what_is_not_finished(runs):
    write_stage(runs, "text-3", done=False)
    assert candidates(runs) == {"stages/text-1/checkpoint-12", "stages/text-2/checkpoint-12"}


def test_gc_knows_what_is_failed_and_unused(runs):
    assert candidates(runs, "what=failed") == {"trials/bbbb33334444"}
    assert candidates(runs, "what=unused") == {"stages/latent-old"}
    assert candidates(runs, "what=trials", "keys=bbbb1") == {"trials/bbbb11112222"}
    for model in ("text-0123", "class-0123", "aesthetic-0123", "student-0123", "speed-0123"):
        write_stage(runs, model)  # which a person may have made for its own sake
    assert candidates(runs, "what=unused") == {"stages/latent-old"}
    (runs / "trials" / "aaaa11112222" / "stages.json").unlink()  # it may need any stage
    assert candidates(runs, "what=unused") == set()


def test_gc_keeps_what_waiting_trials_and_queued_jobs_need(runs):
    entry = Entry("cccc55556666", "grfm, seed 0", "trials/cccc55556666")
    record = GridRecord(
        "mixers", "q", "c", "slurm", 1, [entry], [Entry("latent-old", "latent", "stages/latent-old")], []
    )
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
    old, failed = time.time() - 7200, runs / "trials" / "bbbb33334444"
    for path in (*failed.iterdir(), failed):
        os.utime(path, (old, old))
    assert candidates(runs, "what=failed", "older=1h") == {"trials/bbbb33334444"}
    assert candidates(runs, "what=failed", "older=1d") == set()


def test_gc_leaves_what_is_at_work(runs):
    begun = write_stage(runs, "latent-old", done=False)
    (begun / "result.json").unlink()
    places = {"what=failed": runs / "trials" / "bbbb33334444", "what=unused": begun}
    for what, place in places.items():
        lock = try_lock(place / "claim")
        assert candidates(runs, what) == set()
        lock.close()
        assert candidates(runs, what) == {str(place.relative_to(runs))}


def test_gc_takes_nothing_unused_while_a_stage_is_made(runs):
    """A training started by hand builds on stages that no trial names."""
    write_stage(runs, "text-4567")
    (runs / "stages" / "text-4567" / "result.json").unlink()
    with try_lock(runs / "stages" / "text-4567" / "lock"):
        assert candidates(runs, "what=unused") == set()
    assert candidates(runs, "what=unused") == {"stages/latent-old"}


def test_gc_deletes_under_the_lock(runs, monkeypatch, capsys):
    """What a process took since it was listed stays."""
    place = runs / "stages" / "latent-old"
    listed = gc.candidates

    def slow(choice):
        yield from list(listed(choice))
        held.append(try_lock(place / "lock"))

    held = []
    monkeypatch.setattr(gc, "candidates", slow)
    assert main(["gc", "what=unused", "delete=true", f"runs_dir={runs}"]) == 0
    assert place.is_dir() and "left: it is in use" in capsys.readouterr().out
    held[0].close()
    monkeypatch.setattr(gc, "candidates", listed)
    assert main(["gc", "what=unused", "delete=true", f"runs_dir={runs}"]) == 0 and not place.exists()


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("what=all", "allowed: checkpoints, failed, unused, trials"),
        ("older=7", "such as 7d"),
        ("what=trials", "needs keys= or older="),
        ("delete=yes", "delete='yes' must be bool"),
        ("runs_dir=/nowhere/at/all", "is not a folder"),
    ],
)
def test_gc_refuses_what_it_does_not_know(word, part, capsys):
    assert main(["gc", word]) == 2
    assert part in capsys.readouterr().err
