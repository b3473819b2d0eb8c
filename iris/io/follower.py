"""A process beside a command, which tells MLflow of what the command leaves on disk.

It is another package's, found by its name: a command neither imports MLflow (seconds, 300 MB) nor waits for its server,
and what is on disk is sent whatever becomes of the command.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

from iris.errors import SettingError
from iris.io.files import read_json, write_json

COMMAND = (sys.executable, "-m", "ablations.track.follow")
MARK = "tracking.json"  # in the folder of a stage that MLflow is to have; "sent": it has all of it
ERROR = "error.json"


class Follower:
    """The process. As a context manager it ends with its block; Ctrl-C does not reach it: it then sends how that ended.

    Args:
        settings: those of ``ablations.track.follow``. They go through its standard input, as do the places: a command
            line is seen by others, and an address may hold a password.
        say: called with each sentence for the person, from a thread.

    Attributes:
        shows: the command, or the address, that shows the runs.

    Raises:
        SettingError: MLflow can never write there.
    """

    def __init__(self, settings: dict[str, Any], say: Callable[[str], None]) -> None:
        self._told, self._say = [json.dumps(settings)], say
        self._start()

    def follow(self, place: Path) -> None:
        """Tell of a stage's folder, a folder of results or a grid's journal from now on."""
        self._told.append(str(place.absolute()))
        self._write(self._told[-1])

    @contextlib.contextmanager
    def observe(self, folder: Path) -> Iterator[None]:
        """Inside, a stage trains in its folder; it is marked as one that MLflow is to have, and why it failed is left."""
        (folder / ERROR).unlink(missing_ok=True)
        self._mark(folder)
        try:
            yield
        except Exception as error:
            with contextlib.suppress(OSError):  # a full disk, which the error tells of
                write_json(folder / ERROR, {"cause": type(error).__name__, "message": str(error)})
            raise

    def catch_up(self, folders: Iterable[Path]) -> Iterator[str]:
        """Tell of those finished stages that MLflow was to have and does not; their names."""
        for folder in folders:
            if str(folder.absolute()) not in self._told and (read_json(folder / MARK) or {}).get("sent") is False:
                self._mark(folder)
                yield folder.name

    def _mark(self, folder: Path) -> None:
        write_json(folder / MARK, {"command_folder": str(Path.cwd()), "sent": False})
        self.follow(folder)

    def end(self) -> list[str]:
        """Wait until MLflow has all or is given up; returns a sentence for each thing that it does not have."""
        if self._ended() < 0:  # it was killed: another one sends the rest
            self._start()
            self._ended()
        return self._missing

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for text in self.end():
            self._say(text)

    def _start(self) -> None:
        pipe, self._missing = subprocess.PIPE, []
        self._process = subprocess.Popen(COMMAND, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
        for line in self._told:
            self._write(line)
        kind, _, self.shows = self._process.stdout.readline().rstrip().partition(" ")
        if kind == "refused":
            self._process.communicate()
            raise SettingError(self.shows)
        self._thread = threading.Thread(target=self._listen, name="follower", daemon=True)
        self._thread.start()

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError):  # it was killed, which ``end`` sees
            print(line, file=self._process.stdin, flush=True)

    def _listen(self) -> None:
        for line in self._process.stdout:
            kind, _, text = line.rstrip().partition(" ")
            (self._missing.append if kind == "missing" else self._say)(text)

    def _ended(self) -> int:
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._thread.join()
        code = self._process.wait()
        if code:
            self._missing.append(f"The process that tells MLflow ended with {code}. Nothing is lost; it is on disk.")
        return code


def following(
    wanted: str | None, say: Callable[[str], None], **settings: Any
) -> AbstractContextManager[Follower | None]:
    """A Follower, or nothing where what is wanted is "none"."""
    return contextlib.nullcontext() if wanted == "none" else Follower(settings, say)
