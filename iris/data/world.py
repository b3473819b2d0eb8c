"""A drawn world: which attribute tuples exist, how they are split, and how picture i of a split is drawn.

Three splits share no attribute tuple:

* ``heldout``: tuples with one of eight colour-shape pairs (each colour once) that appear nowhere else, so that a
  model's accuracy there measures composition;
* ``validation``: an eighth of the other tuples, chosen by a fixed hash; their colour-shape pairs are seen in training;
* ``train``: the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from iris.data.raster import COLOURS, SHAPES, key_of, mix, random_bits, unit
from iris.errors import SettingError

SPLITS = ("train", "validation", "heldout")
VALIDATION_ONE_IN = 8

# Colour -> the shape it is never seen with in training: each colour once, each shape at least once.
HELDOUT_PAIRS = {colour: SHAPES[(2 * i + 1) % len(SHAPES)] for i, colour in enumerate(COLOURS)}

Attributes = dict[str, np.ndarray]


@dataclass(frozen=True)
class Pictures:
    """Captioned pictures: images uint8 [n, H, W, 3], captions [n], attributes {name: int64 [n]}."""

    images: np.ndarray
    captions: list[str]
    attributes: Attributes


@dataclass(frozen=True)
class World:
    """One world's rules; the module that makes it (``shapes``, ``shapes2``) says what its pictures hold."""

    name: str
    version: int  # raise it whenever a pixel, a split or a caption changes
    size: int  # side of a picture in pixels
    attributes: dict[str, tuple[str, ...]]
    pairs: tuple[tuple[str, str], ...]  # (colour attribute, shape attribute) of each object
    jitters: int  # random numbers that one picture's drawing uses
    phrasings: int
    allowed: Callable[[Attributes], np.ndarray]  # attributes -> bool [n]
    paint: Callable[[Attributes, np.ndarray, int], np.ndarray]  # attributes, jitter [n, jitters], size -> images
    phrase: Callable[[dict[str, str], int], str]  # names of one picture's attributes, phrasing -> caption

    @cached_property
    def tuples(self) -> dict[str, np.ndarray]:
        """Split -> int64 [T, attributes], each of its attribute tuples in fixed order; "all" has the whole world's."""
        counts = [len(values) for values in self.attributes.values()]
        rows = np.indices(counts).reshape(len(counts), -1).T
        rows = rows[self.allowed(self.columns(rows))]
        held = self.is_heldout(self.columns(rows))
        flat = np.ravel_multi_index(rows.T, counts).astype(np.uint64)
        drawn = mix(flat * np.uint64(0x9E3779B97F4A7C15) + key_of(self.name, "validation"))
        validation = ~held & (drawn % np.uint64(VALIDATION_ONE_IN) == 0)
        return {"train": rows[~held & ~validation], "validation": rows[validation], "heldout": rows[held], "all": rows}

    def columns(self, rows: np.ndarray) -> Attributes:
        """int [n, attributes] -> {name: int [n]}."""
        return {name: rows[:, i] for i, name in enumerate(self.attributes)}

    def is_heldout(self, attributes: Attributes) -> np.ndarray:
        """bool [n]: at least one object has a colour-shape pair that training never shows."""
        partner = np.asarray([SHAPES.index(shape) for shape in HELDOUT_PAIRS.values()])
        return np.any([attributes[shape] == partner[attributes[colour]] for colour, shape in self.pairs], axis=0)

    def render(self, attributes: Attributes, jitter: np.ndarray | None = None, size: int | None = None) -> np.ndarray:
        """Draw pictures: uint8 [n, size, size, 3].

        Args:
            attributes: int [n] for every attribute of the world.
            jitter: float32 [n, jitters] in [0, 1): place, radius and tints; None draws the canonical picture (0.5).
            size: side in pixels; None is the world's own. Geometry scales with it.

        Raises:
            SettingError: an attribute is missing or out of range, or a tuple that the world does not have.
        """
        attributes = self._checked(attributes)
        n = len(next(iter(attributes.values())))
        if jitter is None:
            jitter = np.full((n, self.jitters), 0.5, np.float32)
        if jitter.shape != (n, self.jitters):
            raise SettingError(f"jitter of world {self.name} must have shape {(n, self.jitters)}, not {jitter.shape}")
        return self.paint(attributes, jitter.astype(np.float32, copy=False), self.size if size is None else size)

    def caption(self, attributes: Attributes, phrasing: np.ndarray | int = 0) -> list[str]:
        """Captions [n] that name every attribute; ``phrasing`` (an int, or int [n]) picks the wording.

        Raises:
            SettingError: an attribute is missing or out of range.
        """
        attributes = self._checked(attributes)
        names = {name: np.asarray(self.attributes[name], object)[index] for name, index in attributes.items()}
        n = len(next(iter(names.values())))
        wording = np.broadcast_to(np.asarray(phrasing) % self.phrasings, (n,))
        return [self.phrase({name: column[i] for name, column in names.items()}, int(wording[i])) for i in range(n)]

    def draw(self, split: str, n: int, seed: int, first: int = 0, size: int | None = None) -> Pictures:
        """Pictures ``first`` … ``first + n - 1`` of a split; picture i depends on (world, split, seed, i) alone.

        Raises:
            SettingError: unknown split, negative n, or a size below 8 pixels.
        """
        if size is not None and size < 8:
            raise SettingError(f"data.size must be >= 8 pixels, not {size}")
        bits = self._bits(split, n, seed, first)
        attributes, captions = self._described(split, bits)
        return Pictures(self.render(attributes, unit(bits[:, 2:]), size), captions, attributes)

    def captions(self, split: str, n: int, seed: int, first: int = 0) -> list[str]:
        """The captions of ``draw``, without the pictures.

        Raises:
            SettingError: as ``draw``.
        """
        return self._described(split, self._bits(split, n, seed, first))[1]

    def _bits(self, split: str, n: int, seed: int, first: int) -> np.ndarray:
        """Random numbers of pictures ``first`` …: attributes, phrasing, jitter."""
        if split not in self.tuples:
            raise SettingError(f"data split must be one of {', '.join(self.tuples)}, not '{split}'")
        if n < 0 or first < 0:
            raise SettingError(f"data.{split} must be >= 0 pictures, not {n}")
        key = key_of(self.name, self.version, split, seed)
        return random_bits(key, np.arange(first, first + n), 2 + self.jitters)

    def _described(self, split: str, bits: np.ndarray) -> tuple[Attributes, list[str]]:
        table = self.tuples[split]
        attributes = self.columns(table[(bits[:, 0] % np.uint64(len(table))).astype(np.int64)])
        phrasing = (bits[:, 1] % np.uint64(self.phrasings)).astype(np.int64)
        return attributes, self.caption(attributes, phrasing) if len(bits) else []

    def _checked(self, attributes: Attributes) -> Attributes:
        missing = [name for name in self.attributes if name not in attributes]
        if missing:
            raise SettingError(
                f"world {self.name} needs the attributes {', '.join(self.attributes)}; missing: {', '.join(missing)}"
            )
        columns = {name: np.asarray(attributes[name], np.int64) for name in self.attributes}
        for name, column in columns.items():
            last = len(self.attributes[name]) - 1
            if column.size and not (column.min() >= 0 and column.max() <= last):
                raise SettingError(f"attribute {name} of world {self.name} must be in 0..{last}")
        if not self.allowed(columns).all():
            raise SettingError(f"world {self.name} has no pictures with some of these attribute tuples")
        return columns


def article(word: str) -> str:
    """The word with its indefinite article: "a red", "an orange"."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
