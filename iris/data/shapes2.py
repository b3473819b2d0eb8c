"""World ``shapes2``: two objects and their relation, 64x64.

"A left of B" and "B right of A" are the same picture. So the attributes, which a judge must be able to read off a
picture, name the left or upper object first and have two relations; the captions use all four words, choosing which
object is the subject. The objects always differ in colour.
"""

from __future__ import annotations

import numpy as np

from iris.data.raster import BACKGROUNDS, COLOURS, SHAPES, paint, tint
from iris.data.world import Attributes, Pictures, World, article

NAME, VERSION, SIZE = "shapes2", 1, 64
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),  # of the left or upper object
    "shape": SHAPES,
    "relation": ("left of", "above"),  # the first object to the second
    "other_colour": tuple(COLOURS),  # of the right or lower object
    "other_shape": SHAPES,
    "background": tuple(BACKGROUNDS),
}
INVERSE = {"left of": "right of", "above": "below"}
RADIUS, RADIUS_JITTER = 10.5, 1.5  # pixels at 64x64
APART, ALONG_JITTER, ACROSS_JITTER = 15.0, 3.0, 7.0  # of each centre from the middle, along and across the relation
TINT_JITTER = 10.0
PHRASINGS = 8


def _paint(attributes: Attributes, jitter: np.ndarray, size: int) -> np.ndarray:
    scale = np.float32(size / SIZE)
    wobble = jitter * np.float32(2.0) - np.float32(1.0)  # [-1, 1)
    vertical = (attributes["relation"] == 1)[:, None]
    objects = []
    for i, (colour, shape) in enumerate(WORLD.pairs):
        along = np.float32(APART if i else -APART) + np.float32(ALONG_JITTER) * wobble[:, 3 * i]
        across = np.float32(ACROSS_JITTER) * wobble[:, 3 * i + 1]
        centre = np.where(vertical, np.stack([across, along], 1), np.stack([along, across], 1)) + np.float32(SIZE / 2)
        radius = np.float32(RADIUS) + np.float32(RADIUS_JITTER) * wobble[:, 3 * i + 2]
        tinted = tint(COLOURS, attributes[colour], jitter[:, 6 + 3 * i : 9 + 3 * i], TINT_JITTER)
        objects.append((attributes[shape], centre * scale, radius * scale, tinted))
    background = tint(BACKGROUNDS, attributes["background"], jitter[:, 12:15], TINT_JITTER)
    return paint(background, objects, size)


def _phrase(name: dict[str, str], phrasing: int) -> str:
    first, second = f"{name['colour']} {name['shape']}", f"{name['other_colour']} {name['other_shape']}"
    relation, background = name["relation"], name["background"]
    if phrasing % 2:
        first, second, relation = second, first, INVERSE[relation]
    return (
        f"{article(first)} {relation} {article(second)} on a {background} background",
        f"on {background}, there is {article(first)} {relation} {article(second)}",
        f"{first} {relation} {second}, {background} background",
        f"the {background} picture shows {article(first)} {relation} {article(second)}",
    )[phrasing // 2]


WORLD = World(
    name=NAME,
    version=VERSION,
    size=SIZE,
    attributes=ATTRIBUTES,
    pairs=(("colour", "shape"), ("other_colour", "other_shape")),
    jitters=15,
    phrasings=PHRASINGS,
    allowed=lambda attributes: attributes["colour"] != attributes["other_colour"],
    paint=_paint,
    phrase=_phrase,
)


def render(attributes: Attributes, jitter: np.ndarray | None = None, size: int | None = None) -> np.ndarray:
    """Pictures uint8 [n, 64, 64, 3] of the given attributes; see ``World.render``."""
    return WORLD.render(attributes, jitter, size)


def caption(attributes: Attributes, phrasing: np.ndarray | int = 0) -> list[str]:
    """Captions [n] of at most 16 words; odd phrasings make the right or lower object the subject."""
    return WORLD.caption(attributes, phrasing)


def draw(split: str, n: int, seed: int, first: int = 0, size: int | None = None) -> Pictures:
    """Pictures ``first`` … ``first + n - 1`` of split train, validation, heldout or all; see ``World.draw``."""
    return WORLD.draw(split, n, seed, first, size)
