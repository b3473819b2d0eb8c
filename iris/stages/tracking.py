"""Who is told of a training: log=NAME. A tracker lies above this package, which finds it by name when it is asked for."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

from iris.io.files import read_json
from iris.settings import flatten
from iris.stages.engine import SETTINGS, Stage, unobserved

TRACKERS = {"mlflow": "ablations.track.stage_tracking"}


class Tracking:
    """Tells a tracker of the stages of a command.

    Args:
        log: a name of ``TRACKERS``, or none.
        say: called with sentences for a person.

    Raises:
        SettingError: the tracker's store is named in a way that it cannot use.
    """

    def __init__(self, log: str, say: Callable[[str], None]) -> None:
        self._say, self._tracker = say, None
        if log != "none":
            self._tracker = importlib.import_module(TRACKERS[log])
            self._location = self._tracker.Location.of(None, Path.cwd()).check()

    def observe(self, folder: Path) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """What ``Context.observe`` is."""
        return unobserved(folder) if self._tracker is None else self._told(folder)

    @contextlib.contextmanager
    def _told(self, folder: Path) -> Iterator[Callable[[], None]]:
        settings = flatten(read_json(folder / SETTINGS) or {})
        settings |= {"key": folder.name, "command_folder": str(Path.cwd())}
        with self._tracker.Tracker(folder, settings, self._say) as tracker:
            yield tracker.news

    def missed(self, stage: Stage) -> list[Stage]:
        """Which finished stages of a chain the tracker was to be told of, and was not."""
        chain = [] if self._tracker is None else stage.chain()
        return [one for one in chain if one.done and self._tracker.unsent(one.folder)]

    def tell(self, stages: list[Stage]) -> None:
        """Tell it what it missed of finished stages."""
        for stage in stages:
            with self._tracker.Tracker.again(stage.folder, self._say, self._location):
                self._say(f"{stage.label}: MLflow gets what it missed")
