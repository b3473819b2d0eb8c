"""Kill -9 any process of a grid at any moment, run the command again: it finishes with the same results, each trial trained once.

IRIS_KILLS sets how often; the moments are drawn from a seed.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import small_grid
from small_grid import PATIENCE, Driver, results

from iris.io.files import read_json
from iris.io.tensors import load_tensors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("importable"),
    pytest.mark.xdist_group("kill_grid"),  # the reference is shared
]
KILLS = int(os.environ.get("IRIS_KILLS", "4"))
PROCESSES = ("driver", "controller", "worker", "job")


@dataclass
class Grid:
    """A folder in which the small grid runs."""

    root: Path

    @property
    def numbers(self) -> small_grid.Numbers:
        """The shared stage."""
        return small_grid.numbers(self.root)

    def trials(self) -> list[Path]:
        return [self.root / "trials" / str(seed) for seed in range(small_grid.TRIALS)]

    def steps(self, folder: Path) -> list[tuple[int, int]]:
        """(step, process) in the order in which they were computed."""
        path = folder / "steps"
        return [tuple(map(int, line.split())) for line in path.read_text().splitlines()] if path.exists() else []

    def computed(self) -> int:
        """Steps of all trials."""
        return sum(len(self.steps(folder)) for folder in self.trials())

    # -- whom and when to kill ----------------------------------------------------------------------------------------

    def find(self, kind: str, driver: Driver, draw: random.Random) -> int | None:
        """A living process of this kind."""
        if kind == "driver":
            return driver.pid
        slots = [slot for path in (self.root / "pool").glob("slot-*.json") if (slot := read_json(path))]
        draw.shuffle(slots)
        for slot in slots:
            pid = slot["child"] if kind == "job" else slot["pid"]
            if pid is not None and kind == "controller":
                pid = _parent(pid)
            if pid is not None and str(self.root) in _words(pid):  # numbers are used again
                return pid
        return None

    def writing_checkpoint(self) -> bool:
        """A trial's checkpoint is being written."""
        return any((self.root / "trials").glob("*/.checkpoint*"))

    def writing_cache(self) -> bool:
        """The shared stage is being written, or was and is not finished."""
        return self.numbers.path.exists() and not self.numbers.done


def _words(pid: int) -> str:
    """The command line of a process that lives, or nothing."""
    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else " ".join([*process.cmdline(), process.cwd()])
    except psutil.Error:
        return ""


def _parent(pid: int) -> int | None:
    """The process that started another one."""
    try:
        return psutil.Process(pid).ppid()
    except psutil.Error:
        return None


def strike(grid: Grid, driver: Driver, kind: str, moment: Callable[[], bool], draw: random.Random) -> bool:
    """Kill a process of this kind at this moment; False when the grid ended before it came."""
    deadline = time.monotonic() + PATIENCE
    while driver.poll() is None:
        assert time.monotonic() < deadline, "the grid does not go on"
        if moment() and (pid := grid.find(kind, driver, draw)) is not None:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            return True
        time.sleep(0.001)
    return False


def moments(grid: Grid, seconds: float, draw: random.Random) -> tuple[str, Callable[[], bool]]:
    """A random moment of a run that takes ``seconds``: any at all, some steps from now, or one at which a file is written."""
    kind = draw.choice(["any", "steps", "checkpoint", "cache"])
    if kind == "checkpoint":
        return kind, grid.writing_checkpoint
    if kind == "cache" and not grid.numbers.done:
        return kind, grid.writing_cache
    if kind == "any":
        at = time.monotonic() + draw.uniform(0, seconds)
        return kind, lambda: time.monotonic() >= at
    until = grid.computed() + draw.randrange(small_grid.STEPS)
    return "steps", lambda: grid.computed() >= until


# -- what must hold ---------------------------------------------------------------------------------------------------


def check_files(grid: Grid) -> None:
    """Whatever has its final name is whole."""
    for path in [*grid.root.glob("*/*/*.json"), *grid.root.glob("pool/*.json")]:
        if not path.name.startswith("."):
            try:
                json.loads(path.read_text())
            except FileNotFoundError:  # a worker removed it just now
                continue
    for path in grid.root.glob("trials/*/checkpoint*.safetensors"):
        for tries_left in (2, 1, 0):
            try:
                load_tensors(path)  # verifies its checksum
                break
            except (OSError, ValueError, RuntimeError) as error:  # a newer one may have taken its place just now
                assert tries_left or not path.exists(), error
    if grid.numbers.done:
        assert np.load(grid.numbers.path, mmap_mode="r").shape == (small_grid.ROWS, small_grid.WIDTH)


def check_trained_once(grid: Grid, kills: int) -> None:
    """Each process went on where the last one stopped; what was computed again is the step that a kill interrupted."""
    again = 0
    for folder in grid.trials():
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, small_grid.STEPS + 1))
        steps = grid.steps(folder)
        assert steps[0][0] == 0 and steps[-1][0] == small_grid.STEPS - 1
        for (before, one), (after, other) in itertools.pairwise(steps):
            assert after == before + 1 or (after == before and one != other), steps
        again += len(steps) - small_grid.STEPS
    assert again <= kills


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Grid, float]:
    """The grid never disturbed, and its seconds."""
    grid = Grid(tmp_path_factory.mktemp("whole") / "grid")
    started = time.monotonic()
    assert Driver(grid.root).wait() == 0, grid.root.with_suffix(".log").read_text()
    return grid, time.monotonic() - started


def test_a_grid_that_is_not_killed_trains_each_step_once(whole):
    grid, _ = whole
    check_files(grid)
    check_trained_once(grid, kills=0)
    assert len((grid.numbers.folder / "made").read_text().splitlines()) == 1
    assert len({tuple(result.items()) for result in results(grid.root)}) == small_grid.TRIALS


def test_any_process_killed_at_any_moment(whole, tmp_path):
    reference, seconds = whole
    draw, done, killed = random.Random(0), 0, Counter()
    for number in range(10 * KILLS):
        grid, kills = Grid(tmp_path / f"grid{number}"), 0
        while True:
            driver = Driver(grid.root)
            wanted, kind = done < KILLS, draw.choice(PROCESSES)
            if wanted:
                when, moment = moments(grid, seconds, draw)
                if strike(grid, driver, kind, moment, draw):
                    kills, done = kills + 1, done + 1
                    killed[kind, when] += 1
            code = driver.wait()
            check_files(grid)
            assert wanted or code == 0, grid.root.with_suffix(".log").read_text()
            if code == 0:
                break
        assert results(grid.root) == results(reference.root)
        check_trained_once(grid, kills)
        if done == KILLS:
            print(f"{done} kills of {number + 1} grids in {seconds:.0f} s each:", *sorted(killed.items()), sep="\n")
            return
    pytest.fail(f"only {done} of {KILLS} kills could be placed")
