"""What a person sees while a grid runs: a live table on a terminal, plain lines elsewhere.

Trials and shared stages tell how far they are in ``status.json`` in their folder; ``Watch.update`` reads those.
"""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ablations.answer.records import GridOutcome
from ablations.answer.summary import summary_renderables
from iris.io.progress import clock_text, short

ENDED = ("done", "failed", "cached")
STYLES = {"waiting": "dim", "running": "", "done": "green", "failed": "bold red", "cached": "cyan"}
QUIET_SECONDS = 45.0  # plain mode says something at least this often
STALE_SECONDS = 120.0  # a running trial whose status did not change for longer is pointed out
WIDE = 100  # columns of the terminal from which the roomy layout is used


@dataclass
class _Row:
    """One trial or shared stage as last seen."""

    key: str
    label: str
    folder: Path | None
    stage: bool
    state: str = "waiting"
    phase: str = ""
    note: str = ""
    started: float | None = None  # of this watch's clock
    ended: float | None = None
    status: dict[str, Any] = field(default_factory=dict)
    old: dict[str, Any] | None = None  # status.json as it was before this invocation
    heard: float = -math.inf  # when the status last changed
    said: tuple[str, str] = ("", "")  # state and phase of the last plain line
    said_at: float = -math.inf
    place: str = ""  # the node, or why it waits

    @property
    def active(self) -> bool:
        return self.state == "running"


class Watch:
    """Shows a grid's progress; use as a context manager and call ``update`` about once a second.

    Args:
        name: the grid's name. question: its question, shown in the heading.
        workers: how many trials run at once (for the time left).
        console: rich console; None makes one for standard output. A console that is no terminal gets plain lines.
        every: seconds between two plain lines of a running trial.
        cost: how many of what a trial occupies, such as (2, "core"): hours of it are counted.
        clock: seconds, monotonic (tests pass their own).
    """

    def __init__(
        self,
        name: str,
        question: str = "",
        workers: int = 1,
        console: Console | None = None,
        every: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
        cost: tuple[int, str] | None = None,
    ) -> None:
        self.console = console or Console()
        self.name, self.question, self.workers, self.every, self.clock = name, question, max(1, workers), every, clock
        self.cost = cost
        self.plain = not self.console.is_terminal or self.console.is_dumb_terminal
        self._rows: dict[str, _Row] = {}
        self._lock = threading.RLock()  # rich redraws from its own thread
        self._live: Live | None = None
        self._began = clock()
        self._spoke = -math.inf

    def __enter__(self) -> Self:
        self._began = self.clock()
        if self.plain:
            self._say(Text(f"grid {self.name}: {self.question}".rstrip(": ")))
        else:
            self._draw()
        return self

    def _draw(self) -> None:
        self._live = Live(get_renderable=self._screen, console=self.console, refresh_per_second=4)
        self._live.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    # -- what the driver calls ------------------------------------------------------------------------------------

    def add_trial(
        self, key: str, arm: str, seed: int, folder: Path, state: str = "waiting", told: bool = False
    ) -> None:
        """A trial of the grid, in the order of the table. ``state`` is "cached" for one that is finished already.

        ``told``: it needs no line of its own where there is no table.
        """
        self._add(
            _Row(key, f"{arm}, seed {seed}", Path(folder), stage=False, state=state, said=(state if told else "", ""))
        )

    def add_stage(self, key: str, name: str, folder: Path | None = None) -> bool:
        """Shared work before the trials ("latent haar", "data"), shown above them; folder None: it has no steps.

        False when it is in the table already.
        """
        if key in self._rows:
            return False
        self._add(_Row(key, name, None if folder is None else Path(folder), stage=True))
        return True

    def set_state(self, key: str, state: str, note: str = "") -> None:
        """What the driver knows better than status.json: "running", "done", "failed" or "cached".

        ``note``: the reason of a failure, or a few characters of result ("FID 12.3", the table has room for 8).
        Raises ValueError for another state, KeyError for a key that was not added.
        """
        if state not in STYLES:
            raise ValueError(f"state is {state!r}; allowed: {', '.join(STYLES)}")
        with self._lock:
            row = self._rows[key]
            self._change(row, state)
            row.note = note
            self._speak(row)
            if state == "failed" and not self.plain:  # the table has no room for the reason
                self.console.print(Text.assemble(("failed ", STYLES["failed"]), f"{row.label}: {note}"))

    def set_place(self, key: str, place: str) -> None:
        """The node that a trial is on, or why it waits."""
        with self._lock:
            self._rows[key].place = place

    def update(self) -> None:
        """Read every status.json again, and in plain mode print what is due."""
        with self._lock:
            for row in self._rows.values():
                if row.folder is not None and row.state not in ENDED:
                    self._read(row)
                self._speak(row)
            if self.plain and self.clock() - self._spoke >= QUIET_SECONDS:
                self._say(self._overview())

    def note(self, text: str) -> None:
        """A sentence for the person: above the table, or as a line. Safe from any thread."""
        with self._lock:
            self._say(Text(text)) if self.plain else self.console.print(Text(text))

    def ask(self, question: str, answers: dict[str, str], default: str) -> str:
        """Ask the person at the terminal, the table being put aside; without one, ``default``.

        Args:
            answers: what may be typed -> what it means.
        """
        if self.plain:
            return default
        if self._live is not None:
            self._live.stop()
        try:
            usual = next(key for key, word in answers.items() if word == default)
            typed = self.console.input(f"{question} [{usual}] ", markup=False).strip()
        except (EOFError, KeyboardInterrupt):
            typed = ""
        finally:
            if self._live is not None:
                self._draw()  # a new one: the old one would go back up over the question
        return answers.get(typed[:1].lower(), default)

    def summary(self, outcome: GridOutcome, verdict: Mapping[str, Any]) -> None:
        """Print the grid's table of results, failed trials with cause, message and log, the notes, and the verdict."""
        for part in summary_renderables(outcome, verdict, self.console.width):
            self.console.print(part, soft_wrap=isinstance(part, Text))

    # -- what is known --------------------------------------------------------------------------------------------

    def _add(self, row: _Row) -> None:
        # What an earlier invocation left says nothing about this one; comparing it needs no clocks that agree.
        row.old = None if row.folder is None else _load_status(row.folder)
        with self._lock:
            self._rows[row.key] = row
            if row.state == "cached":
                self._speak(row)

    def _change(self, row: _Row, state: str) -> None:
        now = self.clock()
        if state == "running" and row.started is None:
            row.started = row.heard = now
        if state in ENDED and row.ended is None:
            row.ended = now
        row.state = state

    def _read(self, row: _Row) -> None:
        status = _load_status(row.folder)
        if status is None or status in (row.status, row.old):
            return
        row.status, row.phase, row.heard = status, str(status.get("phase") or ""), self.clock()
        state = str(status.get("state") or row.state)
        # The driver decides how a trial ended (a worker can write "done" and die); a stage is on its own.
        if state == "running" or (row.stage and state in STYLES):
            self._change(row, state)

    def _fraction(self, row: _Row) -> float | None:
        steps = row.status.get("steps")
        return min(1.0, row.status.get("step", 0) / steps) if steps else None

    def _left(self, row: _Row, typical: float | None) -> float | None:
        """Seconds a running row still needs: its phase's own estimate, or what finished trials took if more."""
        own = row.status.get("eta_s")
        elapsed = self.clock() - row.started if row.started is not None else 0.0
        guesses = [float(own)] if own is not None else []
        if typical is not None and not row.stage:
            guesses.append(typical - elapsed)
        return max(0.0, *guesses) if len(guesses) > 1 else max(0.0, guesses[0]) if guesses else None

    def _total_left(self) -> float | None:
        """Seconds to the end of the grid; None while nothing can be said."""
        trials = [row for row in self._rows.values() if not row.stage]
        typical = self._typical()
        running = [self._left(row, typical) for row in self._rows.values() if row.active]
        waiting = sum(row.state == "waiting" for row in trials)
        if typical is None:  # nothing finished: what the furthest one needed so far and still needs
            known = [
                self.clock() - row.started + left
                for row in trials
                if row.active and (left := self._left(row, None)) is not None
            ]
            typical = max(known, default=None)
        if not any(row.state not in ENDED for row in self._rows.values()):
            return 0.0
        if (waiting and typical is None) or (running and all(left is None for left in running)):
            return None
        work = sum(left for left in running if left is not None) + waiting * (typical or 0.0)
        return max([work / self.workers, *(left for left in running if left is not None)])

    def _typical(self) -> float | None:
        took = [
            row.ended - row.started
            for row in self._rows.values()
            if not row.stage and row.state == "done" and row.started is not None
        ]
        return sum(took) / len(took) if took else None

    def _hours(self) -> str:
        """What the trials of this invocation have cost until now; nothing below a hundredth."""
        spans = [
            (self.clock() if row.ended is None else row.ended) - row.started
            for row in self._rows.values()
            if not row.stage and row.started is not None
        ]
        hours = sum(spans) / 3600 * self.cost[0] if self.cost else 0.0
        return f"{hours:.2f} {self.cost[1]}-hours" if hours >= 0.01 else ""

    # -- plain lines ----------------------------------------------------------------------------------------------

    def _say(self, text: Text) -> None:
        now = self.clock()
        self.console.print(Text(f"[{clock_text(now - self._began)}] ") + text, soft_wrap=True, highlight=False)
        self._spoke = now

    def _speak(self, row: _Row) -> None:
        """In plain mode, a line when the row's state or phase changed or its last line is old."""
        if not self.plain or row.state == "waiting":
            return
        changed = row.said != (row.state, row.phase)
        due = row.active and self.clock() - row.said_at >= self.every
        if changed and row.state in ENDED and row.said[0] == row.state:
            changed = False
        if changed or due:
            row.said, row.said_at = (row.state, row.phase), self.clock()
            self._say(Text(f"{row.label}: {self._sentence(row)}"))

    def _sentence(self, row: _Row) -> str:
        if row.state in ENDED:
            took = f" in {clock_text(row.ended - row.started)}" if None not in (row.started, row.ended) else ""
            word = "finished before, taken as it is" if row.state == "cached" else row.state + took
            return f"{word}: {row.note}" if row.note else word
        status, parts = row.status, [row.phase or "starting"]
        if status.get("steps"):
            parts[0] += f" {status.get('step', 0)}/{status['steps']} ({self._fraction(row):.0%})"
        parts += [f"loss {short(status['loss'])}"] if status.get("loss") is not None else []
        parts += [f"PSNR {float(status['psnr']):.1f} dB"] if status.get("psnr") is not None else []
        parts += [f"{status['images_per_s']:.0f} images/s"] if status.get("images_per_s") else []
        parts += [f"{clock_text(status['eta_s'])} left"] if status.get("eta_s") is not None else []
        parts += [silent] if (silent := self._silence(row)) else []
        return ", ".join(parts)

    def _silence(self, row: _Row) -> str:
        age = self.clock() - row.heard
        return f"no news for {clock_text(age)}" if row.active and age > STALE_SECONDS else ""

    def _overview(self) -> Text:
        trials = [row for row in self._rows.values() if not row.stage]
        done = sum(row.state in ("done", "cached") for row in trials)
        text = f"{done} of {len(trials)} trials done" if trials else "preparing"
        failed = sum(row.state == "failed" for row in trials)
        text += f", {failed} failed" if failed else ""
        text += f", {self._hours()}" if self._hours() else ""
        left = self._total_left()
        return Text(text + (f", about {clock_text(left)} left" if left else ""))

    # -- the live table -------------------------------------------------------------------------------------------

    def _screen(self) -> Group:
        with self._lock:
            head = Text.assemble((self.name, "bold"), "  ", self.question, no_wrap=True, overflow="ellipsis")
            return Group(head, self._progress_line(), self._table())

    def _progress_line(self) -> Table:
        trials = [row for row in self._rows.values() if not row.stage]
        ended = sum(row.state in ENDED for row in trials)
        part = sum(self._fraction(row) or 0.0 for row in trials if row.active)
        line = Table.grid(padding=(0, 2), expand=False)
        overview = self._overview().plain.split(", about ")[0]
        left = self._total_left()
        times = f"elapsed {clock_text(self.clock() - self._began)}" + (f", left ~{clock_text(left)}" if left else "")
        bar = ProgressBar(
            total=max(1, len(trials)),
            completed=ended + min(part, max(0, len(trials) - ended)),
            width=30 if self.console.width >= WIDE else 14,
        )
        line.add_row(bar, overview, times)
        return line

    def _table(self) -> Table:
        wide = self.console.width >= WIDE
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim", expand=False)
        label_width = max((len(row.label) for row in self._rows.values()), default=8)
        table.add_column("trial", width=min(label_width, 36 if wide else 20), no_wrap=True, overflow="ellipsis")
        table.add_column("state", width=12 if wide else 8, no_wrap=True, overflow="ellipsis")
        table.add_column("", width=20 if wide else 8)
        for title, width in (
            ("step", 13 if wide else 11),
            ("loss", 7 if wide else 6),
            ("img/s", 6 if wide else 5),
            ("left", 7 if wide else 6),
            ("time", 7 if wide else 6),
        ):
            table.add_column(title, width=width, justify="right", no_wrap=True)
        if nodes := self._nodes():
            table.add_column("node", width=min(14, max(map(len, nodes))), no_wrap=True, overflow="ellipsis")
        rows, hidden = self._fit(list(self._rows.values()))
        typical = self._typical()
        for row in rows:
            table.add_row(
                *self._cells(row, typical), *([Text(self._node(row))] if nodes else []), style=STYLES[row.state]
            )
        if hidden:
            table.add_row(Text(f"and {hidden} more", style="dim"))
        return table

    def _node(self, row: _Row) -> str:
        return row.place or str(row.status.get("host", "")) if row.active else ""

    def _nodes(self) -> list[str]:
        """The nodes to be shown: none when all runs on this machine, or there is no room."""
        found = [node for row in self._rows.values() if (node := self._node(row))]
        return found if self.console.width >= WIDE and any(node != socket.gethostname() for node in found) else []

    def _fit(self, rows: list[_Row]) -> tuple[list[_Row], int]:
        """The rows that the terminal's height holds: those that run and those that failed before the others."""
        room = max(4, self.console.height - 6)
        if len(rows) <= room:
            return rows, 0
        order = {"running": 0, "failed": 1, "waiting": 2, "done": 3, "cached": 4}
        chosen = {row.key for row in sorted(rows, key=lambda row: order[row.state])[: room - 1]}
        return [row for row in rows if row.key in chosen], len(rows) - len(chosen)

    def _cells(self, row: _Row, typical: float | None) -> list[Any]:
        status, blank = row.status, ""
        end = row.ended if row.ended is not None else self.clock()
        time_cell = clock_text(end - row.started) if row.started is not None else blank
        if not row.active:
            said = row.note or (row.place if row.state == "waiting" else "")
            note = Text(said, overflow="ellipsis", no_wrap=True) if said else blank
            return [Text(row.label), row.state, note, blank, blank, blank, blank, time_cell]
        steps, fraction = status.get("steps"), self._fraction(row)
        bar = ProgressBar(total=1.0, completed=fraction) if fraction is not None else blank
        quality = (
            short(status["loss"])
            if status.get("loss") is not None
            else (f"{float(status['psnr']):.1f}dB" if status.get("psnr") is not None else blank)
        )
        left, silence = self._left(row, typical), self._silence(row)
        return [
            Text(row.label),
            row.phase or "starting",
            bar if not silence else Text("no news", style="yellow"),
            f"{status.get('step', 0)}/{steps}" if steps else blank,
            quality,
            f"{status['images_per_s']:.0f}" if status.get("images_per_s") else blank,
            f"~{clock_text(left)}" if left is not None else blank,
            time_cell,
        ]


def _load_status(folder: Path) -> dict[str, Any] | None:
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there yet
        return None
    return status if isinstance(status, dict) else None
