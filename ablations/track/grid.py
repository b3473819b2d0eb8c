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

from ablations.answer.records import GridOutcome, PlannedTrial, TrialRecord
from ablations.track.journal import LOCK, Journal
from ablations.track.mlflow_model import SavedModel
from ablations.track.store import RunContent
from ablations.track.work import Work, as_params, data_tags, numbers

DIGEST_LENGTH = 36  # MLflow's limit for a dataset digest
SUMMARY = ("fid", "clip_score", "accuracy_caption", "latency_ratio", "peak_memory_mb", "params_m")
FILES = ("settings.json", "gates.json", "result.json", "error.json")
ERROR = ("cause", "message", "log")


class Grid(Work):
    """A grid's journal, and what lies in its trials' folders.

    Args:
        models_mb: size up to which trained models are logged; 0: none.
    """

    def __init__(self, place: Path, models_mb: float) -> None:
        super().__init__(place, place.with_suffix(".sync.lock"), place.with_suffix(LOCK))
        self.journal, self.models_mb = Journal(place), models_mb
        self.settled: dict[str, Any] = {}  # how a trial ended, where the store has all of it

    @property
    def experiment(self) -> str:
        return self.journal.header().name

    def content(self, alive: bool) -> RunContent:
        status = self.journal.read().status
        return grid_content(self.journal, status or ("RUNNING" if alive else "KILLED"))

    def children(self, parent_id: str, status: str) -> Iterator[tuple[str, RunContent]]:
        unfinished = "RUNNING" if status == "RUNNING" else "KILLED"
        for trial in self.journal.trials:
            facts = self.journal.facts(trial)
            if facts is None:
                self.settled.pop(trial.key, None)  # it is run again
                if self.journal.running(trial):
                    yield trial.label, trial_content(self.journal, trial, parent_id, unfinished)
            elif self.settled.get(trial.key) != facts:
                record = self.journal.record(trial, facts)
                yield trial.label, ended_content(self.journal, record, parent_id, self.models_mb)
                if trial.label not in self.problems:
                    self.settled[trial.key] = facts

    @property
    def has(self) -> str:
        return f"{len(self.settled)} of {len(self.journal.trials)} trials of {self.name}"


def grid_content(journal: Journal, status: str) -> RunContent:
    """The grid's run; once it has ended, with a summary over the arms, the report folder and the verdict."""
    header, end = journal.header(), journal.end
    report, verdict = end.get("report"), end.get("verdict")
    about = {name: getattr(header, name) for name in ("question", "claim", "command", "hardware")}
    note = [f"**{header.question}**", f"Claim: {header.claim}", f"`{header.command}`"]
    note += [f"Verdict: {verdict}"] if verdict else []
    note += ["The report is under Artifacts, `report/index.html`."] if report else []
    return RunContent(
        mark=("grid_key", journal.key),
        name=f"{header.name} {time.strftime('%Y-%m-%d %H:%M')}",
        status=status,
        tags=common_tags(header)
        | as_params(about)
        | {"kind": "grid", "mlflow.note.content": "\n\n".join(note)}
        | ({"verdict": verdict} if verdict else {}),
        params=journal.params,
        values=summary(journal.outcome()) if end.get("header") else {},
        inputs=data_inputs(header),
        files={f"report/{path.relative_to(report)}": path for path in report.rglob("*")} if report else {},
    )


def trial_content(journal: Journal, trial: PlannedTrial, parent_id: str, status: str) -> RunContent:
    """The run of a trial that has not ended."""
    header = journal.header()
    about = {"kind": "trial", "arm": trial.arm, "seed": str(trial.seed), "state": status.lower()}
    about |= {"baseline": str(trial.baseline).lower(), "mlflow.parentRunId": parent_id}
    *shared, own = (journal.runs / file for file in trial.curves)
    return RunContent(
        mark=("key", trial.key),
        name=trial.label,
        status=status,
        tags=common_tags(header) | about,
        params=as_params(trial.settings),
        curves={file: f"{file.parent.name.partition('-')[0]}/" for file in shared} | {own: ""},
        inputs=data_inputs(header),
    )


def ended_content(journal: Journal, record: TrialRecord, parent_id: str, models_mb: float) -> RunContent:
    """The run of a trial that has: with its measures, files, pictures and model."""
    content = trial_content(journal, record, parent_id, "FINISHED" if record.state == "done" else "FAILED")
    error = {name: (record.error or {}).get(name) for name in ERROR}
    about = {"state": record.state, "matched": record.matched or "nothing", "cached": str(record.cached).lower()}
    files = {name: record.folder / name for name in FILES}
    files |= {f"{prefix}metrics.jsonl": file for file, prefix in content.curves.items()}
    files |= {f"logs/{Path(error['log']).name}": Path(error["log"])} if error["log"] else {}
    samples, result = record.folder / "samples.npz", record.folder / "result.json"
    return replace(
        content,
        tags=content.tags
        | about
        | as_params({"environment": record.environment})
        | {f"error.{name}": value and str(value) for name, value in error.items()},
        values=numbers(record.metrics | {f"seconds/{name}": value for name, value in record.seconds.items()}),
        files=files,
        samples=samples if samples.is_file() else None,
        model=saved_model(journal, record, models_mb),
        written=int(result.stat().st_mtime * 1000) if result.is_file() else None,
    )


def saved_model(journal: Journal, record: TrialRecord, models_mb: float) -> SavedModel | None:
    """The trial's pipeline, if it has one that is not too large."""
    if record.state != "done" or not (journal.runs / record.model).is_dir():
        return None
    tags = {"key": record.key, "arm": record.arm, "seed": str(record.seed), "git_commit": journal.header().commit}
    model = SavedModel(journal.runs / record.model, record.settings.get("sample", {}), tags)
    return model if model.megabytes <= models_mb else None


def summary(outcome: GridOutcome) -> dict[str, float]:
    """How many trials ended how, and the mean over seeds of the main measures of each arm, ``summary/<measure> <arm>``,
    over the trials that have it. One prefix for all, since MLflow draws a section of charts for every prefix.
    """
    states, means = [record.state for record in outcome.records], {}
    for record in outcome.records:
        for measure in dict.fromkeys((outcome.decide.get("metric", "fid"), *SUMMARY)):
            value = record.metrics.get(measure)
            if value is not None and math.isfinite(value):
                means.setdefault(f"summary/{measure} {record.arm}", []).append(float(value))
    return {
        "trials": len(states),
        "trials_done": states.count("done"),
        "trials_failed": states.count("failed"),
        "trials_cached": sum(record.cached for record in outcome.records),
        "wall_seconds": outcome.wall_seconds,
    } | {name: sum(values) / len(values) for name, values in means.items()}


def common_tags(header: GridOutcome) -> dict[str, str]:
    """Tags of a grid's run and of its trials': what it is about."""
    return data_tags(header.data, header.judge) | {
        "grid": header.name,
        "git_commit": header.commit,
        "mlflow.source.name": "ablations.run",
        "mlflow.source.git.commit": header.commit.removesuffix("+changes"),
    }


def data_inputs(header: GridOutcome) -> list[tuple[str, dict[str, str]]]:
    """What a grid's trials read, as (context, arguments of mlflow.entities.Dataset): the data's splits, and the judge.

    A split has a name of its own: MLflow takes one input of a name and digest to a run.
    """
    found = []
    for context in ("train", "validation", *(["heldout"] if header.data.get("heldout") else [])):
        if header.data.get("name"):
            fields = dataset_fields(header.data, "fingerprint")
            found.append((context, fields | {"name": f"{fields['name']}/{context}"}))
    if header.judge.get("name"):
        found.append(("judge", dataset_fields(header.judge, "sha256")))
    return found


def dataset_fields(record: Mapping[str, Any], digest: str) -> dict[str, str]:
    """Arguments of mlflow.entities.Dataset for a data set or a judge; ``digest`` names the field with its hash."""
    path = record.get("path")
    source = {"uri": str(path)} if path else {"tags": {key: str(value)[:200] for key, value in record.items()}}
    return {
        "name": str(record["name"]),
        "digest": str(record.get(digest) or "unknown")[:DIGEST_LENGTH],
        "source_type": "local" if path else "code",
        "source": json.dumps(source),
        "profile": json.dumps(dict(record), default=str),
    }
