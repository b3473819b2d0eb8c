"""What every data source offers: a resumable stream of decoded examples.

A kind of source (``table``, ``shards``, ``hub``) says how many shards it has and reads one of them from an offset on.
The order of the shards, their division among ranks, the shuffling within a buffer and what happens to damaged rows are
decided here, once. Everything is addressed by (seed, epoch), so that an epoch can be left at any example and taken up
there again.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from iris.data.decode import NAMED, decode_image
from iris.data.raster import key_of, mix, random_bits, unit
from iris.data.settings import SourceSettings
from iris.errors import SettingError

EMPTY = "empty caption"
GRACE = 100  # rows before data.max_bad is judged as a share of those read; until then, as a share of so many
LOST = -1  # the offset after a shard of which nothing more can be read

Cursor = tuple[int, int, int]  # in the share of one rank: shard, offset in it, rows passed


class Raw(NamedTuple):
    """A row as it was read; ``problem`` says why it, or the rest of its shard, cannot be used."""

    key: str
    image: dict[str, Any] | None = None  # {"bytes", "path"}
    caption: str | None = None
    label: int | None = None
    score: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Example:
    """A usable row: image uint8 [size, size, 3]; ``key`` names where it came from."""

    key: str
    image: np.ndarray
    caption: str
    label: int | None
    score: float | None


@dataclass(frozen=True)
class Batch:
    """Examples side by side: images uint8 [N, size, size, 3]; labels int64 [N] and scores float32 [N], or None."""

    keys: list[str]
    images: np.ndarray
    captions: list[str]
    labels: np.ndarray | None
    scores: np.ndarray | None


def collate(examples: Sequence[Example]) -> Batch:
    """Examples -> a batch; labels and scores only if every example has one."""
    labels, scores = [example.label for example in examples], [example.score for example in examples]
    return Batch(
        keys=[example.key for example in examples],
        images=np.stack([example.image for example in examples]),
        captions=[example.caption for example in examples],
        labels=None if None in labels else np.asarray(labels, np.int64),
        scores=None if None in scores else np.asarray(scores, np.float32),
    )


class Source(ABC):
    """Captioned images of one split.

    Attributes:
        settings: what it was opened with.
        shards: parts that it is read in; an epoch takes them in another order.
        buffer: rows that are shuffled among each other.
    """

    settings: SourceSettings
    shards: int
    buffer: int

    @property
    def limit(self) -> int | None:
        """Rows that are stored of it at most: data.train of a stream, whose end may be far away."""
        return self.settings.train

    @abstractmethod
    def read(self, shard: int, offset: int = 0) -> Iterator[tuple[Raw, int]]:
        """Rows of a shard from ``offset`` on, each with the offset after it; 0 is the start, ``LOST`` the end."""

    @abstractmethod
    def content(self) -> bytes:
        """What the fingerprint knows of the rows themselves."""

    def fingerprint(self) -> str:
        """16 hex digits of what determines the examples: settings and a sample of the contents, never place or time."""
        no_matter = ("path", "max_bad", "buffer")
        facts = {name: value for name, value in asdict(self.settings).items() if name not in no_matter}
        return hashlib.sha256(repr(sorted(facts.items())).encode() + self.content()).hexdigest()[:16]

    def stream(
        self,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world: int = 1,
        position: dict[str, Any] | None = None,
        *,
        shuffle: bool = True,
    ) -> Stream:
        """The examples of one epoch that fall to ``rank`` of ``world``, decoded one by one.

        Every row falls to exactly one rank: whole shards where there are enough of them, else every ``world``-th row.

        Args:
            seed, epoch: address of the order and of random crops.
            position: ``Stream.position`` of an earlier stream with the same arguments: goes on behind its last example.
            shuffle: False keeps the order of the files.

        Raises:
            SettingError: rank out of range; a position of another stream; later, in the iteration, more damaged rows
                than data.max_bad allows.
        """
        return Stream(self, seed, epoch, rank, world, position, shuffle)

    def decode(self, raw: Raw, seed: int, epoch: int) -> Example | str:
        """The row with its picture cropped and resized, or what is wrong with it."""
        caption = (raw.caption or "").strip()
        problem = raw.problem or (None if caption else EMPTY)
        if problem is None:
            image = decode_image(raw.image, self.settings.size, self._where(raw.key, seed, epoch))
            if not isinstance(image, str):
                return Example(raw.key, image, caption, raw.label, raw.score)
            problem = image
        return problem

    def wanted(self, raw: Raw) -> bool:
        """Whether a row's score reaches data.min_score; one without a score does not."""
        return self.settings.min_score is None or (raw.score is not None and raw.score >= self.settings.min_score)

    def _where(self, key: str, seed: int, epoch: int) -> tuple[float, float]:
        """The place of the crop."""
        if self.settings.crop == "centre":
            return 0.5, 0.5
        x, y = unit(random_bits(key_of("crop", seed, epoch, key), np.arange(1), 2))[0]
        return float(x), float(y)


class Stream(Iterator[Example]):
    """One rank's examples of one epoch; ``position`` and ``bad`` may be read between any two of them.

    Rows are read in blocks of the source's ``buffer`` and each block is permuted, so that a position is two numbers and
    the cursor at which the block began: a resumed stream reads that block again and no more. Use ``Source.stream``.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        epoch: int,
        rank: int,
        world: int,
        position: dict[str, Any] | None,
        shuffle: bool,
    ) -> None:
        if not 0 <= rank < world:
            raise SettingError(f"rank={rank} must be in 0..{world - 1}, one of the {world} ranks")
        self._source, self._seed, self._epoch, self._shuffle = source, seed, epoch, shuffle
        self._address = {
            "seed": seed,
            "epoch": epoch,
            "rank": rank,
            "world": world,
            "buffer": source.buffer,
            "shuffle": shuffle,
        }
        self.bad, self._named = 0, []
        self._begin: Cursor = (0, 0, 0)  # where the block began, and how many rows came before it
        self._before, self._taken = 0, 0
        if position is not None:
            self._check(position)
            self._begin, self._before = tuple(position["begin"]), position["before"]
            self.bad = position["bad"]
        self._end = self._begin
        self._raws = _rows(source, seed, epoch, rank, world, self._begin, shuffle)
        self._block, self._order = [], np.empty(0, np.int64)
        if position is not None:
            self._fill()
            self._taken = position["taken"]

    @property
    def position(self) -> dict[str, Any]:
        """Where the next example is, for JSON."""
        block = {"begin": list(self._begin), "before": self._before, "taken": self._taken}
        return self._address | block | {"bad": self.bad}

    def __next__(self) -> Example:
        while True:
            if self._taken == len(self._block) and not self._fill():
                raise StopIteration
            raw = self._block[self._order[self._taken]]
            self._taken += 1
            if raw.problem is None and not self._source.wanted(raw):
                continue
            example = self._source.decode(raw, self._seed, self._epoch)
            if isinstance(example, Example):
                return example
            self._count(f"{raw.key} ({example})")

    def _fill(self) -> bool:
        """Read the next block; False, and nothing changed, at the end of the epoch."""
        block = list(islice(self._raws, self._source.buffer))
        if not block:
            return False
        self._before += len(self._block)
        self._begin, self._end = self._end, block[-1][1]
        self._block, self._taken = [raw for raw, _ in block], 0
        address = (*(self._address[name] for name in ("seed", "epoch", "rank", "world")), self._before)
        self._order = permutation(len(block), "buffer", *address) if self._shuffle else np.arange(len(block))
        return True

    def _count(self, name: str) -> None:
        self.bad += 1
        self._named.append(name)
        read, share = self._before + self._taken, self._source.settings.max_bad
        if self.bad > share * max(read, GRACE):
            named = ", ".join(self._named[:NAMED]) + (", …" if self.bad > NAMED else "")
            hint = "; data.text_column says what holds the captions" if EMPTY in named else ""
            raise SettingError(
                f"data.max_bad allows {share:.2%} unusable rows, but {self.bad} of {read} are: {named}{hint}"
            )

    def _check(self, position: dict[str, Any]) -> None:
        for name, value in self._address.items():
            if position.get(name) != value:
                raise SettingError(
                    f"data: the position to go on from has {name}={position.get(name)}, this stream has {value}"
                )


def permutation(count: int, *address: object) -> np.ndarray:
    """A permutation of 0 … count - 1 that depends on the address alone, not on the version of any library."""
    return np.argsort(mix(np.arange(count, dtype=np.uint64) + key_of(*address)), kind="stable")


def _rows(
    source: Source, seed: int, epoch: int, rank: int, world: int, cursor: Cursor, shuffle: bool
) -> Iterator[tuple[Raw, Cursor]]:
    """A rank's rows from ``cursor`` on, each with the cursor after it."""
    order = permutation(source.shards, "shards", seed, epoch) if shuffle else np.arange(source.shards)
    whole = source.shards >= world
    share = order[rank::world] if whole else order
    first, offset, passed = cursor
    for i in range(first, len(share)):
        for raw, after in source.read(int(share[i]), offset):
            passed += 1
            if whole or (passed - 1) % world == rank:
                yield raw, (i, after, passed)
        offset = 0
