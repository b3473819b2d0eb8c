"""Watch with faked status files: plain lines with a clock of the test's own, and the live table in a string."""

from __future__ import annotations

import io
import itertools
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from ablations.answer.records import GridOutcome, TrialRecord
from ablations.answer.summary import summary_renderables
from ablations.session.watch import Watch


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def put(folder: Path, **status: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "status.json").write_text(json.dumps(status | {"time": time.time()}))


def plain_watch(clock: Clock, **options: object) -> tuple[Watch, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=False, width=80)
    return Watch("mixers", "Does it?", console=console, clock=clock, **options), stream


def live_watch(width: int, height: int = 24, **options: object) -> tuple[Watch, Console]:
    console = Console(
        file=io.StringIO(),
        force_terminal=True,
        width=width,
        height=height,
        color_system=None,
        legacy_windows=False,
        _environ={"TERM": "xterm"},
    )
    return Watch("mixers", "Does GRFM earn its three pathways?", console=console, **options), console


def rendered(watch: Watch, console: Console) -> list[str]:
    with console.capture() as capture:
        console.print(watch._screen())
    return capture.get().splitlines()


def make_record(arm: str, seed: int = 0, state: str = "done", **metrics: float) -> TrialRecord:
    error = (
        None
        if state == "done"
        else {"cause": "nan", "message": "loss is nan at step 40", "traceback": "", "log": "runs/trials/k/log.txt"}
    )
    return TrialRecord(
        key=arm,
        arm=arm,
        values={},
        seed=seed,
        baseline=arm == "grfm",
        state=state,
        cached=False,
        settings={},
        metrics=metrics,
        folder=Path("."),
        curves=(),
        model="",
        error=error,
    )


def make_outcome(records: list[TrialRecord], notes: list[str] | None = None) -> GridOutcome:
    return GridOutcome(
        name="mixers",
        question="Does GRFM earn its three pathways?",
        claim="",
        match="params",
        decide={"metric": "fid", "better": "lower"},
        axes={},
        records=records,
        judge={"name": "shapes"},
        data={},
        command="",
        commit="",
        hardware={},
        notes=notes or [],
    )


FULL = {
    "fid": 19.68,
    "fid_se": 0.41,
    "clip_score": 31.2,
    "accuracy_colour": 0.953,
    "accuracy_shape": 0.81,
    "accuracy_all": 0.61,
    "latency_ratio": 1.24,
    "latency_ms": 131.2,
    "peak_memory_mb": 1412.0,
    "params_m": 12.34,
    "samples": 2048,
}


def test_nodes_and_why_trials_wait_are_shown_where_there_are_several_machines(tmp_path: Path) -> None:
    watch, console = live_watch(120)
    watch.add_trial("a", "grfm", 0, tmp_path / "a")
    watch.add_trial("b", "attention", 0, tmp_path / "b")
    watch.set_state("a", "running")
    put(tmp_path / "a", state="running", phase="train", step=5, steps=10, host=socket.gethostname())
    watch.update()
    assert not any("node" in line for line in rendered(watch, console))  # all is here
    watch.set_place("a", "node17")
    watch.set_place("b", "JobArrayTaskLimit")
    lines = rendered(watch, console)
    assert any(line.rstrip().endswith("node") for line in lines)
    assert any("grfm, seed 0" in line and "node17" in line for line in lines)
    assert any("attention, seed 0" in line and "waiting" in line and "JobArrayTaskLimit" in line for line in lines)
    console.width = 80
    assert not any("node17" in line for line in rendered(watch, console))  # no room


def test_cost_is_counted_in_what_a_trial_occupies(tmp_path: Path) -> None:
    clock = Clock()
    watch, _stream = plain_watch(clock, cost=(4, "GPU"))
    watch.add_trial("a", "grfm", 0, tmp_path / "a")
    watch.add_trial("b", "attention", 0, tmp_path / "b", state="cached")  # cost nothing this time
    assert "hours" not in watch._overview().plain
    watch.set_state("a", "running")
    clock.now = 900.0
    assert "1.00 GPU-hours" in watch._overview().plain
    watch.set_state("a", "done")
    clock.now = 5000.0
    assert watch._overview().plain == "2 of 2 trials done, 1.00 GPU-hours"


def test_plain_lines_for_changes_and_progress(tmp_path: Path) -> None:
    clock = Clock()
    watch, stream = plain_watch(clock)
    trial = {"state": "running", "phase": "train", "steps": 2000, "images_per_s": 800.0}
    with watch:
        watch.add_stage("lat", "latent haar", tmp_path / "lat")
        watch.add_trial("a", "grfm", 0, tmp_path / "a")
        watch.add_trial("b", "attention", 0, tmp_path / "b", state="cached")
        put(tmp_path / "lat", state="running", phase="train", step=120, steps=400, psnr=27.1)
        watch.update()
        put(tmp_path / "lat", state="done", phase="train", step=400, steps=400)
        watch.set_state("a", "running")
        for second in range(40):
            clock.now = float(second)
            put(tmp_path / "a", **trial, step=second * 10, loss=1.0, eta_s=75)
            watch.update()
        watch.set_state("a", "failed", "nan: loss is nan at step 400")
        watch.update()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[0:00] grid mixers: Does it?"
    assert lines[1] == "[0:00] attention, seed 0: finished before, taken as it is"
    assert lines[2] == "[0:00] latent haar: train 120/400 (30%), PSNR 27.1 dB"
    assert "[0:00] grfm, seed 0: starting" in lines and "[0:00] latent haar: done in 0:00" in lines
    assert "[0:15] grfm, seed 0: train 150/2000 (8%), loss 1.0000, 800 images/s, 1:15 left" in lines
    assert "[0:30] grfm, seed 0: train 300/2000 (15%), loss 1.0000, 800 images/s, 1:15 left" in lines
    assert lines[-1] == "[0:39] grfm, seed 0: failed in 0:39: nan: loss is nan at step 400"
    assert len(lines) == 9


def test_plain_is_never_silent_for_a_minute(tmp_path: Path) -> None:
    clock = Clock()
    watch, stream = plain_watch(clock)
    with watch:
        watch.add_trial("a", "grfm", 0, tmp_path / "a")
        for second in range(300):
            clock.now = float(second)
            watch.update()
    times = [
        int(line[1:].split(":")[0]) * 60 + int(line[1:].split("]")[0].split(":")[1])
        for line in stream.getvalue().splitlines()
    ]
    assert max(b - a for a, b in itertools.pairwise(times)) <= 45 and len(times) < 10
    assert "0 of 1 trials done" in stream.getvalue()


def test_old_and_broken_status_files_are_not_believed(tmp_path: Path) -> None:
    """A killed invocation's status.json says "running"; a half-written one says nothing."""
    put(tmp_path / "a", state="running", phase="train", step=1900, steps=2000)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "status.json").write_text('{"state": "run')
    watch, console = live_watch(80)
    watch.add_trial("a", "grfm", 0, tmp_path / "a")
    watch.add_trial("b", "attention", 0, tmp_path / "b")
    watch.update()
    assert [line.split()[-1] for line in rendered(watch, console)[3:5]] == ["waiting", "waiting"]
    put(tmp_path / "a", state="running", phase="train", step=20, steps=2000)
    watch.update()
    assert "20/2000" in rendered(watch, console)[3]


@pytest.mark.parametrize("width", [80, 120])
def test_live_table_fits_the_terminal(tmp_path: Path, width: int) -> None:
    watch, console = live_watch(width)
    for key in ("a", "b"):
        watch.add_trial(key, "mixer=recurrence iterations=16 latent=wavelet_vae", 2, tmp_path / key)
    put(
        tmp_path / "a",
        state="running",
        phase="train",
        step=19999,
        steps=20000,
        loss=1234.5,
        images_per_s=12345.0,
        eta_s=36000,
    )
    watch.update()
    watch.set_state("b", "failed", "oom: CUDA out of memory. Tried to allocate 20 GiB")
    lines = rendered(watch, console)
    assert max(map(len, lines)) <= width and len(lines) == 5, "no line is cut or folded"
    assert "19999/20000" in lines[3] and "12345" in lines[3] and "~10h00" in lines[3]
    assert "1 failed" in lines[1]


def test_time_left_uses_what_finished_trials_took(tmp_path: Path) -> None:
    clock = Clock()
    watch, _ = plain_watch(clock)
    for key in "abc":
        watch.add_trial(key, key, 0, tmp_path / key)
    assert watch._total_left() is None
    watch.set_state("a", "running")
    put(tmp_path / "a", state="running", phase="train", step=10, steps=40, eta_s=30)
    clock.now = 10.0
    watch.update()
    assert watch._total_left() == 30 + 2 * 40
    clock.now = 60.0
    watch.set_state("a", "done")
    watch.set_state("b", "running")
    clock.now = 75.0
    assert watch._total_left() == 45 + 60


def test_many_trials_show_those_that_matter(tmp_path: Path) -> None:
    watch, console = live_watch(80, height=20)
    for n in range(60):
        watch.add_trial(str(n), f"arm{n}", 0, tmp_path / str(n), state="waiting" if n > 30 else "cached")
    watch.set_state("50", "running")
    watch.set_state("2", "failed", "nan")
    lines = rendered(watch, console)
    assert len(lines) <= 20 and lines[-1].strip() == "and 47 more"
    assert any("arm50" in line for line in lines) and any("arm2," in line for line in lines)


def test_unknown_state_names_the_allowed(tmp_path: Path) -> None:
    watch, _ = plain_watch(Clock())
    watch.add_trial("a", "grfm", 0, tmp_path)
    with pytest.raises(ValueError, match="waiting, running, done, failed, cached"):
        watch.set_state("a", "ready")


def test_silent_trial_is_pointed_out(tmp_path: Path) -> None:
    clock = Clock()
    watch, stream = plain_watch(clock)
    watch.add_trial("a", "grfm", 0, tmp_path / "a")
    watch.set_state("a", "running")
    clock.now = 130.0
    watch.update()
    assert "no news for 2:10" in stream.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_summary(width: int) -> None:
    records = [
        make_record("grfm", **(FULL | {"fid": 25.0})),
        make_record("attention", **FULL),
        make_record("spatial", state="failed"),
    ]
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    watch = Watch("mixers", console=console)
    arms = {
        "grfm": {"mean": 25.0, "low": None, "high": None, "verdict": "baseline"},
        "attention": {"mean": 19.68, "low": 18.88, "high": 20.48, "verdict": "not enough seeds"},
    }
    verdict = {"verdict": "not enough seeds", "sentence": "One seed.", "sureness": "Not sure.", "arms": arms}
    verdict["next_command"] = "python -m ablations.run grid=mixers 'seeds=[0,1,2]'"
    watch.summary(make_outcome(records, notes=["the tree has uncommitted changes"]), verdict)
    text = console.file.getvalue()
    rows = [line.split() for line in text.splitlines()]
    assert ["attention", "19.68", "±0.80", "31.2", "95%", "81%", "61%", "1.24", "12.34", "1412", "131.2"] in rows
    assert text.index("attention") < text.index("grfm *"), "best first"
    assert "judge: shapes; 2,048 samples; ±: 95% interval, sampling alone; *: baseline" in text
    assert "failed spatial, seed 0: nan: loss is nan at step 40\n  log: runs/trials/k/log.txt" in text
    assert "note: the tree has uncommitted changes" in text
    assert text.index("note:") < text.index("verdict  not enough seeds")
    assert [line.strip() for line in text.splitlines()[-3:-1]] == ["One seed.", "Not sure."]
    assert text.rstrip().endswith("next     python -m ablations.run grid=mixers 'seeds=[0,1,2]'")
    assert max(len(line) for line in text.splitlines()) <= width


def test_summary_over_seeds_and_of_nothing() -> None:
    records = [make_record("grfm", seed, fid=10.0 + 2 * seed, fid_se=0.1) for seed in range(3)]
    console = Console(file=io.StringIO(), width=100)
    arms = {"grfm": {"mean": 11.9, "low": 9.0, "high": 14.0, "verdict": "baseline"}}
    verdict = {"verdict": "supported", "sentence": "So.", "sureness": "Sure.", "arms": arms}
    for part in summary_renderables(make_outcome(records), verdict, 100):
        console.print(part)
    text = console.file.getvalue()
    assert "11.90 ±2.50" in text and "±: 95% interval;" in text and "latency" not in text
    assert "next" not in text and "verdict  supported" in text
    assert len(summary_renderables(make_outcome([make_record("grfm", state="failed")]), {}, 80)) == 3


def test_a_narrow_terminal_keeps_the_arms_names() -> None:
    records = [make_record(arm, seed, **FULL) for arm in ("grfm", "attention") for seed in (0, 1)]
    known = {"mean": 216.4, "low": 160.0, "high": 270.0, "verdict": "within noise"}
    verdict = {
        "verdict": "supported",
        "sentence": "So.",
        "sureness": "Sure.",
        "arms": {"attention": known, "grfm": known},
    }
    console = Console(file=io.StringIO(), width=80)
    for part in summary_renderables(make_outcome(records), verdict, 80):
        console.print(part)
    lines = console.file.getvalue().splitlines()
    assert any(line.startswith("attention ") and "within noise" in line for line in lines)
    assert any(line.startswith("arm ") for line in lines)


def test_summary_of_many_lists_the_best_and_the_baseline() -> None:
    records = [make_record("grfm" if n == 59 else f"arm{n}", fid=10.0 + n) for n in range(60)]
    records += [make_record(f"bad{n}", state="failed") for n in range(25)]
    console = Console(file=io.StringIO(), width=100)
    for part in summary_renderables(make_outcome(records), {}, 100):
        console.print(part)
    lines = console.file.getvalue().splitlines()
    arms = [line.split()[0] for line in lines if line.startswith(("arm", "grfm"))]
    assert arms == ["arm", *(f"arm{n}" for n in range(40)), "grfm"]
    assert "the best 41 of 60 arms; the report has all of them" in lines
    assert (
        sum(line.startswith("failed bad") for line in lines) == 20
        and "and 5 more failed; the report has all of them" in lines
    )


def test_neither_torch_nor_mlflow_is_imported() -> None:
    code = (
        "import sys, ablations.session.watch, ablations.track.tracking; print({'torch', 'mlflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_brackets_in_an_arms_name_are_shown(tmp_path):
    """``grfm[fourier,spatial]`` is a name, not markup."""
    console = Console(width=120, force_terminal=True, record=True)
    with Watch("pathways", console=console) as watch:
        watch.add_trial("k", "grfm[fourier,spatial]", 0, tmp_path)
        watch.update()
    assert "grfm[fourier,spatial], seed 0" in console.export_text()


@pytest.mark.parametrize(
    ("typed", "meant"), [("c", "cancel"), (" Detach ", "detach"), ("", "detach"), ("x", "detach"), (EOFError, "detach")]
)
def test_the_first_letter_answers_and_the_usual_answer_is_shown(monkeypatch, typed, meant):
    asked: list[str] = []

    def answer(question: str, **given: object) -> str:
        asked.append(question)
        if not isinstance(typed, str):
            raise typed
        return typed

    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(console, "input", answer)
    with Watch("mixers", console=console) as watch:
        assert watch.ask("Leave them?", {"d": "detach", "c": "cancel"}, "detach") == meant
    assert asked == ["Leave them? [d] "]
    assert (
        Watch("mixers", console=Console(file=io.StringIO())).ask("?", {"d": "detach"}, "detach") == "detach"
        and len(asked) == 1
    )
