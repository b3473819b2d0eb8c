"""What every stage does: find what it builds on, be made once, alone in its folder, and go on there after a stop."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock
from PIL import Image
from torch import Tensor, nn

from ablations.track.stage_tracking import Tracker, unsent
from iris.errors import SettingError
from iris.io.files import naming, write_json
from iris.io.hashing import digest
from iris.io.progress import Progress, clock_text
from iris.settings import flatten, suggestion
from iris.stages.parts import VERSION, loop_settings
from iris.stages.processes import Processes
from iris.stages.settings import Settings
from iris.training.loop import CHECKPOINT, WHOLE, Share, Task, fit
from iris.training.safety import BatchFacts

RESULT, SETTINGS, WEIGHTS, PICTURES = "result.json", "settings.json", "weights", "pictures"
GAP = 2  # pixels between the pictures of a grid
LEAST_SIDE = 64  # smaller pictures are enlarged by whole pixels to about this

# What is seen at a look: lower is better, and what else to log.
Seen = tuple[float, dict[str, float]]


@dataclass(frozen=True)
class Desk:
    """What the stages of one command share."""

    runs: Path
    progress: Progress
    processes: Processes
    log: str

    @property
    def stages(self) -> Path:
        """Where stages, and what they share, lie."""
        return self.runs / "stages"


class Weights(Protocol):
    """Finished weights, or a stage that makes them."""

    key: str

    def make(self) -> Path:
        """The folder of the weights."""
        ...


@dataclass(frozen=True)
class Given:
    """Weights that a person named by their folder."""

    key: str
    folder: Path

    def make(self) -> Path:
        return self.folder


class Stage(ABC):
    """A stage of one command line.

    Args:
        settings: checked.
        desk: shared with the stages that it builds on.
        earlier: those, or their weights.

    Attributes:
        key: names the folder; the hash of what determines the weights.

    Raises:
        SettingError: anything that would fail later and can be known now.
    """

    def __init__(self, settings: Settings, desk: Desk, earlier: dict[str, Weights]) -> None:
        self.settings, self.desk, self.earlier = settings, desk, earlier
        loop_settings(settings.train)
        parts = desk.processes.count * settings.train.accumulate
        if settings.train.batch % parts:
            raise SettingError(
                f"train.batch={settings.train.batch} must be a multiple of {parts}: "
                f"{desk.processes.count} processes times train.accumulate={settings.train.accumulate}"
            )
        self.check()
        built_on = {name: weights.key for name, weights in earlier.items()}
        facts = {"version": VERSION, "seed": settings.seed, "built on": built_on, **self.facts()}
        self.key = f"{self.name}-{digest(facts)}"

    @property
    def name(self) -> str:
        """vae, class, text, aesthetic or distill."""
        return self.settings.stage

    @property
    def folder(self) -> Path:
        """Where it lives."""
        return self.desk.stages / self.key

    @property
    def weights(self) -> Path:
        """The folder of its finished weights."""
        return self.folder / WEIGHTS

    @property
    def done(self) -> bool:
        """Whether it is finished."""
        return (self.folder / RESULT).exists()

    @abstractmethod
    def check(self) -> None:
        """Raise a SettingError for what cannot be trained."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What determines the weights, beside the seed and what the stage builds on."""

    @abstractmethod
    def train(self, given: dict[str, Path]) -> dict[str, Any]:
        """Train on the weights ``given``; the first process writes ``weights``. Returns what is known of them."""

    @abstractmethod
    def usage(self, weights: Path, result: dict[str, Any]) -> list[str]:
        """Commands that use the weights where they lie."""

    def make(self) -> Path:
        """Make it and what it builds on, unless it is finished; returns ``weights``."""
        say, first = self.desk.progress.say, self.desk.processes.first
        with self._lock() if first else contextlib.nullcontext():
            if self.desk.processes.agree(lambda: self.done):
                say(f"{self.name}: {self.key} is finished, taken as it is")
                if first and unsent(self.folder):
                    with self._tracked():
                        say(f"{self.name}: MLflow gets what it missed")
                return self.weights
            self.desk.processes.device  # noqa: B018 (an absent one is told before anything is made)
            given = {name: weights.make() for name, weights in self.earlier.items()}
            goes_on = (self.folder / CHECKPOINT).exists()
            say(f"{self.name}: {self.key} {'goes on where it was' if goes_on else 'is made'} in {self.folder}")
            began = time.monotonic()
            if first:
                write_json(self.folder / SETTINGS, asdict(self.settings))
            result = self.train(given)
            if first:
                facts = {
                    "key": self.key,
                    "stage": self.name,
                    "steps": self.settings.train.steps,
                    "seconds": time.monotonic() - began,
                    "built_on": {n: w.key for n, w in self.earlier.items()},
                }
                write_json(self.folder / RESULT, facts | result)
        self.desk.processes.prepared(self.folder / RESULT, lambda: None)
        say(f"{self.name}: done in {clock_text(time.monotonic() - began)}")
        return self.weights

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One command makes a stage; another one that wants it waits."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / "lock")
        if not _free(lock):
            self.desk.progress.say(f"{self.name}: {self.key} is being made by another command; waiting for it")
        with lock:
            yield

    def fit(self, task: Task, look: Callable[[int], Seen]) -> nn.Module:
        """Train ``task``, seen at each train.validate_every steps; ends with the averaged weights in its module."""
        train, progress = self.settings.train, self.desk.progress
        watched = Watched(task, look)
        with self._tracked() as tracker:

            def observe(row: dict[str, float]) -> None:
                progress.training(self.name, row, train.batch)
                if tracker is not None:
                    tracker.news()

            return fit(watched, loop_settings(train), self.folder, observe, watched.facts)

    @contextlib.contextmanager
    def _tracked(self) -> Iterator[Tracker | None]:
        if self.desk.log == "none" or not self.desk.processes.first:
            yield None
            return
        settings = flatten(asdict(self.settings)) | {"key": self.key, "command_folder": str(Path.cwd())}
        with Tracker(self.folder, settings, self.desk.progress.say) as tracker:
            yield tracker

    def picture(self, name: str, images: np.ndarray, columns: int) -> None:
        """Keep uint8 images [N, H, W, 3] as a grid, in the first process."""
        if self.desk.processes.first:
            save_grid(self.folder / PICTURES / f"{name}.png", images, columns)


class Watched:
    """A task whose averaged weights are looked at now and then: what the loop calls validation.

    Args:
        task: what is trained.
        look: called with the number of steps done.
    """

    def __init__(self, task: Task, look: Callable[[int], Seen]) -> None:
        self.module, self.batch = task.module, task.batch
        self._task, self._look = task, look
        self._step, self._facts = 0, {}

    def loss(self, step: int, share: Share = WHOLE) -> tuple[Tensor, dict[str, Tensor]]:
        self._step = step + 1
        return self._task.loss(step, share)

    def go_on_at(self, step: int) -> None:
        """Let a task that reads in passing find its place."""
        if hasattr(self._task, "go_on_at"):
            self._task.go_on_at(step)

    def describe(self, step: int) -> BatchFacts:
        """What a message about step ``step`` names."""
        return self._task.describe(step)

    def validate(self) -> float:
        """What the look gives."""
        value, self._facts = self._look(self._step)
        return value

    def facts(self) -> dict[str, float]:
        """What else was seen at the last look, once."""
        facts, self._facts = self._facts, {}
        return facts


def named(setting: str, word: str, desk: Desk) -> Given:
    """Weights by a key below runs_dir/stages, or by a folder.

    Raises:
        SettingError: there is neither.
    """
    folder = desk.stages / word
    if "/" not in word and (folder / RESULT).exists():
        return Given(word, folder / WEIGHTS)
    folder = Path(word).expanduser()
    if folder.is_dir():
        return Given(content_key(setting, folder), folder)
    there = sorted(path.parent.name for path in desk.stages.glob(f"*/{RESULT}"))
    keys = f"; finished: {', '.join(there[:8])}" if there else ""
    raise SettingError(
        f"{setting}={word!r} is neither a finished stage in {desk.stages} nor a folder{suggestion(word, there)}{keys}"
    )


def content_key(setting: str, folder: Path) -> str:
    """The hash of a folder's configuration and weights.

    Raises:
        SettingError: it has none.
    """
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".json")]
    if not any(path.name == "config.json" for path in files):
        raise SettingError(f"{setting}={folder}: config.json is missing; expected finished weights")
    digests = []
    for path in files:
        with open(path, "rb") as file:
            digests.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    return f"folder-{digest(digests)}"


def check_out(out: str | None) -> None:
    """Raise a SettingError if ``out`` is something else than weights from before, or nothing."""
    path = None if out is None else Path(out).expanduser()
    if path is None or not path.exists():
        return
    if not path.is_dir():
        raise SettingError(f"out={out} is a file; it must be a folder")
    if any(path.iterdir()) and not (path / "config.json").exists():
        raise SettingError(f"out={out} is a folder with other files in it; it must be new, empty, or hold weights")


def publish(weights: Path, out: str) -> Path:
    """Copy finished weights to ``out``, which only then changes."""
    place = Path(out).expanduser()
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (place.with_name(f".{place.name}.{word}") for word in ("new", "old"))
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    try:
        _copy(weights, fresh)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if place.exists():
        place.rename(old)
    fresh.rename(place)
    shutil.rmtree(old, ignore_errors=True)
    return place


def _copy(folder: Path, place: Path) -> None:
    """As shutil.copytree, which gathers errors into one that has no number."""
    place.mkdir()
    for path in sorted(folder.rglob("*")):
        target = place / path.relative_to(folder)
        if path.is_dir():
            target.mkdir()
        else:
            with naming(target):
                shutil.copy2(path, target)


def save_grid(path: Path, images: np.ndarray, columns: int) -> None:
    """Write uint8 images [N, H, W, 3] as one PNG, row by row; small ones enlarged by whole pixels."""
    count, height, width = images.shape[:3]
    scale = max(1, LEAST_SIDE // max(height, width))
    columns = min(columns, count)
    down, right = height * scale + GAP, width * scale + GAP
    sheet = np.full((-(-count // columns) * down - GAP, columns * right - GAP, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * down, i % columns * right
        sheet[top : top + height * scale, left : left + width * scale] = image.repeat(scale, 0).repeat(scale, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    Image.fromarray(sheet).save(temporary, "PNG")
    temporary.replace(path)


def shown(values: Sequence[str]) -> str:
    """The first of some captions, for an example on the command line."""
    return values[0].replace('"', "'")[:80] if values else "a red circle"


def _free(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except TimeoutError:
        return False
    lock.release()
    return True
