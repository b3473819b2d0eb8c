"""The engine: a piece of work that is done once, in a folder named by what determines its result.

A stage's key is the hash of the settings that change its result, of the keys that it builds on and of its code's version.
``result.json`` is written last; whoever wants a stage that has one takes it as it is, whichever command made it. Two
processes that want the same stage meet at its lock, and the lock dies with the process that holds it. One that was killed
goes on where it was, as far as its work keeps checkpoints.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

from filelock import FileLock

from iris.errors import SettingError
from iris.io.files import read_json, write_json
from iris.io.hashing import digest, file_sha256
from iris.io.machine import environment
from iris.settings import suggestion
from iris.stages.processes import Processes

RESULT, SETTINGS, LOCK, WEIGHTS = "result.json", "settings.json", "lock", "weights"
CONTENT = (".safetensors", ".json")  # of finished weights, what they are known by
CONFIGURATIONS = ("config.json", "pipeline.json")  # of a saved model; of an exported one, with the hashes of its files


class Progress(Protocol):
    """Who is told how far the work is: a terminal, or a file that a driver reads."""

    def say(self, text: str) -> None:
        """A sentence that stays."""

    def done(self, work: str, count: int, total: int | None = None) -> None:
        """``work`` has come to ``count`` of ``total``."""

    def training(self, work: str, row: Mapping[str, float], batch: int) -> None:
        """How a training loop goes, from a row of its metrics."""


def unobserved(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Nobody follows the training in ``folder``."""
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Context:
    """What the stages of one command share.

    Attributes:
        runs: the runs folder.
        observe: entered with the folder of a stage while it trains.
        fingerprints: of data and weights that were looked at once.
    """

    runs: Path
    progress: Progress
    processes: Processes = field(default_factory=lambda: Processes("cpu"))
    observe: Callable[[Path], contextlib.AbstractContextManager[Any]] = unobserved
    fingerprints: dict[Any, str] = field(default_factory=dict)

    @property
    def stages(self) -> Path:
        """Where stages lie."""
        return self.runs / "stages"


class Work(Protocol):
    """Something that a stage builds on: another stage, or weights that a person named."""

    key: str

    @property
    def done(self) -> bool:
        """Whether it is there."""

    @property
    def place(self) -> Path:
        """The folder of what it made."""

    def make(self) -> Path:
        """Make it unless it is there; the folder of what it made."""

    def chain(self) -> Iterator[Stage]:
        """The stages that it takes to make it, the first first."""


@dataclass(frozen=True)
class Finished:
    """Weights that a person named by a key or a folder; what a stage made them of is known by its keys."""

    key: str
    folder: Path
    built_on: Mapping[str, str] = field(default_factory=dict)
    done: ClassVar[bool] = True

    @property
    def place(self) -> Path:
        return self.folder

    def make(self) -> Path:
        return self.folder

    def chain(self) -> Iterator[Stage]:
        return iter(())


@dataclass(frozen=True)
class Inside:
    """One of several models that a stage makes: a folder in its own."""

    stage: Stage
    name: str

    @property
    def key(self) -> str:
        return f"{self.stage.key}/{self.name}"

    @property
    def done(self) -> bool:
        return self.stage.done

    @property
    def place(self) -> Path:
        return self.stage.place / self.name

    def make(self) -> Path:
        return self.stage.make() / self.name

    def chain(self) -> Iterator[Stage]:
        return self.stage.chain()


class Stage(ABC):
    """A piece of work and its folder.

    Args:
        context: shared with what it builds on.
        needs: what it builds on, by role; their keys are part of its own.

    Raises:
        SettingError: anything that would fail later and can be known now.
    """

    kind: ClassVar[str]  # the first word of its key
    version: ClassVar[int] = 1  # raised when a change of code changes what the same settings give
    collective: ClassVar[bool] = False  # whether all processes work, or the first alone while the others wait

    def __init__(self, context: Context, needs: Mapping[str, Work | None] | None = None) -> None:
        self.context = context
        self.needs = {role: work for role, work in (needs or {}).items() if work is not None}

    @cached_property
    def key(self) -> str:
        """Names the folder."""
        built_on = {role: work.key for role, work in self.needs.items()}
        return f"{self.kind}-{digest([self.version, self.facts(), built_on])}"

    @property
    def label(self) -> str:
        """What it is, for people."""
        return self.kind

    @property
    def folder(self) -> Path:
        """Where it lives."""
        return self.context.stages / self.key

    @property
    def place(self) -> Path:
        """The folder of what it made."""
        return self.folder

    @property
    def done(self) -> bool:
        """Whether it is finished."""
        return (self.folder / RESULT).exists()

    @property
    def result(self) -> dict[str, Any]:
        """What is known of it once it is finished."""
        return read_json(self.folder / RESULT) or {}

    @property
    def uses(self) -> dict[str, Work]:
        """What must be made before it and changes nothing of its result, such as what a training is looked at with."""
        return {}

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What determines its result beside what it builds on, as plain values."""

    @abstractmethod
    def work(self) -> dict[str, Any]:
        """Do it in ``folder``; returns what is to be known of the result.

        What it builds on is there: a stage that the first process works on alone must not ask the others for anything.
        """

    def known(self) -> dict[str, Any]:
        """What the result says of what lies beside it."""
        return {}

    def settings(self) -> dict[str, Any]:
        """For people: what it was made with."""
        return self.facts()

    def chain(self) -> Iterator[Stage]:
        """What it builds on and uses, the first first, each once; itself last."""
        seen: set[str] = set()
        for work in (*self.needs.values(), *self.uses.values()):
            for stage in work.chain():
                if stage.key not in seen:
                    seen.add(stage.key)
                    yield stage
        yield self

    def make(self) -> Path:
        """Make it and what it needs, unless it is finished; returns ``place``."""
        say, processes = self.context.progress.say, self.context.processes
        if processes.agree(lambda: self.done):
            say(f"{self.label}: {self.key} is finished, taken as it is")
            return self.place
        _ = processes.device  # an absent one is told before anything is made
        for work in (*self.needs.values(), *self.uses.values()):
            if not processes.agree(lambda work=work: work.done):
                work.make()
        if self.collective:
            with self._locked() if processes.first else contextlib.nullcontext():
                if not processes.agree(lambda: self.done):
                    self._make()
            processes.prepared(self.folder / RESULT, lambda: None)
        else:
            processes.prepared(self.folder / RESULT, self._make_alone)
        return self.place

    def _make_alone(self) -> None:
        with self._locked():
            if not self.done:
                self._make()

    def _make(self) -> None:
        say, first = self.context.progress.say, self.context.processes.first
        if self.collective:  # it takes a while
            say(f"{self.label}: {self.key} {'goes on where it was' if self.begun else 'is made'} in {self.folder}")
        began = time.monotonic()
        if first:
            write_json(self.folder / SETTINGS, self.settings())
        made = self.work()
        if first:
            known = {
                "key": self.key,
                "kind": self.kind,
                "seconds": time.monotonic() - began,
                "built_on": {role: work.key for role, work in self.needs.items()},
                "environment": environment(self.context.processes.device),
            }
            write_json(self.folder / RESULT, known | made | self.known())
            say(f"{self.label}: {self.key} done in {time.monotonic() - began:.0f} s")

    @property
    def begun(self) -> bool:
        """Whether an earlier process has left something to go on with."""
        return False

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process makes a stage; another one that wants it waits, for a living holder, never for a dead one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK)
        if not _free(lock):
            self.context.progress.say(f"{self.label}: {self.key} is being made by another process; waiting for it")
        with lock:
            yield


def _free(lock: FileLock) -> bool:
    from filelock import Timeout

    try:
        with lock.acquire(timeout=0):
            return True
    except Timeout:
        return False


def named(setting: str, word: str, context: Context) -> Finished:
    """Weights by a key below runs_dir/stages, KEY/steps-2 for one of several students, or by a folder.

    Raises:
        SettingError: there is neither.
    """
    key, _, inside = word.rstrip("/").partition("/")
    made = context.stages / key
    if (made / RESULT).exists() and (made / WEIGHTS / inside).is_dir():
        return Finished(word.rstrip("/"), made / WEIGHTS / inside, read_json(made / RESULT)["built_on"])
    folder = Path(word).expanduser()
    if folder.is_dir():
        return _made(folder) or Finished(content_key(setting, folder), folder)
    there = sorted(path.parent.parent.name for path in context.stages.glob(f"*/{WEIGHTS}/config.json"))
    keys = f"; finished: {', '.join(there[:8])}" if there else ""
    raise SettingError(
        f"{setting}={word!r} is neither a finished stage in {context.stages} nor a folder{suggestion(word, there)}{keys}"
    )


def identity(setting: str, folder: Path) -> str:
    """What weights are known by: the key of the stage that made them, else their content.

    Raises:
        SettingError: the folder holds no weights.
    """
    return made_by(folder) or content_key(setting, folder)


def made_by(folder: Path) -> str | None:
    """The key of the stage that made a folder of weights, if they are still as it made them."""
    found = _made(folder)
    return found.key if found else None


def _made(folder: Path) -> Finished | None:
    folder = folder.resolve()
    inside = folder.parent.name == WEIGHTS
    whole = folder.parent if inside else folder
    made = read_json(whole.parent / RESULT) if whole.name == WEIGHTS else None
    if not made or made.get("content") != content_key("weights", whole):
        return None
    return Finished(f"{made['key']}/{folder.name}" if inside else made["key"], folder, made["built_on"])


def content_key(setting: str, folder: Path) -> str:
    """The hash of a folder's configuration and weights.

    Raises:
        SettingError: it has none.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in CONTENT]
    if not any((folder / name).is_file() for name in CONFIGURATIONS):
        raise SettingError(f"{setting}={folder}: config.json is missing; expected finished weights")
    return f"folder-{digest([(path.relative_to(folder).as_posix(), file_sha256(path)) for path in files])}"
