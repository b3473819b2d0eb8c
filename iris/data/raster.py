"""The rasteriser of the drawn worlds: signed distances, antialiasing, and random numbers addressed by picture index.

Pictures must be the same bytes on every machine, so only operations that IEEE 754 rounds exactly are used (+ - * /
sqrt, min, max on float32; wrapping uint64 integers): no sine, no matrix product, no library generator whose stream may
change.
"""

from __future__ import annotations

import hashlib

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (220, 30, 35),
    "green": (35, 155, 55),
    "blue": (40, 70, 215),
    "yellow": (242, 222, 45),
    "orange": (248, 135, 20),
    "purple": (128, 40, 170),
    "cyan": (50, 205, 220),
    "pink": (245, 135, 195),
}
BACKGROUNDS = {"white": (246, 246, 246), "black": (12, 12, 12), "grey": (128, 128, 128), "brown": (98, 64, 38)}

# Share of r by which each outline is widened or narrowed, so that no shape is told from another by its area alone.
SQUARE_HALF_SIDE = 0.88
CROSS_HALF_BAR = 0.34
RING_MIDDLE, RING_HALF_WIDTH = 0.78, 0.22
TRIANGLE_BASE = 0.8
CHUNK = 1024  # pictures drawn at once: 1024 x 32 x 32 float32 = 4 MB an array


def key_of(*address: object) -> np.uint64:
    """A 64-bit key for an address such as ("shapes", 1, "train", 0); the same on every machine and Python version."""
    text = "\x1f".join(str(part) for part in address)
    return np.uint64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))


def mix(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators")."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(key: np.uint64, index: np.ndarray, fields: int) -> np.ndarray:
    """Random uint64 [n, fields] for picture numbers ``index`` [n].

    Entry (i, j) is number ``index[i] * fields + j`` of the SplitMix64 stream that starts at ``key``: a counter, so a
    picture's numbers depend on its own index and never on how many others are drawn.
    """
    counter = index.astype(np.uint64)[:, None] * np.uint64(fields) + np.arange(1, fields + 1, dtype=np.uint64)
    return mix(key + counter * np.uint64(0x9E3779B97F4A7C15))


def unit(bits: np.ndarray) -> np.ndarray:
    """uint64 bits -> float32 in [0, 1), exact: the upper 24 bits over 2**24."""
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def distance(shape: int, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Signed distance in pixels (negative inside) to an outline of "radius" r centred at 0, y downwards.

    ``x``, ``y``, ``r`` broadcast against each other. Exact along the edges; outside a corner it is the distance to the
    nearer edge's line, which antialiasing within half a pixel cannot tell apart.
    """
    name = SHAPES[shape]
    if name == "circle":
        return np.sqrt(x * x + y * y) - r
    if name == "ring":
        return np.abs(np.sqrt(x * x + y * y) - np.float32(RING_MIDDLE) * r) - np.float32(RING_HALF_WIDTH) * r
    x, side = np.abs(x), np.abs(y)
    if name == "square":
        return np.maximum(x, side) - np.float32(SQUARE_HALF_SIDE) * r
    if name == "cross":
        bar = np.float32(CROSS_HALF_BAR) * r
        return np.minimum(np.maximum(x - r, side - bar), np.maximum(x - bar, side - r))
    # Triangle: apex (0, -r), base from (-r, 0.8 r) to (r, 0.8 r); the slanted edge's normal is (1.8, -1) / |.|.
    rise = np.float32(1.0 + TRIANGLE_BASE)
    slant = (rise * x - y - r) / np.sqrt(rise * rise + np.float32(1.0))
    return np.maximum(y - np.float32(TRIANGLE_BASE) * r, slant)


def coverage(shape: np.ndarray, centre: np.ndarray, radius: np.ndarray, size: int) -> np.ndarray:
    """Share of each pixel covered by one object a picture: float32 [n, size, size] in [0, 1].

    Args:
        shape: int [n], index into ``SHAPES``.
        centre: float32 [n, 2], (x, y) in pixels, the left upper corner of the picture is (0, 0).
        radius: float32 [n], pixels.
        size: side of the picture in pixels.
    """
    pixel = np.arange(size, dtype=np.float32) + np.float32(0.5)
    out = np.empty((len(shape), size, size), np.float32)
    for kind in range(len(SHAPES)):
        rows = np.flatnonzero(shape == kind)
        x = pixel[None, None, :] - centre[rows, 0][:, None, None]
        y = pixel[None, :, None] - centre[rows, 1][:, None, None]
        out[rows] = distance(kind, x, y, radius[rows][:, None, None])
    np.subtract(np.float32(0.5), out, out=out)
    return np.clip(out, 0.0, 1.0, out=out)


def paint(
    background: np.ndarray, objects: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]], size: int
) -> np.ndarray:
    """Draw objects over plain backgrounds, the first object lowest: uint8 [n, size, size, 3].

    Args:
        background: float32 [n, 3], RGB in 0..255.
        objects: for each layer (shape int [n], centre float32 [n, 2], radius float32 [n], colour float32 [n, 3]).
        size: side of the picture in pixels.
    """
    images = np.empty((len(background), size, size, 3), np.uint8)
    for start in range(0, len(background), CHUNK):
        part = slice(start, start + CHUNK)
        layers = [
            (coverage(shape[part], centre[part], radius[part], size), colour[part])
            for shape, centre, radius, colour in objects
        ]
        for channel in range(3):
            value = np.broadcast_to(background[part, channel, None, None], layers[0][0].shape)
            for cover, colour in layers:
                value = value + cover * (colour[:, channel, None, None] - value)
            images[part, :, :, channel] = value + np.float32(0.5)  # the cast truncates: round half up
    return images


def tint(table: dict[str, tuple[int, int, int]], index: np.ndarray, jitter: np.ndarray, spread: float) -> np.ndarray:
    """Colours ``table[index]`` moved by up to ``spread`` a channel, with jitter [n, 3] in [0, 1): float32 [n, 3]."""
    base = np.asarray(list(table.values()), np.float32)[index]
    moved = base + np.float32(2 * spread) * (jitter - np.float32(0.5))
    return np.clip(moved, 0.0, 255.0)
