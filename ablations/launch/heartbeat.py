"""Whether a job is alive, told by itself: a file that it touches, read without trusting anybody's clock."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ALIVE = "alive"
BEAT_SECONDS = 5.0


@contextlib.contextmanager
def heartbeat(folder: Path, every: float = BEAT_SECONDS) -> Iterator[None]:
    """Beat in ``folder`` each ``every`` seconds for as long as this process computes inside."""
    folder.mkdir(parents=True, exist_ok=True)
    over = threading.Event()

    def beat() -> None:
        count = 0
        while not over.is_set():
            count += 1
            with contextlib.suppress(OSError):  # a full disk must not end the job that frees it
                (folder / ALIVE).write_text(f"{socket.gethostname()} {os.getpid()} {count}\n")
            over.wait(every)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(OSError):
            (folder / ALIVE).unlink()


class Listener:
    """How long hearts have been silent, by this process's own clock: what counts is when a file was last seen to change."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self._heard = clock, dict[Path, tuple[str, float]]()

    def silence(self, folder: Path) -> float | None:
        """Seconds since the beat of ``folder`` was last seen to change; None when there is no heart."""
        try:
            beat = (folder / ALIVE).read_text()
        except OSError:
            return None
        known = self._heard.get(folder)
        if known is None or known[0] != beat:
            self._heard[folder] = known = (beat, self.clock())
        return self.clock() - known[1]
