"""The flow on examples as they come: read, encoded and tokenised in each step, and taken up again after a stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iris.data.source import Batch, Source
from iris.errors import SettingError
from iris.io.files import naming, write_atomically
from iris.io.pixels import to_images
from iris.latents import Latent
from iris.model import device_of
from iris.training.loading import Loader
from iris.training.loop import WHOLE, Share
from iris.training.safety import BatchFacts, ShareError
from iris.training.tasks import FlowTask

KEPT = 1000  # steps whose positions are all in the file; of those before, every so-many-th
AT_ONCE = 64  # pictures encoded at once


class Positions:
    """Where the data go on after each step, in a file of one process: a line a step.

    The first process alone knows when a checkpoint is written. So each process writes its line when it has taken a
    step's rows, before gradients are exchanged: no process completes a step of which another one has no line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[int, dict[str, Any]] = {}

    def up_to(self, step: int) -> tuple[int, dict[str, Any] | None]:
        """The last step not after ``step`` whose position is known, and that position; what came later is dropped.

        Raises:
            SettingError: there is none.
        """
        self._known = {at: position for at, position in self._read() if at <= step} if step else {}
        if step and not self._known:
            folder = self._path.parent
            raise ShareError(
                f"data.live=true: {self._path} does not say where the data go on after step {step}, that of "
                f"the checkpoint beside it; delete {folder} to train anew"
            )
        self._write()
        last = max(self._known, default=0)
        return last, self._known.get(last)

    def add(self, step: int, position: dict[str, Any]) -> None:
        """Keep what holds after ``step``."""
        self._known[step] = position
        if step % KEPT == 0:
            self._known = {at: place for at, place in self._known.items() if at % KEPT == 0 or at > step - KEPT}
            self._write()
        else:
            with naming(self._path), open(self._path, "a") as file:
                file.write(_line(step, position))

    def _read(self) -> list[tuple[int, dict[str, Any]]]:
        rows = []
        for line in self._path.read_text().splitlines() if self._path.exists() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # half-written when the process was killed
                continue
            rows.append((row["step"], row["position"]))
        return rows

    def _write(self) -> None:
        write_atomically(self._path, "".join(_line(*known) for known in self._known.items()).encode())


def _line(step: int, position: dict[str, Any]) -> str:
    return json.dumps({"step": step, "position": position}) + "\n"


class LiveBatches:
    """The rows of each step that fall to one process, in the order of ``Loader``.

    Args:
        source: opened.
        batch: rows of a step, over all processes.
        seed: address of the order and of random crops.
        rank, world: this process among those that share each batch.
        workers: as of ``Loader``.
        folder: for the positions.
    """

    def __init__(
        self, source: Source, batch: int, seed: int, rank: int, world: int, workers: int, folder: Path
    ) -> None:
        self.rank, self.world = rank, world
        self._open = lambda position: Loader(source, batch // world, seed, rank, world, workers, position)
        self._positions = Positions(folder / f"positions-{rank}.jsonl")
        self._loader: Loader | None = None
        self._batch: Batch | None = None
        self._next = 0

    def go_on_at(self, step: int) -> None:
        """Make ``step`` the next one.

        Raises:
            SettingError: it is not known where the data go on.
        """
        known, position = self._positions.up_to(step)
        self._loader, self._next = self._open(position), known
        while self._next < step:  # a power cut may have taken the last lines
            self.of(self._next)

    def of(self, step: int) -> Batch:
        """The rows of ``step``: of the next one, or of the last again.

        Raises:
            ShareError: what ``Loader`` raises.
        """
        if step == self._next:
            try:
                self._batch = next(self._loader)
            except SettingError as error:
                raise ShareError(str(error)) from error
            self._next += 1
            self._positions.add(self._next, self._loader.position)
        return self._batch

    def close(self) -> None:
        """End the workers."""
        self._loader = None


@dataclass(kw_only=True)
class LiveFlowTask(FlowTask):
    """Train on examples as they come; ``latents`` and ``captions`` are those that ``validation_loss`` takes.

    Row j of process r is row r + j * (number of processes) of the global batch, for which everything else is drawn.

    Args:
        live: of this process.
        latent: frozen, in evaluation mode, where ``module`` is trained.
        texts: what each row is of, for ``module.text``.
    """

    live: LiveBatches
    latent: Latent
    texts: Callable[[Batch], list[str]]

    def go_on_at(self, step: int) -> None:
        """Called by the loop before the first step, and after a stop."""
        self.live.go_on_at(step)

    def loss(self, step: int, share: Share = WHOLE) -> tuple[Tensor, dict[str, Tensor]]:
        rank, index = divmod(share.index, share.of // self.live.world)
        # The loop's share, but for the rows that it takes: all shares of a process are rows of that process.
        return super().loss(step, Share(rank + self.live.world * index, share.of))

    def examples(self, step: int, share: Share) -> tuple[Tensor, Tensor]:
        batch, own = self.live.of(step), slice(share.index // self.live.world, None, share.of // self.live.world)
        try:
            captions = self.module.text.tokenise(self.texts(batch)[own])
        except SettingError as error:  # a caption that is no class
            raise ShareError(str(error)) from error
        return self._encoded(torch.from_numpy(batch.images[own])), captions

    def describe(self, step: int) -> BatchFacts:
        """What a message about step ``step`` names; of its rows, those of this process."""
        rows = range(self.live.rank, self.batch, self.live.world)
        return super().describe(step)._replace(rows=rows, keys=self.live.of(step).keys)

    @torch.no_grad()
    def _encoded(self, pixels: Tensor) -> Tensor:
        place = device_of(self.module)
        with torch.autocast(place.type, enabled=False):  # in float32, as what is encoded beforehand
            return torch.cat([self.latent.encode(to_images(some.to(place))) for some in pixels.split(AT_ONCE)])
