"""One evaluation, start to finish: open, check, measure, write, track."""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ablations.track.location import Location
from eval.judges import describe, load_judge
from eval.report.page import write_pages
from eval.stages.results import FILES, RESULTS, Results, hardware, write_results
from eval.settings import IMAGES, Settings, compose, settings_of
from eval.speed.caps import CapError
from eval.speed.workers import WorkerError
from eval.stages import on_images, on_runs, plan
from eval.stages.data import described, open_data
from eval.stages.evaluation import Evaluation, image_count
from eval.stages.tracking import track_results
from eval.subjects import Subject, open_subject
from iris.errors import SettingError
from iris.io.progress import Progress
from iris.settings import flatten, plain_values

SAMPLES = 2048  # images of a model, where measure.samples does not say
SHOWN = 32  # images on the page
NO_RUN = "none"  # of the setting track
FOLDER = "eval_results"
# Settings that say where and how it runs, and change no number; the model's files are known by their contents.
RUNNING = ("model", "name", "out", "track", "runs_dir", "threads")

MEASURES: dict[str, Callable[[Evaluation], None]] = {
    "quality": on_images.quality,
    "alignment": on_images.alignment,
    "skills": on_images.skills,
    "duplicates": on_images.duplicates,
    "latency": on_runs.latency,
    "memory": on_runs.memory,
    "caps": on_runs.caps,
}


class MeasureFailed(RuntimeError):
    """A measure failed for a reason outside the settings; the others are in the results."""


def evaluate(words: Sequence[str], progress: Progress) -> tuple[Results, Path]:
    """Measure what a command line names; returns the results and their folder.

    Raises:
        SettingError: a setting, a model or data that cannot be used.
        MeasureFailed: a measuring process failed; what the other measures gave is written.
    """
    settings, location = settings_of(words), None
    if settings.track != NO_RUN:
        location = Location.of(settings.track, Path.cwd(), "track").check()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    run, wanted = prepared(settings, words, progress)
    names = ", ".join(wanted)
    progress.say(f"{run.results.name} ({run.subject.kind}, {run.count:,} images, data {run.data.name}): {names}")
    for name, why in run.results.not_measured.items():
        progress.say(f"no {name}: {why}")
    failed = measured(run, wanted)
    shown = run.main.images[:SHOWN] if set(wanted) & set(IMAGES) else None
    write_pages(run.results, run.out, shown, run.captions)
    if location is not None:
        track_results(run.results, run.out, location, progress)
    if failed:
        raise MeasureFailed(f"{failed} (the other results: {run.out})")
    return run.results, run.out


def prepared(settings: Settings, words: Sequence[str], progress: Progress) -> tuple[Evaluation, list[str]]:
    """Everything opened and checked, nothing computed; and the names of the measures to make."""
    device = device_of(settings.device)
    subject = open_subject(settings.model, settings.kind, settings.sample, settings.dtype, device)
    judge = None
    if set(settings.measure.what or IMAGES) & set(IMAGES):
        judge = _judged(lambda: describe(**asdict(settings.judge)))
    data = open_data(settings.data, settings.data.size or min(subject.size))
    count = image_count(settings, subject, SAMPLES)
    name = settings.name or subject.name
    results = Results(name, _model(subject), described(data), judge or {}, settings=_flat(words), hardware=hardware())
    run = Evaluation(settings, subject, data, None, count, Path(), progress, results)
    if subject.count is None:
        _check_captions(run)
    wanted, results.not_measured = plan.measures(settings, subject, data, judge, run.count, run.captions)
    run.out = Path(settings.out or Path(FOLDER) / f"{name}-{settings.judge.name}-{key_of(results)}")
    check_out(run.out)
    if judge is not None:
        run.judge = _judged(lambda: load_judge(device=device, **asdict(settings.judge)))
    results.command = shlex.join(["python", "-m", "eval", *words])
    results.created = datetime.now(UTC).isoformat(timespec="seconds")
    results.notes += subject.notes
    return run, wanted


def measured(run: Evaluation, wanted: Sequence[str]) -> str:
    """Make the measures and write the results after each; returns what failed, in words, or nothing.

    Raises:
        SettingError: a measure cannot be made of what was given; what came before it is written.
    """
    run.out.mkdir(parents=True, exist_ok=True)
    for name in FILES:  # of an earlier command
        (run.out / name).unlink(missing_ok=True)
    failed = ""
    for name in wanted:
        started, refused = time.monotonic(), None
        try:
            MEASURES[name](run)
        except (WorkerError, CapError) as error:
            failed = f"{name} failed: {error}"
            run.results.not_measured[name] = f"failed: {error}"
        except ValueError as error:
            refused = error if isinstance(error, SettingError) else SettingError(f"{name}: {error}")
            run.results.not_measured[name] = str(error)
        run.results.seconds[name] = round(time.monotonic() - started, 3)
        on_runs.targets(run)
        run.results.per_image = per_image(run)
        write_results(run.results, run.out)
        if refused is not None:
            raise refused
    return failed


def per_image(run: Evaluation) -> list[dict[str, Any]]:
    """The rows of per_image.csv."""
    return [
        {"set": name, "index": i} | {column: values[i] for column, values in columns.items()}
        for name, columns in run.rows.items()
        for i in range(len(columns["caption"]))
    ]


def check_out(folder: Path) -> None:
    """Raise a SettingError if the results cannot go there, or would mix with other files."""
    if folder.exists() and not folder.is_dir():
        raise SettingError(f"out={folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RESULTS).is_file():
        raise SettingError(f"out={folder} holds other files than results; name another folder")


def key_of(results: Results) -> str:
    """8 hex digits of all that determines the numbers."""
    settings = {name: value for name, value in results.settings.items() if name not in RUNNING}
    model = [results.model["fingerprint"], results.model["sampling"]]
    facts = [settings, *model, results.data, results.judge.get("sha256")]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:8]


def device_of(wanted: str) -> str:
    """The device that a setting names.

    Raises:
        SettingError: this machine has none.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, found in there.items() if found)
    if not there[wanted]:
        found = ", ".join(name for name, one in there.items() if one)
        raise SettingError(f"device={wanted}: there is none on this machine; there is {found}")
    return wanted


def _check_captions(run: Evaluation) -> None:
    """As many captions as are asked for, each of which the model can read."""
    found = len(run.captions)
    if found < run.count:
        if run.settings.measure.samples is not None:
            raise SettingError(
                f"measure.samples={run.count}: split {run.data.split} of data {run.data.name} has only {found} captions"
            )
        run.count = found
    run.subject.check(run.captions)


def _judged(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except SettingError:
        raise
    except (ValueError, OSError) as error:  # weights that are not what they should be, or not readable
        raise SettingError(f"judge: {error}") from error


def _model(subject: Subject) -> dict[str, Any]:
    return {
        "kind": subject.kind,
        "path": subject.model,
        "fingerprint": subject.fingerprint,
        "size": list(subject.size),
        "sampling": subject.sampling,
        "dtype": subject.dtype,
        "device": subject.device,
        "stored_images": subject.count,
    }


def _flat(words: Sequence[str]) -> dict[str, Any]:
    return flatten(plain_values(compose(words)))
