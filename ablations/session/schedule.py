"""Which jobs make the trials that are missing: a job for each set of stages that the same trials share, then the trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ablations.launch.job import Job
from ablations.question.plan import Plan, Trial
from ablations.session import jobs
from iris.stages.engine import Stage
from iris.stages.flow import OnLatents

SMALL = ("data", "encoded", "reference")  # stages that a person need not hear of beside others


@dataclass
class Shared:
    """Stages that the same trials share, in the order in which they are made.

    Attributes:
        trial: one of those that need them.
        users: keys of all of them.
        before: what these stages build on.
        beside: how many begin at once where nothing is there yet, if this is one of them; else 0. A grid that goes on has
            the threads of one that was never stopped, on which a latent's numbers depend.
    """

    trial: Trial
    users: frozenset[str]
    stages: list[Stage] = field(default_factory=list)
    before: list[Shared] = field(default_factory=list)
    beside: int = 0

    @property
    def last(self) -> Stage:
        """The stage whose folder stands for all."""
        return self.stages[-1]

    @property
    def name(self) -> str:
        """What is made, for people."""
        return (
            ", ".join(dict.fromkeys(stage.label for stage in self.stages if stage.kind not in SMALL)) or self.last.label
        )

    @property
    def trains(self) -> bool:
        """Whether a model is trained here, which must give the same numbers whoever does it."""
        return any(isinstance(stage, OnLatents) for stage in self.stages)

    def all_before(self) -> list[Shared]:
        """Everything that must be there before, each once."""
        found: dict[int, Shared] = {}
        for one in self.before:
            for other in (*one.all_before(), one):
                found.setdefault(id(other), other)
        return list(found.values())


def shared_stages(trials: Sequence[Trial]) -> list[Shared]:
    """The stages that are not there and that several of the trials need, those that others build on first."""
    groups = _grouped(trials)
    first = [group for group in groups if not group.before and not group.trains]
    for group in first:
        group.beside = len(first)
    for group in groups:
        group.stages = [stage for stage in group.stages if not stage.done]
    for group in groups:
        group.before = [one for one in group.before if one.stages]
    return sorted((group for group in groups if group.stages), key=lambda group: len(group.all_before()))


def _grouped(trials: Sequence[Trial]) -> list[Shared]:
    """All stages that several of the trials need, whether or not they are there."""
    stages = {stage.key: (stage, trial) for trial in trials for stage in trial.chain.stages}
    users: dict[str, set[str]] = {key: set() for key in stages}
    for trial in trials:
        for stage in trial.chain.stages:
            users[stage.key].add(trial.key)
    groups: dict[frozenset[str], Shared] = {}
    owner: dict[str, Shared] = {}
    for key, (stage, trial) in stages.items():
        if len(users[key]) < 2:
            continue
        group = groups.setdefault(frozenset(users[key]), Shared(trial, frozenset(users[key])))
        group.stages.append(stage)
        owner[key] = group
    for group in groups.values():
        needed = (work.key for stage in group.stages for work in (*stage.needs.values(), *stage.uses.values()))
        before = {id(one): one for key in needed if (one := owner.get(key.partition("/")[0])) not in (None, group)}
        group.before = list(before.values())
    return list(groups.values())


def jobs_of(plan: Plan, trials: Sequence[Trial], workers: int) -> list[Job]:
    """Jobs for the trials and for what they share; each names all jobs that must have ended before.

    Args:
        workers: trials that run at once, whose threads are free while nothing but shared work runs.
    """
    groups = shared_stages(trials)
    listed = []
    for group in groups:
        threads = plan.threads * (max(1, workers // group.beside) if group.beside else 1)
        told = plan.job_plan(group.trial, stages=[stage.key for stage in group.stages], threads=threads)
        needs = tuple(one.last.folder for one in group.all_before())
        spread = any(stage.collective for stage in group.stages)
        listed.append(Job(group.last.key, jobs.stages, told, group.last.folder, needs, spread=spread))
    for trial in trials:
        needs = tuple(group.last.folder for group in groups if trial.key in group.users)
        listed.append(Job(trial.key, jobs.trial, plan.job_plan(trial), plan.folder(trial), needs, spread=True))
    return listed
