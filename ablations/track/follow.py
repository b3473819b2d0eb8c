"""The process that a command starts beside itself (iris/io/follower.py): it tells MLflow of what the command leaves on
disk, whatever becomes of the command, and whatever the server does.

Its standard input has its settings as JSON (uri, root and setting of ``Location.of``, and models_mb), and then a line for
each place: a grid's journal, a stage's folder, a folder of results. The input ends when the command does; all is sent
once more then, as long as the store answers. Its standard output has a line for each thing that the command is to know:
"ready" and what shows the runs, "refused" and why, "said" and a sentence, "missing" and one about what is not sent.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import Timeout

from ablations.track.location import Location, unreachable
from iris.errors import SettingError
from iris.io.follower import MARK

if TYPE_CHECKING:
    from ablations.track.store import Store
    from ablations.track.work import Work

LOOK_SECONDS = 3.0  # between two looks at what is there
RETRY_SECONDS = 30.0  # after a failed call the store is left alone this long
END_SECONDS = 120.0  # that the end waits for a store that answers slowly; one that answers nothing fails by itself
SAY_SECONDS = 20.0  # between two words to a person who waits for the end


class Following:
    """What the process does.

    Args:
        models_mb: size up to which trained models are logged; 0: none.
        say: called with a word of ``Follower`` and a text.
    """

    def __init__(self, store: Store, models_mb: float, say: Callable[[str, str], None]) -> None:
        self.store, self.models_mb, self.say = store, models_mb, say
        self.works: list[Work] = []
        self.over = threading.Event()  # the command ended
        self._news = threading.Event()
        self._said: set[type[Exception]] = set()
        self._quiet_until = 0.0
        self._gone = False  # the store, when all was to be sent once more

    def listen(self, lines: Iterable[str]) -> None:
        """Take places in until the command ends."""
        try:
            for line in lines:
                self.works.append(work_of(Path(line.rstrip("\n")), self.models_mb))
                self._news.set()
        finally:
            self.over.set()
            self._news.set()

    def work(self) -> None:
        """Bring the store up again and again, and once more after the end; then also to what others told of until now."""
        while not self.over.is_set():
            self._news.wait(LOOK_SECONDS)
            self._news.clear()
            for work in list(self.works) if time.monotonic() >= self._quiet_until else ():
                self._bring(work, alive=True)
        left = list(self.works)
        while left := [work for work in left if not self._gone and not self._bring(work, alive=False)]:
            time.sleep(0.1)

    def wait(self, worker: threading.Thread) -> list[str]:
        """Wait for the end, and for ``work``, but not for ever; returns what the store does not have."""
        self.over.wait()
        said = began = time.monotonic()
        while worker.is_alive() and time.monotonic() < began + END_SECONDS:
            worker.join(0.1)
            if time.monotonic() > said + SAY_SECONDS:
                said = time.monotonic()
                self.say("said", f"MLflow has {', '.join(work.has for work in self.works)} so far")
        where = f"MLflow at {self.store.location.shown}"
        return [f"{where} has {work.has}. Nothing is lost: {work.rest}" for work in self.works if not work.told]

    def _bring(self, work: Work, alive: bool) -> bool:
        """Bring the store up to a work; False: another process tells of it now."""
        try:
            if not work.lock.is_locked:
                work.lock.acquire(timeout=0)
            if self._said and not alive:
                work.forget()  # a call that was given up may have been carried out since, and have made a run twice
            work.sync(self.store, alive)
            failed = work.problems
        except Timeout:
            return False
        except Exception as error:  # MLflow, its server and its database raise everything
            failed = {work.name: error}
        for what, error in failed.items():
            self._quiet_until = time.monotonic() + RETRY_SECONDS
            self._gone = not alive and unreachable(error)
            self._trouble(what, error)
        return True

    def _trouble(self, what: str, error: Exception) -> None:
        """Tell the person, once of each kind."""
        if type(error) not in self._said:
            self._said.add(type(error))
            where, why = f"MLflow at {self.store.location.shown}", self.store.location.explained(error)
            self.say("said", f"{where} did not take {what}: {why}. The work goes on, and MLflow is tried again.")


def work_of(place: Path, models_mb: float) -> Work:
    """What lies at a place."""
    from ablations.track.grid import Grid
    from ablations.track.work import Evaluation, Stage

    if place.suffix == ".jsonl":
        return Grid(place, models_mb)
    return Stage(place) if (place / MARK).exists() else Evaluation(place)


def main() -> None:
    """The process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    def say(word: str, text: str) -> None:
        with contextlib.suppress(OSError):  # the command was killed
            print(word, " ".join(text.split()), file=answers, flush=True)

    settings = {"uri": None, "root": ".", "setting": "track.uri", "models_mb": 0.0}
    settings |= json.loads(sys.stdin.readline() or "{}")
    try:
        location = Location.of(settings["uri"], Path(settings["root"]), settings["setting"]).check()
    except SettingError as error:
        say("refused", str(error))
        os._exit(2)
    say("ready", location.command)
    os.nice(10)  # what the command does comes first
    from ablations.track.store import Store  # which imports numpy: the command did not wait for it

    following = Following(Store(location, lambda text: say("said", text)), settings["models_mb"], say)
    worker = threading.Thread(target=following.work, daemon=True)
    for thread in (threading.Thread(target=following.listen, args=(sys.stdin,), daemon=True), worker):
        thread.start()
    for text in following.wait(worker):
        say("missing", text)
    os._exit(0)  # whatever a call still waits for


if __name__ == "__main__":
    main()
