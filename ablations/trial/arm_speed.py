"""Speed and memory of a grid's arms, measured once their trials are finished, interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ablations.launch import Backend, Job, JobRun, jobs, run_jobs
from ablations.launch.job import RESULT
from ablations.question.grid import Trial
from ablations.question.plan import Plan, hardware, network_of
from iris.io.files import read_json

if TYPE_CHECKING:
    from ablations.launch.watch import Watch
    from ablations.question.settings import Launcher


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
        chosen: dict[str, Trial] = {}
        networks: dict[str, Trial] = {}
        for trial in self.plan.trials:
            if (self.plan.folder(trial) / RESULT).exists():
                chosen.setdefault(trial.arm, networks.setdefault(network_of(trial.settings), trial))
        if not chosen:
            return {}
        if not self.plan.trials[0].settings["measure"]["latency_rounds"]:
            self.notes.append("Speed and memory were not measured: measure.latency_rounds is 0.")
            return {}
        if stored:
            measured = self._stored({trial.key for trial in networks.values()})
        else:
            self.watch.note(f"measuring speed and memory of {len(networks)} models, interleaved, one thread each")
            measured = (self._on_node if self.cluster else self._here)(list(networks.values()))
        contended = {reason for value in measured.values() for reason in value["contended"].split("; ") if reason}
        if contended:
            self.notes.append(f"The machine was not quiet while speed was measured: {'; '.join(sorted(contended))}.")
        return {
            arm: {name: value for name, value in measured[trial.key].items() if name != "contended"}
            for arm, trial in chosen.items()
            if trial.key in measured
        }

    def _stored(self, keys: set[str]) -> dict[str, dict[str, Any]]:
        """The newest measurement of all these models together, so that ratios are of one run."""
        places = [*(self.plan.runs / "speed").glob("*.json"), *(self.plan.runs / "speed").glob(f"*/{RESULT}")]
        for place in sorted(places, key=lambda path: path.stat().st_mtime, reverse=True):
            found = read_json(place) or {}
            measured = found.get("speed", found)
            if keys <= measured.keys():
                self._say_where(found)
                return measured
        self.notes.append(
            "Speed and memory of these models were not measured together yet; the command without action=report does it."
        )
        return {}

    def _say_where(self, result: dict[str, Any]) -> None:
        """The node of a cluster's measurement is not the machine that the report is written on."""
        if made_on := result.get("environment"):
            self.notes.append(
                f"Speed was measured on node {made_on['host']} of the cluster: {made_on['device']}, {made_on['cpu']}."
            )

    def _here(self, trials: list[Trial]) -> dict[str, dict[str, Any]]:
        from ablations.trial.speed import measure_speed
        from eval.speed.workers import WorkerError

        machine = str(hardware(self.plan.threads))
        with ThreadPoolExecutor(1) as thread:
            measuring = thread.submit(measure_speed, trials, self.plan.runs, 1, machine)
            while not measuring.done():
                self.watch.update()
                time.sleep(0.5)
        try:
            return measuring.result()
        except WorkerError as error:
            self.notes.append(f"Speed and memory were not measured: {error}")
            return {}

    def _on_node(self, trials: list[Trial]) -> dict[str, dict[str, Any]]:
        job = jobs.speed_job(trials, self.plan.runs, self.cluster.speed_constraint or self.cluster.constraint)
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
        result = read_json(job.folder / RESULT) or {}
        self._say_where(result)
        return result.get("speed", {})
