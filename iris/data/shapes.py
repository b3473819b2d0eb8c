"""World ``shapes``: one object on a plain background, 32x32, described by colour, shape, size, position, background."""

from __future__ import annotations

import numpy as np

from iris.data.raster import BACKGROUNDS, COLOURS, SHAPES, paint, tint
from iris.data.world import Attributes, Pictures, World, article

NAME, VERSION, SIZE = "shapes", 1, 32
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": ("small", "large"),
    "position": ("top left", "top right", "centre", "bottom left", "bottom right"),
    "background": tuple(BACKGROUNDS),
}
CORNERS = np.asarray([(-1, -1), (1, -1), (0, 0), (-1, 1), (1, 1)], np.float32)
RADIUS = np.asarray([5.5, 9.0], np.float32)  # pixels at 32x32, small and large
REACH = np.asarray([8.5, 5.5], np.float32)  # centre of the picture to a corner's centre: a large one still fits
RADIUS_JITTER, PLACE_JITTER, TINT_JITTER = 0.5, 0.9, 10.0
PHRASINGS = 6


def _paint(attributes: Attributes, jitter: np.ndarray, size: int) -> np.ndarray:
    scale = np.float32(size / SIZE)
    wobble = jitter * np.float32(2.0) - np.float32(1.0)  # [-1, 1)
    radius = RADIUS[attributes["size"]] + np.float32(RADIUS_JITTER) * wobble[:, 0]
    centre = CORNERS[attributes["position"]] * REACH[attributes["size"]][:, None]
    centre = centre + np.float32(SIZE / 2) + np.float32(PLACE_JITTER) * wobble[:, 1:3]
    colour = tint(COLOURS, attributes["colour"], jitter[:, 3:6], TINT_JITTER)
    background = tint(BACKGROUNDS, attributes["background"], jitter[:, 6:9], TINT_JITTER)
    return paint(background, [(attributes["shape"], centre * scale, radius * scale, colour)], size)


def _phrase(name: dict[str, str], phrasing: int) -> str:
    size, colour, shape = name["size"], name["colour"], name["shape"]
    position, background = name["position"], name["background"]
    return (
        f"a {size} {colour} {shape} in the {position} on a {background} background",
        f"on {background}, there is a {size} {colour} {shape} in the {position}",
        f"{article(colour)} {shape}, {size}, in the {position} of a {background} picture",
        f"{size} {colour} {shape}, {position}, {background} background",
        f"in the {position} a {size} {shape} in {colour}, the background is {background}",
        f"the {background} picture shows a {size} {colour} {shape} in the {position}",
    )[phrasing]


WORLD = World(
    name=NAME,
    version=VERSION,
    size=SIZE,
    attributes=ATTRIBUTES,
    pairs=(("colour", "shape"),),
    jitters=9,
    phrasings=PHRASINGS,
    allowed=lambda attributes: np.ones(len(attributes["colour"]), bool),
    paint=_paint,
    phrase=_phrase,
)


def render(attributes: Attributes, jitter: np.ndarray | None = None, size: int | None = None) -> np.ndarray:
    """Pictures uint8 [n, 32, 32, 3] of the given attributes; see ``World.render``."""
    return WORLD.render(attributes, jitter, size)


def caption(attributes: Attributes, phrasing: np.ndarray | int = 0) -> list[str]:
    """Captions [n] of at most 16 words; see ``World.caption``."""
    return WORLD.caption(attributes, phrasing)


def draw(split: str, n: int, seed: int, first: int = 0, size: int | None = None) -> Pictures:
    """Pictures ``first`` … ``first + n - 1`` of split train, validation, heldout or all; see ``World.draw``."""
    return WORLD.draw(split, n, seed, first, size)
