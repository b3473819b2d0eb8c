"""What a person sees while a stage is made: a live line on a terminal and in a notebook, plain lines elsewhere."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SECONDS = 1.0  # between two signs of life while other processes work
PLAIN_SECONDS = 5.0  # between two plain lines of the same work
BAR = 24


class Progress:
    """Says what is done and how far it is; as a context manager it ends its live line.

    Args:
        quiet: says nothing: of several processes only the first one speaks.
        console: rich console; None makes one for standard output. One that is no terminal gets plain lines, but a
            notebook's a line for each work, which stays as it was last.
        every: seconds between two plain lines of the same work.
        clock: seconds, monotonic (tests pass their own).
    """

    def __init__(
        self,
        quiet: bool = False,
        console: Console | None = None,
        every: float = PLAIN_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console, self.quiet, self.every, self.clock = console or Console(), quiet, every, clock
        self.notebook = console is None and self.console.is_jupyter
        self.plain = not self.notebook and (not self.console.is_terminal or self.console.is_dumb_terminal)
        self._began, self._live, self._shown = clock(), None, None
        self._work, self._work_began, self._spoke = "", 0.0, -math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def say(self, text: str) -> None:
        """A sentence that stays."""
        if self.quiet:
            return
        self._end()
        self._print(text)

    def done(self, work: str, count: int, total: int | None = None, facts: str = "", left: float | None = None) -> None:
        """``work`` has come to ``count`` of ``total``; called as often as one likes.

        Args:
            facts: what else there is to say, such as a loss.
            left: seconds to its end; None: from the pace so far.
        """
        if self.quiet:
            return
        now = self.clock()
        if work != self._work:
            self._work, self._work_began, self._spoke, self._shown = work, now, -math.inf, None
        if left is None and total and count:
            left = (now - self._work_began) / count * (total - count)
        end = f", {clock_text(left)} left" if left is not None and count != total else ""
        amount = f"{count}/{total} ({count / total:.0%})" if total else f"{count}"
        text = f"{work} {amount}{f', {facts}' if facts else ''}{end}"
        if self.plain:
            if now - self._spoke >= self.every or count == total:
                self._print(text)
                self._spoke = now
        elif self.notebook:
            self._display(text)
        else:
            self._show(text, count / total if total else None)

    def training(self, work: str, row: dict[str, float], batch: int) -> None:
        """How the loop goes, from a row of its metrics."""
        facts = [f"loss {short(row['loss'])}"]
        facts += [f"validation {short(row['validation'])}"] if "validation" in row else []
        facts += [f"PSNR {row['psnr']:.1f} dB"] if "psnr" in row else []
        facts += [f"{row['images_per_s']:.0f} images/s"]
        left = (row["steps"] - row["step"]) * batch / max(row["images_per_s"], 1e-9)
        self.done(work, int(row["step"]), int(row["steps"]), ", ".join(facts), left)

    def _print(self, text: str) -> None:
        if self.notebook:  # rich would write an HTML block for each line
            print(self._timed(text))
            return
        self.console.print(Text(self._timed(text)), soft_wrap=True, highlight=False)

    def _timed(self, text: str) -> str:
        return f"[{clock_text(self.clock() - self._began)}] {text}"

    def _display(self, text: str) -> None:
        """Show a notebook's line of the work, or change it."""
        from IPython.display import display

        data: dict[str, Any] = {"text/plain": self._timed(text)}
        if self._shown is None:
            self._shown = display(data, raw=True, display_id=True)
        else:
            self._shown.update(data, raw=True)

    def _show(self, text: str, share: float | None) -> None:
        line = Table.grid(padding=(0, 1))
        line.add_row(
            *([] if share is None else [ProgressBar(total=1.0, completed=share, width=BAR)]),
            Text(text, no_wrap=True, overflow="ellipsis"),
        )
        if self._live is None:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        self._live.update(line)

    def _end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._shown = None


@contextmanager
def waiting(progress: Any, work: str) -> Iterator[None]:
    """Signs of life while ``work`` goes on in other processes: seconds, on the line of ``progress``."""
    ended, began = threading.Event(), time.monotonic()

    def beat() -> None:
        while not ended.wait(SECONDS):
            progress.done(f"{work}, seconds so far:", int(time.monotonic() - began))

    thread = threading.Thread(target=beat, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def clock_text(seconds: float) -> str:
    """Seconds as m:ss, from an hour on 1h05, from 100 hours on whole days."""
    whole = max(0, int(seconds + 0.5))
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}" if whole < 360_000 else f"{whole // 86_400}d"


def short(value: float) -> str:
    """A loss in at most six characters."""
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0e}"
