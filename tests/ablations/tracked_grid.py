"""A grid's trials as the engine leaves them on disk, and what MLflow then has of them."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from ablations.answer.records import GridOutcome, PlannedTrial, TrialRecord
from ablations.track.follow import Following
from ablations.track.journal import Journal
from ablations.track.location import Location
from ablations.track.store import Store
from ablations.track.work import Work

SETTINGS = {
    "seed": 0,
    "model": {"mixer": "grfm", "dim": 64, "heads": [1, 2]},
    "sample": {"steps": 2, "sampler": "euler"},
    "many": {f"setting{n}": n for n in range(150)},
    "long": "x" * 7000,
}
CURVES = ("loss", "lr", "images_per_s", "system/cpu_percent")


def row_of(step: int, begun: float = 1_700_000_000.0) -> dict[str, Any]:
    """A row whose values depend on the step only, as a resumed trial's do, but for the time and the pace."""
    return {
        "step": step,
        "steps": 400,
        "time": begun + step,
        "loss": 1 / step,
        "lr": 1e-3,
        "images_per_s": begun % 1000 + 500,
        "system/cpu_percent": 90.0 + step % 7,
    }


def write_metrics(folder: Path, steps: range, begun: float = 1_700_000_000.0, tail: str = "") -> None:
    """A metrics.jsonl, replacing another one as the loop does."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / ".fresh"
    fresh.write_text("".join(json.dumps(row_of(step, begun)) + "\n" for step in steps) + tail)
    fresh.replace(folder / "metrics.jsonl")


def append_metrics(folder: Path, steps: range) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(json.dumps(row_of(step)) + "\n")
            file.flush()


def make_record(
    runs: Path, key: str, arm: str, state: str = "done", cached: bool = False, seed: int = 0, **others: Any
) -> TrialRecord:
    """A trial's folder and record."""
    folder = runs / "trials" / key
    write_metrics(folder, range(20, 420, 20))
    settings = SETTINGS | {"model": {"mixer": arm, "dim": 64}, "seed": seed}
    (folder / "settings.json").write_text(json.dumps(settings))
    metrics, error, seconds = {}, None, {}
    if state == "done":
        images = np.random.default_rng(0).integers(0, 255, (10, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / "samples.npz", images=images, captions=np.array(["a"] * 10), real=images)
        (folder / "gates.json").write_text('{"layers": []}')
        metrics = {"fid": 12.5 + seed, "clip_score": 31.0, "images_per_s": 510.0, "accuracy_colour": 0.95}
        seconds = {"train": 60.0}
        result = {"metrics": metrics, "seconds": seconds, "environment": {"torch": "2"}}
        (folder / "result.json").write_text(json.dumps(result))
    else:
        (folder / "log.txt").write_text("Traceback …")
        error = {"cause": "nan", "message": "loss is nan at step 40", "traceback": "…", "log": str(folder / "log.txt")}
        (folder / "error.json").write_text(json.dumps(error))
    return TrialRecord(
        **{
            "key": key,
            "arm": arm,
            "values": {"model.mixer": arm},
            "seed": seed,
            "baseline": arm == "grfm",
            "state": state,
            "cached": cached,
            "settings": settings,
            "metrics": metrics,
            "folder": folder,
            "seconds": seconds,
            "environment": {"torch": "2"} if state == "done" else {},
            "curves": (f"trials/{key}/metrics.jsonl",),
            "model": f"trials/{key}/model",
            "error": error,
        }
        | others
    )


def make_outcome(records: list[TrialRecord], **others: Any) -> GridOutcome:
    return GridOutcome(
        **{
            "name": "mixers",
            "question": "Does GRFM earn its pathways?",
            "claim": "It does",
            "match": "params",
            "decide": {"metric": "fid", "better": "lower", "practical": 0.05},
            "axes": {"model.mixer": ["grfm", "attention"]},
            "records": records,
            "judge": {"name": "shapes", "sha256": "ab" * 32},
            "data": {"name": "shapes", "fingerprint": "cd" * 32, "train": 4096, "heldout": None},
            "command": "python -m ablations.run grid=mixers",
            "commit": "1234567+changes",
            "hardware": {"cpu": "x", "cores": 2},
            "wall_seconds": 12.0,
        }
        | others
    )


def make_journal(runs: Path, records: list[TrialRecord], **others: Any) -> Journal:
    """The journal of a driver that planned these trials, and holds it."""
    journal = Journal.of(runs, others.get("name", "mixers"), [record.key for record in records])
    assert journal.acquire()
    journal.plan(make_outcome([], **others), [PlannedTrial.of(record) for record in records], {"seeds": "0, 1"})
    return journal


def tell(work: Work, uri: str, alive: bool = False) -> Work:
    """Bring a store up to a work, as a process that has just begun."""
    work.sync(Store(Location.of(uri, work.place.parent)), alive)
    return work


class Command:
    """A command's ``Following``, in threads of this process, and what it said; ``end`` is the command's end."""

    def __init__(self, uri: str, root: Path) -> None:
        self.said: list[tuple[str, str]] = []
        read, write = os.pipe()
        self.lines = os.fdopen(write, "w", buffering=1)
        self.following = Following(Store(Location.of(uri, root)), 50.0, lambda *words: self.said.append(words))
        self.worker = threading.Thread(target=self.following.work, daemon=True)
        listener = threading.Thread(target=self.following.listen, args=(os.fdopen(read),), daemon=True)
        for thread in (listener, self.worker):
            thread.start()

    def follow(self, place: Path) -> None:
        print(place, file=self.lines)

    def end(self) -> list[str]:
        self.lines.close()
        missing = self.following.wait(self.worker)
        for work in self.following.works:
            work.lock.release()  # as the end of a process does
        return missing


def runs_of(client: Any, experiment: str = "mixers") -> tuple[list[Any], dict[str, list[Any]]]:
    """The grids' runs, and the trials' by key."""
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    trials: dict[str, list[Any]] = {}
    for run in runs:
        if run.data.tags["kind"] == "trial":
            trials.setdefault(run.data.tags["key"], []).append(run)
    return [run for run in runs if run.data.tags["kind"] == "grid"], trials


def assert_curves_equal(client: Any, run: Any, folder: Path, names: tuple[str, ...] = CURVES) -> None:
    """Each point of the folder's metrics.jsonl is there, once, and nothing else under its name."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in names:
        history = client.get_metric_history(run.info.run_id, name)
        written = [(line["step"], line[name], int(line["time"] * 1000)) for line in lines]
        assert sorted((point.step, point.value, point.timestamp) for point in history) == written, name
