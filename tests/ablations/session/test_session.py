"""An invocation of a grid: what is run and told, what an interrupt does, and what is known of each trial."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from planned import settings_from
from rich.console import Console

from ablations.launch.job import Job
from ablations.question.plan import Plan, make_plan
from ablations.session import jobs
from ablations.session.grid_record import CANCELLED, load_record
from ablations.session.session import Cancelled, Detached, Session
from ablations.session.watch import Watch
from iris.errors import SettingError


class Noting:
    """A tracker and a backend that only note that they were called."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str):
        return lambda *given: self.called.append(name)


def session(folder: Path, *more: str, only: set[str] | None = None) -> Session:
    """A session of five arms; of two seeds, where nothing else is said."""
    words = ("grid=mixers", "grid.match=none", "scale=smoke", f"runs_dir={folder}", "seeds=[0,1]", *more)
    settings = settings_from(*words)
    watch = Watch("mixers", console=Console(file=io.StringIO()))
    record, report = folder / "grid.json", folder / "report"
    return Session(settings, make_plan(settings), watch, Noting(), record, report, only)


def said(run: Session) -> list[str]:
    return run.watch.console.file.getvalue().splitlines()


def finish(plan: Plan, *keys: str, fid: float = 3.0) -> None:
    """Results of trials; of all where none is named."""
    for trial in plan.trials:
        if not keys or trial.key in keys:
            folder = plan.folder(trial)
            folder.mkdir(parents=True, exist_ok=True)
            result = {"metrics": {"fid": fid}, "seconds": {"train": 2.0, "images": 1.0}, "environment": {"cpu": "a"}}
            (folder / "result.json").write_text(json.dumps(result))


# -- what is run ----------------------------------------------------------------------------------------------------


def test_what_is_finished_is_not_run_again(tmp_path):
    run = session(tmp_path)
    keys = [trial.key for trial in run.plan.trials]
    assert [job.key for job in run._jobs() if job.function is jobs.trial] == keys
    finish(run.plan, *keys[:3])
    again = session(tmp_path)
    assert again.cached == set(keys[:3])
    assert [job.key for job in again._jobs() if job.function is jobs.trial] == keys[3:]
    few = session(tmp_path, only={keys[0], keys[4]})  # as a retry of what failed
    assert [job.key for job in few._jobs()] == [keys[4]]


def test_a_grid_leaves_a_record_before_anything_runs_and_a_report_leaves_none(tmp_path):
    (tmp_path / "grid.json").with_suffix(CANCELLED).touch()
    run = session(tmp_path)
    record = load_record(tmp_path / "grid.json")
    assert [entry.key for entry in record.trials] == [trial.key for trial in run.plan.trials]
    assert not (tmp_path / "grid.json").with_suffix(CANCELLED).exists()  # what was cancelled is not any more
    other = tmp_path / "other"
    assert session(other, "action=report").reads_only and not other.exists()


def test_the_question_is_registered_before_anything_runs_and_never_by_a_report(tmp_path):
    assert session(tmp_path, "action=report").registration is None
    run = session(tmp_path)
    assert run.registration["finished"] == 0 and run.registration["question"]["seeds"] == run.settings.seeds
    finish(run.plan)
    again = session(tmp_path, "seeds=[0]", "reason=too slow")
    (departure,) = again.registration["departures"]
    assert again.registration["when"] == run.registration["when"] and departure["reason"] == "too slow"
    assert again.outcome([]).registration == again.registration


def test_many_trials_that_were_finished_before_are_told_of_in_one_line(tmp_path):
    for seeds, lines in (("[0,1]", 10), ("[0,1,2,3,4]", 1)):
        finish(session(tmp_path, f"seeds={seeds}").plan)
        run = session(tmp_path, f"seeds={seeds}")
        with run.watch:
            run._show(run._jobs())
            run.watch.update()
        assert sum("finished before" in line for line in said(run)) == lines
    assert "25 of 25 trials were finished before and are taken as they are" in "\n".join(said(run))


def test_shared_work_is_shown_before_the_trials(tmp_path):
    run = session(tmp_path, "latent=haar")
    run._show(run._jobs())
    labels = [row.label for row in run.watch._rows.values()]
    assert labels[-10:] == [trial.label for trial in run.plan.trials] and "latent haar" in labels[0]


# -- what ends ------------------------------------------------------------------------------------------------------


def test_the_end_of_a_trial_is_told_to_the_person_and_the_tracker(tmp_path):
    run = session(tmp_path, "seeds=[0]")
    first, second = run.plan.trials[:2]
    finish(run.plan, first.key)
    run._show(run._jobs())
    for trial, error in ((first, None), (second, {"cause": "nan", "message": "loss nan", "log": "x"})):
        job = Job(trial.key, jobs.trial, {}, run.plan.folder(trial))
        run._started(job)
        run._ended(job, error)
    assert run.tracker.called == ["trial_started", "trial_finished"] * 2
    told = "\n".join(said(run))
    assert f"{first.label}: done in 0:00: FID 3" in told and f"{second.label}: failed in 0:00: nan: loss nan" in told


def test_bad_data_end_the_grid_and_other_failures_of_shared_work_are_told(tmp_path):
    run = session(tmp_path)
    run.backend = run.tracker
    run._show(run._jobs())
    shared = next(job for job in run._jobs() if job.function is jobs.stages)
    run._ended(shared, {"cause": "oom", "kind": "OutOfMemory", "message": "no memory", "log": "shared.log"})
    assert any("shared work failed (oom): no memory (log: shared.log)" in line for line in said(run))
    assert run.tracker.called == []
    with pytest.raises(SettingError, match="row 3 is damaged"):
        run._ended(shared, {"cause": "error", "kind": "SettingError", "message": "row 3 is damaged", "log": ""})
    assert run.tracker.called == ["cancel"]


def test_a_record_says_what_is_known_of_a_trial_now(tmp_path):
    run = session(tmp_path, "seeds=[0]")
    done, failed, stopped, waiting, _ = run.plan.trials
    finish(run.plan, done.key)
    for trial, name, value in (
        (failed, "error.json", {"cause": "oom", "message": "no memory"}),
        (stopped, "status.json", {"state": "running", "phase": "train"}),
    ):
        run.plan.folder(trial).mkdir(parents=True)
        (run.plan.folder(trial) / name).write_text(json.dumps(value))
    found = run.record(done, {"latency_ms": 7.0})
    assert (found.state, found.error, found.environment) == ("done", None, {"cpu": "a"})
    assert found.metrics == {"fid": 3.0, "latency_ms": 7.0, "train_seconds": 2.0}
    assert found.settings == done.settings and found.curve == tmp_path / done.curves[-1]
    causes = [run.record(trial, {"latency_ms": 7.0}) for trial in (failed, stopped, waiting)]
    assert [record.error["cause"] for record in causes] == ["oom", "stopped", "waiting"]
    assert all(record.state == "failed" and record.metrics == {} for record in causes)


def test_an_outcome_has_the_question_the_arms_and_what_a_reader_must_know(tmp_path):
    run = session(tmp_path, "seeds=[0]", "grid.decide.expect={furier: worse, fourier: worse}")
    outcome = run.outcome([])
    assert outcome.axes == {"model.mixer": ["grfm", "attention", "fourier", "recurrence", "spatial"]}
    assert outcome.decide["expect"] == {"fourier": "worse"} and outcome.name == "mixers" and outcome.match == "none"
    assert outcome.judge["name"] == "shapes" and len(outcome.data["fingerprint"]) == 16
    assert any("names furier, which no arm of this run is" in note for note in outcome.notes)


# -- interrupts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "answer", "raised", "called"),
    [
        ("cancel", None, KeyboardInterrupt, ["cancel"]),
        ("detach", None, Detached, ["detach"]),
        ("ask", "cancel", KeyboardInterrupt, ["cancel"]),
        ("ask", "detach", Detached, ["detach"]),
        ("ask", "go on", None, []),
    ],
)
def test_an_interrupt_is_answered_as_the_settings_or_the_person_say(
    tmp_path, monkeypatch, word, answer, raised, called
):
    run = session(tmp_path, "seeds=[0]", f"launcher.interrupt={word}")
    run.backend = run.tracker
    monkeypatch.setattr(run.watch, "ask", lambda question, answers, usual: answer)
    if raised is None:
        run._interrupted()
    else:
        with pytest.raises(raised):
            run._interrupted()
    assert run.tracker.called == called


def test_an_interrupt_ends_what_runs_in_this_process(tmp_path):
    run = session(tmp_path, "seeds=[0]", "launcher=inline", "launcher.interrupt=detach")
    with pytest.raises(KeyboardInterrupt):
        run._interrupted()
    assert run.tracker.called == []


def test_a_cancel_from_another_terminal_ends_it(tmp_path):
    run = session(tmp_path, "seeds=[0]")
    run.backend = run.tracker
    run.backend.places = dict
    run._tick()
    assert run.tracker.called == []
    (tmp_path / "grid.json").with_suffix(CANCELLED).touch()
    with pytest.raises(Cancelled):
        run._tick()
    assert run.tracker.called == ["cancel"]
