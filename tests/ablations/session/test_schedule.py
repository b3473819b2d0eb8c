"""Which jobs make a plan's trials: what several share once, in order, and how many threads it may take."""

from __future__ import annotations

from pathlib import Path

import pytest
from planned import plan_of

from ablations.launch.job import Job
from ablations.question.plan import Plan
from ablations.session import jobs
from ablations.session.schedule import jobs_of, shared_stages
from iris.io.files import write_json
from iris.stages.engine import RESULT, Stage

SMOKE = ("scale=smoke", "grid.match=none")


def plan(folder: Path, *words: str) -> Plan:
    return plan_of(*SMOKE, f"runs_dir={folder}", *words)


def done(stage: Stage) -> None:
    """Leave the result of a stage that was made."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    write_json(stage.folder / RESULT, {})


def shared_kinds(plan: Plan) -> list[set[str]]:
    return [{stage.kind for stage in group.stages} for group in shared_stages(plan.trials)]


def run(listed: list[Job], plan: Plan) -> list[str]:
    """Do the jobs as a backend may, each as soon as what it names has ended; every stage that is made, in order."""
    made: list[str] = []
    ended: set[Path] = set()
    chains = {trial.key: trial.chain for trial in plan.trials}
    while waiting := [job for job in listed if job.folder not in ended]:
        ready = [job for job in waiting if set(job.needs) <= ended]
        assert ready, "no job can begin"
        for job in ready:
            wanted = job.plan.get("stages") or [stage.key for stage in chains[job.key].stages]
            made += [key for key in wanted if key not in made or job.function is jobs.stages]
            ended.add(job.folder)
    return made


@pytest.mark.parametrize(
    "words",
    [
        ["grid=mixers", "seeds=[0,1]"],
        ["grid=latents"],
        ["grid=steps"],
        ["grid=distilled"],
        ["grid=precision"],
        ["grid=elastic", "seeds=[0,1]"],
        ["grid=mixers", "grid.axes={data.train: [64, 65]}", "grid.baseline={}", "seeds=[0,1]", "vae.seed=0"],
    ],
)
def test_every_stage_is_made_once_and_after_what_it_builds_on(words, tmp_path):
    found = plan(tmp_path, *words)
    stages = {stage.key: stage for trial in found.trials for stage in trial.chain.stages}
    listed = jobs_of(found, found.trials, workers=2)
    order = run(listed, found)
    assert len(order) == len(set(order)) == len(stages)
    for number, key in enumerate(order):
        built_on = [*stages[key].needs.values(), *stages[key].uses.values()]
        assert {work.key.partition("/")[0] for work in built_on} <= set(order[:number])
    users = {key: sum(key in {s.key for s in trial.chain.stages} for trial in found.trials) for key in stages}
    told = {key for job in listed if job.function is jobs.stages for key in job.plan["stages"]}
    assert told == {key for key, count in users.items() if count > 1}


def test_what_the_same_trials_share_is_one_job(tmp_path):
    assert shared_kinds(plan(tmp_path, "grid=mixers")) == [{"data", "latent", "encoded", "reference"}]
    assert shared_kinds(plan(tmp_path, "grid=steps")) == [{"data", "latent", "encoded", "reference", "text"}]
    of_seeds = shared_kinds(plan(tmp_path, "grid=mixers", "seeds=[0,1]"))
    assert of_seeds == [{"data", "reference"}, {"latent", "encoded"}, {"latent", "encoded"}]
    latents = shared_kinds(plan(tmp_path, "grid=latents"))
    assert latents == [{"data", "reference"}]  # each latent has one trial


def test_students_wait_for_their_teacher_and_trials_for_all_that_they_use(tmp_path):
    found = plan(tmp_path, "grid=distilled")
    teacher, *students = shared_stages(found.trials)
    assert {stage.kind for stage in teacher.stages} >= {"data", "latent", "encoded", "text"} and teacher.trains
    assert [group.last.kind for group in students] == ["student", "student"]
    assert all(group.before == [teacher] == group.all_before() for group in students)
    assert "text" in teacher.name and {group.name for group in students} == {"student consistency", "student shortcut"}
    trials = {job.key: job for job in jobs_of(found, found.trials, 2) if job.function is jobs.trial}
    for trial in found.trials:
        method = trial.values.get("student.method")
        wanted = {teacher.last.folder} | {g.last.folder for g in students if g.name == f"student {method}"}
        assert set(trials[trial.key].needs) == wanted


def test_a_shared_job_lives_in_the_folder_of_its_last_stage(tmp_path):
    found = plan(tmp_path, "grid=mixers")
    shared, *trials = jobs_of(found, found.trials, 2)
    (group,) = shared_stages(found.trials)
    assert (shared.key, shared.folder, shared.needs) == (group.last.key, group.last.folder, ())
    assert shared.plan["stages"] == [stage.key for stage in group.stages] and shared.function is jobs.stages
    assert shared.plan["key"] in {trial.key for trial in found.trials}  # one that needs all of them
    assert [job.key for job in trials] == [trial.key for trial in found.trials]
    for job, trial in zip(trials, found.trials, strict=True):
        assert job.folder == found.folder(trial) == tmp_path / "trials" / trial.key
        assert job.plan == {
            "key": trial.key,
            "settings": trial.settings,
            "runs_dir": str(tmp_path),
            "threads": found.threads,
        }


def test_what_is_there_is_not_made_again(tmp_path):
    found = plan(tmp_path, "grid=mixers", "seeds=[0,1]")
    stages = {stage.key: stage for trial in found.trials for stage in trial.chain.stages}
    for stage in stages.values():
        if stage.kind in ("data", "reference"):
            done(stage)
    assert shared_kinds(found) == [{"latent", "encoded"}, {"latent", "encoded"}]
    first = [trial for trial in found.trials if trial.seed == 0]
    assert len(shared_stages(first)) == 1  # a retry of some trials makes what these share
    for stage in stages.values():
        if stage.kind in ("latent", "encoded"):
            done(stage)
    assert shared_stages(found.trials) == [] and all(not job.needs for job in jobs_of(found, found.trials, 2))


def test_one_trial_shares_nothing(tmp_path):
    found = plan(tmp_path, "grid=mixers")
    (job,) = jobs_of(found, found.trials[:1], 2)
    assert job.key == found.trials[0].key and job.function is jobs.trial and job.needs == ()


def threads(plan: Plan, workers: int) -> dict[str, int]:
    """Job -> its threads."""
    return {job.key: job.plan["threads"] for job in jobs_of(plan, plan.trials, workers)}


def test_work_that_runs_while_nothing_else_can_has_the_threads_of_all_workers(tmp_path):
    found = plan(tmp_path, "grid=mixers", "seeds=[0,1]", "threads=3")
    pictures, *latents = [job for job in jobs_of(found, found.trials, workers=4) if job.function is jobs.stages]
    assert (pictures.plan["threads"], pictures.spread) == (12, False)
    assert [(job.plan["threads"], job.spread) for job in latents] == [(3, True)] * 2
    assert {threads(found, 4)[trial.key] for trial in found.trials} == {3}
    training = threads(plan(tmp_path, "grid=steps", "threads=3"), 4)
    assert set(training.values()) == {3}  # a model is trained in the first job


def test_several_that_begin_at_once_share_the_threads(tmp_path):
    axes = "grid.axes={data.seed: [0, 1], model.iterations: [1, 2], vae.steps: [3, 4]}"
    found = plan(tmp_path, "grid=mixers", axes, "grid.baseline={}", "threads=1")
    first = [job for job in jobs_of(found, found.trials, workers=5) if job.function is jobs.stages and not job.needs]
    assert [job.plan["threads"] for job in first] == [2, 2]  # the pictures of each seed


@pytest.mark.parametrize("words", [["seeds=[0,1]"], ["grid.axes={data.seed: [0, 1], model.iterations: [1, 2]}"]])
def test_a_grid_that_goes_on_has_the_threads_of_one_that_was_never_stopped(words, tmp_path):
    """A latent's numbers depend on them, and nothing of its key does."""
    found = plan(tmp_path, "grid=mixers", "grid.baseline={}", "threads=3", *words)
    whole = threads(found, 8)
    made = [stage for group in shared_stages(found.trials) for stage in group.stages]
    for stage in made[:-1]:
        done(stage)
        left = threads(found, 8)
        assert left == {key: whole[key] for key in left} and len(left) > len(found.trials)
