"""Speed and memory of a grid's arms, measured once their trials are finished, interleaved."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablations.launch.backend import Backend, JobRun, run_jobs
from ablations.launch.job import RESULT, Job
from ablations.question.plan import Plan, Trial
from ablations.session import jobs
from ablations.session.work import speed_of
from eval.speed.workers import WorkerError
from eval.stages.speed import Speed
from iris.io.files import read_json

if TYPE_CHECKING:
    from ablations.question.settings import Launcher
    from ablations.session.watch import Watch


@dataclass
class ArmSpeed:
    """How the arms of a plan are measured; ``notes`` says afterwards what was wrong.

    Args:
        backend: where the trials ran. Slurm's runs the measuring too, as a job that has a node to itself: a login node is
            shared, and not what trials run on.
        tick: called while it waits for such a job.
        cluster: Slurm's settings, where that is so.
    """

    plan: Plan
    backend: Backend
    watch: Watch
    tick: Callable[[], None]
    cluster: Launcher | None
    notes: list[str] = field(default_factory=list)

    def measure(self, stored: bool = False) -> dict[str, dict[str, Any]]:
        """Metrics by arm, the baseline first, from one finished trial of each network: training changes neither.

        ``stored``: only what was measured before, since trials may be running beside.
        """
        arms: dict[str, str] = {}
        networks: dict[str, Trial] = {}
        for trial in self.plan.trials:
            if (self.plan.folder(trial) / RESULT).exists():
                network = arms.setdefault(trial.arm, trial.chain.network)
                networks.setdefault(network, trial)
        if not arms:
            return {}
        if not self.plan.trials[0].chain.settings.measure.latency.rounds:
            self.notes.append("Speed and memory were not measured: measure.latency.rounds is 0.")
            return {}
        if stored:
            measured = self._stored(set(networks))
        else:
            self.watch.note(f"measuring speed and memory of {len(networks)} models, interleaved, one thread each")
            measured = self._result(list(networks.values())).get("speed", {})
        if reasons := _worst(reason for value in measured.values() for reason in value["contended"].split("; ")):
            self.notes.append(f"The machine was not quiet while speed was measured: {'; '.join(reasons)}.")
        return {
            arm: {name: value for name, value in measured[network].items() if name != "contended"}
            for arm, network in arms.items()
            if network in measured
        }

    def _stored(self, networks: set[str]) -> dict[str, dict[str, Any]]:
        """The newest measurement of all these models together, so that ratios are of one run."""
        places = (self.plan.runs / "stages").glob(f"{Speed.kind}-*/{RESULT}")
        for place in sorted(places, key=lambda path: path.stat().st_mtime, reverse=True):
            found = read_json(place) or {}
            if networks <= found.get("speed", {}).keys():
                self._say_where(found)
                return found["speed"]
        self.notes.append(
            "Speed and memory of these models were not measured together yet; the command without action=report does it."
        )
        return {}

    def _say_where(self, result: dict[str, Any]) -> None:
        """The node of a cluster's measurement is not the machine that the report is written on."""
        if self.cluster and (made_on := result.get("environment")):
            self.notes.append(
                f"Speed was measured on node {made_on['host']} of the cluster: {made_on['device']}, {made_on['cpu']}."
            )

    def _result(self, trials: Sequence[Trial]) -> dict[str, Any]:
        chains = [trial.chain for trial in trials]
        if self.cluster is None:
            return self._here(speed_of(chains))
        machine = f"slurm {self.cluster.speed_constraint or self.cluster.constraint or ''}".strip()
        stage = speed_of(chains, machine)
        plan = {"trials": [self.plan.job_plan(trial) for trial in trials], "machine": machine, "threads": 1}
        return self._on_node(Job(stage.key, jobs.speed, plan, stage.folder, exclusive=True))

    def _here(self, stage: Speed) -> dict[str, Any]:
        with ThreadPoolExecutor(1) as thread:
            measuring = thread.submit(stage.make)
            while not measuring.done():
                self.watch.update()
                time.sleep(0.5)
        try:
            measuring.result()
        except WorkerError as error:
            self.notes.append(f"Speed and memory were not measured: {error}")
            return {}
        return stage.result

    def _on_node(self, job: Job) -> dict[str, Any]:
        failed: list[dict[str, str]] = []

        def ended(job: Job, error: dict[str, str] | None) -> None:
            if error:
                failed.append(error)

        if not job.succeeded:
            try:
                run_jobs(JobRun([job], self.backend, lambda job: None, ended), self.tick)
            except KeyboardInterrupt:
                self.backend.cancel()
                raise
        if failed:
            self.notes.append(f"Speed and memory were not measured: {failed[0]['message']} (log: {failed[0]['log']})")
        result = read_json(Path(job.folder) / RESULT) or {}
        self._say_where(result)
        return result


def _worst(reasons: Iterable[str]) -> list[str]:
    """Of reasons that differ in their numbers alone the one whose first number is largest."""
    found = {re.sub(r"[\d.]+", "", text): text for text in sorted(filter(None, reasons), key=_first_number)}
    return sorted(found.values())


def _first_number(text: str) -> float:
    return float(next(iter(re.findall(r"\d+(?:\.\d+)?", text)), 0))
