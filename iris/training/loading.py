"""Batches of a source for training: from this process or from workers, without end, and resumable at any batch."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from iris.data.source import Batch, Source, collate
from iris.errors import SettingError
from iris.training.safety import SIGNALS

POLL_SECONDS = 0.5


class Loader:
    """An endless iterator over batches of one rank; ``position`` belongs to the last batch taken, however many the
    workers have prepared.

    Worker w of W reads share rank * W + w of world * W, epoch after epoch, and gives every W-th batch, so that no batch
    waits for another rank and the order does not depend on timing.

    Args:
        source: opened by ``iris.data.open_source``.
        batch: examples of this rank a step.
        seed: address of the order and of random crops.
        rank, world: this process among those that train together.
        workers: processes that read and decode; 0 does both here.
        position: ``Loader.position`` of an earlier loader with the same arguments.

    Raises:
        SettingError: batch < 1, workers < 0, or a position of other arguments; in the iteration, more damaged rows than
            data.max_bad allows or a share without a usable row.
    """

    def __init__(
        self,
        source: Source,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        position: dict[str, Any] | None = None,
    ) -> None:
        if batch < 1 or workers < 0:
            raise SettingError(f"batch={batch} must be >= 1 and workers={workers} >= 0")
        self._shares = max(workers, 1)
        self._address = {"batch": batch, "seed": seed, "rank": rank, "world": world, "shares": self._shares}
        if position is not None and (was := {name: position.get(name) for name in self._address}) != self._address:
            raise SettingError(f"data: the position to go on from was made with {was}, now there is {self._address}")
        self._taken = position["taken"] if position else 0
        self._positions = list(position["positions"]) if position else [None] * self._shares
        batches = _Batches(source, batch, seed, rank * self._shares, world * self._shares, self._positions, self._taken)
        # A generator of its own: from torch's global one it would draw once more in a resumed run.
        self._batches = iter(
            DataLoader(
                batches,
                batch_size=None,
                num_workers=workers,
                collate_fn=_unchanged,
                generator=torch.Generator(),
                worker_init_fn=_follow,
            )
        )

    @property
    def position(self) -> dict[str, Any]:
        """Where the next batch is, for JSON: a few numbers for each worker."""
        return self._address | {"taken": self._taken, "positions": list(self._positions)}

    @property
    def bad(self) -> int:
        """Damaged rows that the workers have passed over in their present epochs."""
        return sum(position["bad"] for position in self._positions if position)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch, position = next(self._batches)
        if isinstance(batch, str):
            raise SettingError(batch)
        self._positions[self._taken % self._shares] = position
        self._taken += 1
        return batch


class _Batches(IterableDataset):
    """(batch, position after it) of the share of the worker that iterates; (message, None) for a SettingError, whose
    kind would not survive the way between processes."""

    def __init__(
        self,
        source: Source,
        batch: int,
        seed: int,
        first: int,
        world: int,
        positions: list[dict[str, Any] | None],
        taken: int,
    ) -> None:
        self._source, self._batch, self._seed, self._first, self._world = source, batch, seed, first, world
        self._positions, self._taken = list(positions), taken

    def __iter__(self) -> Iterator[tuple[Batch | str, dict[str, Any] | None]]:
        worker = get_worker_info()
        # torch asks worker 0 first; after a resume the next batch is that of the share whose turn it is.
        share = ((worker.id if worker else 0) + self._taken) % len(self._positions)
        batches = self._endless(self._first + share, self._positions[share])
        message = None
        while message is None:
            try:
                item = next(batches)
            except SettingError as error:
                message = str(error)
                item = message, None
            yield item

    def _endless(self, rank: int, position: dict[str, Any] | None) -> Iterator[tuple[Batch, dict[str, Any]]]:
        epoch, examples = position["epoch"] if position else 0, []
        while True:
            stream = self._source.stream(self._seed, epoch, rank, self._world, position)
            given = position is not None  # of this epoch, before this loader
            for example in stream:
                given = True
                examples.append(example)
                if len(examples) == self._batch:
                    yield collate(examples), stream.position
                    examples = []
            if not given:
                raise SettingError(f"data: share {rank} of {self._world} has no usable row in epoch {epoch}")
            epoch, position = epoch + 1, None


def _follow(worker: int) -> None:
    """Let a worker end when the process that trains ends it, or is gone, and not otherwise.

    A job's manager signals all of its processes; the one that trains takes more batches before it obeys. And where that
    one was killed, torch's worker waits for ever to hand over its last batch, with the locks that it was forked with.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


def _unchanged(item: Any) -> Any:
    return item
