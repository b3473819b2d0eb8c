"""One evaluation, start to finish: open, check, measure, write."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from eval.report.page import write_pages
from eval.results import FILES, RESULTS, Results, hardware, write_results
from eval.settings import IMAGES, TREE, WHAT, Settings
from eval.speed.caps import CapError
from eval.speed.workers import WorkerError
from eval.stages.data import described, open_data
from eval.stages.evaluation import Evaluation
from eval.stages.images import Stored
from eval.stages.judging import Judging
from eval.stages.makers import Maker
from eval.stages.possible import possible
from eval.stages.running import RUNNING, targets
from eval.stages.scores import SCORED, Scores
from eval.subjects import Subject, open_subject
from iris.errors import SettingError
from iris.io.command import written
from iris.io.follower import Follower, following
from iris.io.hashing import digest
from iris.io.machine import device_named
from iris.io.masking import masked
from iris.io.progress import Progress, waiting
from iris.settings import facts, flatten
from iris.stages.engine import Context, Stage, named
from iris.stages.processes import Processes

SHOWN = 32  # images on the page
FOLDER = "eval_results"
KEY = re.compile(r"[a-z]+-[0-9a-f]{12}(/[\w-]+)?")  # of a stage, or of one of several students of it


class MeasureFailed(RuntimeError):
    """A measure failed for a reason outside the settings; the others are in the results."""


def evaluate(words: Sequence[str], progress: Progress) -> tuple[Results, Path]:
    """Measure what a command line names; returns the results and their folder.

    Raises:
        SettingError: a setting, a model or data that cannot be used.
        MeasureFailed: a measuring process failed; what the other measures gave is written.
    """
    settings = TREE.build(words)
    with following(settings.track, progress.say, uri=settings.track, setting="track") as follower:
        return _evaluated(settings, words, progress, follower)


def _evaluated(
    settings: Settings, words: Sequence[str], progress: Progress, follower: Follower | None
) -> tuple[Results, Path]:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = device_named(settings.device)
    context = Context(Path(settings.runs_dir), progress, Processes(device))
    subject = opened(settings, context)
    run = evaluation_of(settings, subject, context)
    wanted, refused = possible(run, IMAGES, WHAT)
    _check_captions(run, subject)
    results = _begun(settings, run, subject, words)
    results.not_measured = refused
    out = folder_of(settings, results)
    check_out(out)
    _check_judge(run, wanted)
    progress.say(f"{results.name} ({subject.kind}, {len_of(run):,} images, data {run.data.name}): {', '.join(wanted)}")
    for name, why in refused.items():
        progress.say(f"no {name}: {why}")
    failed = _Measuring(run, subject, results, out).take(wanted)
    shown = run.main.images()[:SHOWN] if set(wanted) & set(IMAGES) and run.main.done else None
    write_pages(results, out, shown, run.main.captions)
    if follower is not None:
        progress.say(f"sending the results to MLflow; look at runs: {follower.shows}")
        follower.follow(out)
    if failed:
        raise MeasureFailed(f"{failed} (the other results: {out})")
    return results, out


def opened(settings: Settings, context: Context) -> Subject:
    """The model of model=, a path or a key in runs_dir.

    Raises:
        SettingError: there is none.
    """
    if settings.model is None:
        raise SettingError("model is missing; name a saved model, a key in runs_dir, images or a diffusers pipeline")
    how = (settings.kind, settings.sample, settings.dtype, context.processes.name)
    if Path(settings.model).expanduser().exists() or not KEY.fullmatch(settings.model):
        return open_subject(settings.model, *how)
    subject = open_subject(str(named("model", settings.model, context).folder), *how)
    subject.name = settings.model.replace("/", "-")  # the folder of every stage's model is called weights
    return subject


def evaluation_of(settings: Settings, subject: Subject, context: Context) -> Evaluation:
    """What the measures are taken on; nothing is computed yet.

    Raises:
        SettingError: data or a judge that cannot be used.
    """
    made = Maker.of(subject) if subject.count is None else Stored(subject, settings.measure.samples)
    data = open_data(settings.data, settings.measure.split, settings.data.size or min(subject.size))
    judging = Judging(settings.judge, context.processes.name)
    if set(settings.measure.what or IMAGES) & set(IMAGES):
        _ = judging.about
    return Evaluation(context, settings.measure, made, data, judging, settings.seed)


class _Measuring:
    """Takes the measures of an evaluation one after another, and writes the results after each."""

    def __init__(self, run: Evaluation, subject: Subject, results: Results, out: Path) -> None:
        self.run, self.subject, self.results, self.out = run, subject, results, out
        self.rows: dict[str, dict[str, Sequence[Any]]] = {}

    def take(self, wanted: Sequence[str]) -> str:
        """Take them; returns what failed, in words, or nothing.

        Raises:
            SettingError: a measure cannot be made of what was given; what came before it is written.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        for name in FILES:  # of an earlier command
            (self.out / name).unlink(missing_ok=True)
        failed = []
        for name in wanted:
            with self._timed(name):
                try:
                    self._add(self._taken(name))
                except (WorkerError, CapError) as error:
                    failed.append(f"{name} failed: {error}")
                    self.results.not_measured[name] = f"failed: {error}"
        return "; ".join(failed)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except ValueError as error:
            self.results.not_measured[name] = str(error)
            raise error if isinstance(error, SettingError) else SettingError(f"{name}: {error}") from error
        finally:
            self.results.seconds[name] = round(time.monotonic() - began, 3)
            self.results.per_image = _per_image(self.rows)
            write_results(self.results, self.out)

    def _taken(self, name: str) -> Scores:
        run = self.run
        if name in RUNNING:
            caption = (run.main.captions or [self.subject.example()])[0]
            with waiting(run.context.progress, name):
                return RUNNING[name](self.subject, run.measure, caption)
        stage: Stage = SCORED[name](run)
        stage.make()
        for file in FILES:  # a page that the measure wrote
            if (stage.folder / file).is_file():
                (self.out / file).write_bytes((stage.folder / file).read_bytes())
        return stage.scores()

    def _add(self, scores: Scores) -> None:
        run, results = self.run, self.results
        known = run.made_with()
        numbers = {k: replace(n, made_with={**known, **n.made_with}) for k, n in scores.numbers.items()}
        results.numbers |= numbers
        results.details |= scores.details
        for name, columns in scores.rows.items():
            self.rows.setdefault(name, {}).update(columns)
        results.model |= run.main.result["model"] if run.main.done else self.subject.facts()
        targets(results.numbers, results.details, results.model.get("nfe"), self.subject.dtype)


def _per_image(rows: dict[str, dict[str, Sequence[Any]]]) -> list[dict[str, Any]]:
    """The rows of per_image.csv."""
    return [
        {"set": name, "index": i} | {column: values[i] for column, values in columns.items()}
        for name, columns in rows.items()
        for i in range(len(columns["caption"]))
    ]


def _begun(settings: Settings, run: Evaluation, subject: Subject, words: Sequence[str]) -> Results:
    """What is known before anything is measured."""
    about = run.judging.about if set(settings.measure.what or IMAGES) & set(IMAGES) else {}
    return Results(
        settings.name or subject.name,
        _model(subject),
        described(run.data),
        about,
        settings=flatten(asdict(settings)) | {"track": settings.track and masked(settings.track)},
        hardware=hardware(),
        command=written(words, "eval"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=list(subject.notes),
    )


def check_out(folder: Path) -> None:
    """Raise a SettingError if the results cannot go there, or would mix with other files."""
    if folder.exists() and not folder.is_dir():
        raise SettingError(f"out={folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RESULTS).is_file():
        raise SettingError(f"out={folder} holds other files than results; name another folder")


def folder_of(settings: Settings, results: Results) -> Path:
    """Where the results go: out=, or a folder named by all that determines the numbers.

    The model's files are known by their contents.
    """
    if settings.out:
        return Path(settings.out)
    known = {name: value for name, value in facts(settings).items() if name != "model"}
    model, measure = [results.model["fingerprint"], results.model["sampling"]], settings.measure
    speed = [settings.device, measure.threads, asdict(measure.latency), asdict(measure.caps)]
    key = digest([known, *model, results.data, results.judge.get("sha256"), speed])[:8]
    return Path(FOLDER) / f"{results.name}-{settings.judge.name}-{key}"


def len_of(run: Evaluation) -> int:
    """Images of the main set."""
    return run.made.count if isinstance(run.made, Stored) else len(run.main.captions)


def _check_captions(run: Evaluation, subject: Subject) -> None:
    """As many captions as are asked for, each of which the model can read."""
    if isinstance(run.made, Stored):
        return
    found, asked = len(run.main.captions), run.measure.samples
    if asked is not None and found < asked:
        raise SettingError(
            f"measure.samples={asked}: split {run.data.split} of data {run.data.name} has only {found} captions"
        )
    subject.check(run.main.captions)


def _check_judge(run: Evaluation, wanted: Sequence[str]) -> None:
    """Load the judge, if it is needed: one that cannot be is told before an image is made."""
    if not all(SCORED[name](run).done for name in wanted if name in SCORED):
        _ = run.judging.judge


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
