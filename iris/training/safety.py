"""What can end a run before its last step, each with a message that says where, why and what to do."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from iris.errors import SettingError
from iris.io.files import FULL

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
ROWS_NAMED = 64
LOST = (
    "connection closed",
    "connection reset",
    "connection refused",
    "broken pipe",
    "timed out",
    "timeout",
    "nccl",
    "gloo",
    "peer",
    "socket",
)


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite; the message has the step, its rows and settings to look at."""


class OutOfMemory(MemoryError):
    """Something does not fit; the message says what, and the settings that make it smaller."""


class DiskFull(OSError):
    """A checkpoint or a row could not be written; the message says which checkpoint is left."""


class LostWorker(RuntimeError):
    """Another process of the run is gone; the message says which checkpoint is left."""


class ShareError(SettingError):
    """A process cannot use its share of the data, of which the others know nothing."""


class Stopped(SystemExit):
    """A signal ended the run after a checkpoint; the exit code is 128 + its number, as of a process that it killed."""


class BatchFacts(NamedTuple):
    """What a message about a step names: row numbers of its global batch, an example's shape, settings that matter (those
    without a group are of the training's own), and where the rows came from, if that is known."""

    rows: Sequence[int] = ()
    size: tuple[int, ...] = ()
    settings: Mapping[str, object] = {}
    keys: Sequence[str] = ()


def non_finite(step: int, loss: float, norm: float, facts: BatchFacts, settings: Mapping[str, object]) -> NonFiniteLoss:
    """The error of step ``step`` (from 1)."""
    likely = ", ".join(f"{name}={value}" for name, value in {**settings, **facts.settings}.items())
    text = f"step {step}: loss {loss}, gradient norm {norm}. Likely settings: {likely}"
    if facts.rows:
        rows = [f"{row} ({key})" for row, key in zip(facts.rows, facts.keys, strict=True)] if facts.keys else facts.rows
        named = ", ".join(map(str, rows[:ROWS_NAMED]))
        more = len(facts.rows) - ROWS_NAMED
        text += f". Rows of the batch: {named}" + (f" and {more} more" if more > 0 else "")
    return NonFiniteLoss(text)


@contextmanager
def explained_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Turn any device's out-of-memory error into ``OutOfMemory`` with ``advice()``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        short = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not short and "allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise OutOfMemory(f"out of memory {advice()} ({cause})") from error


@contextmanager
def explained_disk(folder: Path, left: Callable[[], str]) -> Iterator[None]:
    """Turn a full disk's error into ``DiskFull``; ``left()`` says which checkpoint there is."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL or isinstance(error, DiskFull):
            raise
        raise DiskFull(
            error.errno, f"no space left to write to {folder}; {left()}. Free some space and run the same command again"
        ) from error


@contextmanager
def explained_loss_of_worker(world: int, save: Callable[[], str]) -> Iterator[None]:
    """Turn a broken collective into ``LostWorker``; ``save()`` keeps the state and says which checkpoint there is."""
    try:
        yield
    except (LostWorker, NonFiniteLoss):  # whatever words are in them, such as the names of rows
        raise
    except RuntimeError as error:
        text = str(error).lower()
        if (
            world == 1
            or isinstance(error, torch.OutOfMemoryError)
            or not (isinstance(error, torch.distributed.DistError) or any(word in text for word in LOST))
        ):
            raise
        raise LostWorker(f"another of the {world} processes is gone; {save()}. Run the same command again") from error


class Signals:
    """Inside, SIGTERM, SIGUSR1 and SIGUSR2 only leave their number in ``pending``: the loop acts between two steps.

    Handlers from before, such as submitit's, are put back at the end and called by ``hand_over``. Only Python's main
    thread may set handlers; in another one signals keep their meaning.
    """

    def __init__(self) -> None:
        self.pending = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if kind is None and self.pending:  # it came when the last step was done: everything is saved
            self.hand_over(self.pending, "the run is complete")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.pending = number

    def hand_over(self, number: int, state: str) -> None:
        """After the checkpoint: let the handler from before act, and where there was none, stop.

        submitit's requeues the job and exits, or, for a signal that it passes over, returns: then the run goes on.

        Args:
            number: of the signal.
            state: what to say of the run.

        Raises:
            Stopped: nobody else handles this signal.
        """
        self.pending = 0
        name, before = signal.Signals(number).name, self._before.get(number)
        print(f"{name}: {state}", file=sys.stderr, flush=True)
        if before == signal.SIG_IGN:
            return
        if callable(before):
            before(number, None)
            return
        raise Stopped(128 + number)
