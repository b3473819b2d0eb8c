"""A grid as MLflow is told of it: one experiment a grid's name, one run a grid, one child run a trial, whoever runs the
grid and how often."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ablations.answer.records import PlannedTrial
from ablations.track.journal import TRIALS, Journal
from ablations.track.mlflow_model import SavedModel
from ablations.track.store import RunContent
from ablations.track.work import Work, as_params, data_tags, numbers

DIGEST_LENGTH = 36  # MLflow's limit for a dataset digest
SUMMARY = ("fid", "clip_score", "accuracy_all", "latency_ratio", "peak_memory_mb", "params_m")
FILES = ("settings.json", "gates.json", "result.json", "error.json")
ERROR = ("cause", "message", "log")


class Grid(Work):
    """A grid's journal, and what lies in its trials' folders.

    Args:
        models_mb: size up to which trained models are logged; 0: none.
    """

    def __init__(self, place: Path, models_mb: float) -> None:
        super().__init__(place, place.with_suffix(".sync.lock"))
        self.journal, self.models_mb = Journal(place), models_mb
        self.settled: dict[str, Any] = {}  # how a trial ended, where the store has all of it

    @property
    def experiment(self) -> str:
        return self.journal.header["name"]

    @property
    def has(self) -> str:
        return f"{len(self.settled)} of {len(self.journal.trials)} trials of {self.name}"

    def content(self, alive: bool) -> RunContent:
        journal = self.journal.read()
        header, end = journal.header, journal.end
        ended = {trial.key: facts for trial in journal.trials if end.get("header") and (facts := journal.facts(trial))}
        report = journal.absolute(end["report"]) if end.get("report") else None
        verdict = {"verdict": end["verdict"]} if end.get("verdict") else {}
        note = [f"**{header['question']}**", f"Claim: {header['claim']}", f"`{header['command']}`"]
        note += [f"Verdict: {word}" for word in verdict.values()]
        note += ["The report is under Artifacts, `report/index.html`."] if report else []
        about = {name: header[name] for name in ("question", "claim", "command", "hardware")}
        return RunContent(
            mark=("grid_key", journal.key),
            name=f"{header['name']} {time.strftime('%Y-%m-%d %H:%M')}",
            status=end.get("status") or ("RUNNING" if alive else "KILLED"),
            tags=_tags(header)
            | as_params(about)
            | verdict
            | {"kind": "grid", "mlflow.note.content": "\n\n".join(note)},
            params=journal.lines["grid"]["params"],
            values=summary(header, journal.trials, ended) if ended else {},
            inputs=data_inputs(header),
            files={f"report/{path.relative_to(report)}": path for path in report.rglob("*")} if report else {},
        )

    def children(self, parent_id: str, status: str) -> Iterator[tuple[str, RunContent]]:
        unfinished = "RUNNING" if status == "RUNNING" else "KILLED"
        for trial in self.journal.trials:
            facts = self.journal.facts(trial)
            if facts is None:
                self.settled.pop(trial.key, None)  # it is run again
                if self.journal.running(trial):
                    yield trial.label, self.trial(trial, parent_id, unfinished)
            elif self.settled.get(trial.key) != facts:
                yield trial.label, self.ended(self.trial(trial, parent_id, "ENDED"), trial, facts)
                if trial.label not in self.problems:
                    self.settled[trial.key] = facts

    def trial(self, trial: PlannedTrial, parent_id: str, status: str) -> RunContent:
        """The run of a trial that has not ended."""
        header, runs = self.journal.header, self.journal.runs
        tags = {"kind": "trial", "arm": trial.arm, "seed": str(trial.seed), "baseline": str(trial.baseline).lower()}
        *shared, own = (runs / file for file in trial.curves)
        return RunContent(
            mark=("key", trial.key),
            name=trial.label,
            status=status,
            tags=_tags(header) | tags | {"mlflow.parentRunId": parent_id, "state": status.lower()},
            params=as_params(trial.settings),
            curves={file: f"{file.parent.name.partition('-')[0]}/" for file in shared} | {own: ""},
            inputs=data_inputs(header),
        )

    def ended(self, content: RunContent, trial: PlannedTrial, facts: Mapping[str, Any]) -> RunContent:
        """The run of a trial that has: with its measures, files, pictures and model besides."""
        folder, done = self.journal.runs / TRIALS / trial.key, facts["state"] == "done"
        error = {name: (facts["error"] or {}).get(name) for name in ERROR}
        files = {name: folder / name for name in FILES}
        files |= {f"{prefix}metrics.jsonl": file for file, prefix in content.curves.items()}
        if error["log"]:
            log = self.journal.absolute(error["log"])
            files[f"logs/{log.name}"] = log
        result, samples = folder / "result.json", folder / "samples.npz"
        seconds = {f"seconds/{name}": value for name, value in facts["seconds"].items()}
        return replace(
            content,
            status="FINISHED" if done else "FAILED",
            tags=content.tags
            | {"state": facts["state"], "matched": trial.matched or "nothing", "cached": str(facts["cached"]).lower()}
            | as_params({"environment": facts["environment"]})
            | {f"error.{name}": value and str(value) for name, value in error.items()},
            values=numbers(facts["metrics"] | seconds),
            files=files,
            samples=samples if samples.is_file() else None,
            model=self.saved_model(trial) if done else None,
            written=int(result.stat().st_mtime * 1000) if result.is_file() else None,
        )

    def saved_model(self, trial: PlannedTrial) -> SavedModel | None:
        """A trial's pipeline, if it has one that is not too large."""
        commit = self.journal.header["commit"]
        tags = {"key": trial.key, "arm": trial.arm, "seed": str(trial.seed), "git_commit": commit}
        model = SavedModel(self.journal.runs / trial.model, trial.settings.get("sample", {}), tags)
        return model if model.folder.is_dir() and model.megabytes <= self.models_mb else None


def summary(
    header: Mapping[str, Any], trials: list[PlannedTrial], ended: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """How many trials ended how, and the mean over seeds of the main measures of each arm, ``summary/<measure> <arm>``,
    over the trials that have it. One prefix for all, since MLflow draws a section of charts for every prefix.
    """
    means: dict[str, list[float]] = {}
    for trial in trials:
        for measure in dict.fromkeys((header["decide"].get("metric", "fid"), *SUMMARY)):
            value = ended.get(trial.key, {"metrics": {}})["metrics"].get(measure)
            if value is not None and math.isfinite(value):
                means.setdefault(f"summary/{measure} {trial.arm}", []).append(float(value))
    states = [facts["state"] for facts in ended.values()]
    return {
        "trials": len(states),
        "trials_done": states.count("done"),
        "trials_failed": states.count("failed"),
        "trials_cached": sum(facts["cached"] for facts in ended.values()),
        "wall_seconds": header["wall_seconds"],
    } | {name: sum(values) / len(values) for name, values in means.items()}


def data_inputs(header: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """What a grid's trials read, as (context, arguments of mlflow.entities.Dataset): the data's splits, and the judge.

    A split has a name of its own: MLflow takes one input of a name and digest to a run.
    """
    data, judge = header["data"], header["judge"]
    contexts = ["train", "validation", *(["heldout"] if data.get("heldout") else [])] if data.get("name") else []
    found = [(context, dataset(data, "fingerprint", f"{data['name']}/{context}")) for context in contexts]
    return found + ([("judge", dataset(judge, "sha256", judge["name"]))] if judge.get("name") else [])


def dataset(record: Mapping[str, Any], digest: str, name: str) -> dict[str, str]:
    """Arguments of mlflow.entities.Dataset for a data set or a judge; ``digest`` names the field with its hash."""
    path = record.get("path")
    source = {"uri": str(path)} if path else {"tags": {key: str(value)[:200] for key, value in record.items()}}
    return {
        "name": name,
        "digest": str(record.get(digest) or "unknown")[:DIGEST_LENGTH],
        "source_type": "local" if path else "code",
        "source": json.dumps(source),
        "profile": json.dumps(dict(record), default=str),
    }


def _tags(header: Mapping[str, Any]) -> dict[str, str]:
    """Of a grid's run and of its trials': what it is about."""
    return data_tags(header["data"], header["judge"]) | {
        "grid": header["name"],
        "git_commit": header["commit"],
        "mlflow.source.name": "ablations.run",
        "mlflow.source.git.commit": header["commit"].removesuffix("+changes"),
    }
