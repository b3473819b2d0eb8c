"""An invocation of a grid: the rungs of its halving as other commands see them, and what an interrupt does."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from ablations.question.halving import Halving, rung_plan
from rich.console import Console
from test_grid import settings_from
from test_halving import SCORES, give

from ablations.question.plan import make_plan
from ablations.session.grid_record import load_record
from ablations.session.session import Detached, Session
from ablations.session.watch import Watch


class Noting:
    """A tracker and a backend that only note that they were called."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str):
        return lambda: self.called.append(name)


def said(run: Session) -> str:
    return run.watch.console.file.getvalue()


def session(folder: Path, *more: str) -> Session:
    words = ("grid=mixers", "grid.match=none", "train.steps=80", f"runs_dir={folder}", "seeds=[0,1]", *more)
    settings, values = settings_from(*words)
    watch = Watch("mixers", console=Console(file=io.StringIO()))
    return Session(settings, values, make_plan(settings, values), watch, Noting(), folder / "grid.json")


def test_status_sees_the_rung_that_runs_and_then_who_went_on(tmp_path):
    run, seen = session(tmp_path), []

    def follow(jobs):
        seen.append({entry.key for entry in load_record(tmp_path / "grid.json").trials})
        give(run.plan, SCORES)

    run._follow = follow
    whole = {trial.key for trial in run.plan.trials}
    run._halve(Halving(2, 0.5))
    assert [len(keys) for keys in seen] == [10, 6] and not any(keys & whole for keys in seen)
    left = {entry.key for entry in load_record(tmp_path / "grid.json").trials}
    assert left == {trial.key for trial in run.plan.trials} < whole and len(left) == 4


def test_a_report_has_the_arms_that_went_on(tmp_path):
    run = session(tmp_path)
    run._follow = lambda jobs: give(run.plan, SCORES)
    run._halve(Halving(2, 0.5))
    report = session(tmp_path, "action=report")
    report._halve(Halving(2, 0.5))
    assert report.notes == run.notes and {t.key for t in report.plan.trials} == {t.key for t in run.plan.trials}
    trial = rung_plan(report.plan, [0, 1], 0.5).trials[0]
    (report.plan.folder(trial) / "result.json").unlink()
    early = session(tmp_path, "action=report")
    early._halve(Halving(2, 0.5))
    assert early.notes[-1] == "Successive halving: rung 2 of 2 is not finished." and len(early.plan.arms) == 3


def test_retry_of_a_rung_goes_on_behind_it(tmp_path):
    run = session(tmp_path)
    short = rung_plan(run.plan, [0, 1], 0.25)
    give(short, SCORES)
    failed = short.trials[3]
    (run.plan.folder(failed) / "result.json").unlink()
    run.only, listed = {failed.key}, []

    def follow(jobs):
        listed.append([job.key for job in jobs if not job.key.startswith("prepare-")])
        give(run.plan, SCORES)

    run._follow = follow
    run._halve(Halving(2, 0.5))
    assert listed[0] == [failed.key] and len(listed[1]) == 6


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
    run = session(tmp_path, f"launcher.interrupt={word}")
    run.backend = run.tracker
    monkeypatch.setattr(run.watch, "ask", lambda question, answers, usual: answer)
    if raised is None:
        run._interrupted()
    else:
        with pytest.raises(raised):
            run._interrupted()
    assert run.tracker.called == called


def test_many_trials_that_were_finished_before_are_told_of_in_one_line(tmp_path):
    for seeds, lines in (((0, 1), 10), (range(5), 1)):
        words = f"seeds={list(seeds)}".replace(" ", "")
        give(session(tmp_path, words).plan, SCORES)
        run = session(tmp_path, words)
        with run.watch:
            run._show()
            run.watch.update()
        assert sum("finished before" in line for line in said(run).splitlines()) == lines
    assert "25 of 25 trials were finished before and are taken as they are" in said(run)
