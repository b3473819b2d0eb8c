"""The processes that compute: their threads and environment, and that they do not hear Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator


def thread_environment(threads: int) -> dict[str, str]:
    """Environment of a process that computes on ``threads`` threads.

    Waiting threads sleep instead of spinning: with spinning, two threads under contention are slower than one.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }


@contextlib.contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Ctrl-C, which a terminal sends to the driver's whole process group, is ignored by this process and what it starts."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for what is started inside: they must be set before a process loads torch."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
