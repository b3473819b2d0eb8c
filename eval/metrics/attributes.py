"""Whether an image shows what its caption asks for, attribute by attribute."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor


def attribute_accuracy(predicted: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Share of images on which each attribute is right, and under "caption" the share with all of them right.

    Args:
        predicted: attribute -> class [N] (integers) read off the images.
        wanted: attribute -> class [N] that the captions name.

    Returns:
        attribute -> accuracy in [0, 1], in the order of ``wanted``, then "caption".

    Raises:
        ValueError: no attributes, other names on the two sides, lengths that differ, no images, floating-point classes.
    """
    if not wanted or set(predicted) != set(wanted):
        raise ValueError(f"attributes predicted are {sorted(predicted)}, wanted {sorted(wanted)}")
    if "caption" in wanted:
        raise ValueError('"caption" is the name for all attributes together and cannot name one of them')
    lengths = {len(classes) for side in (predicted, wanted) for classes in side.values() if classes.dim() == 1}
    shapes = [tuple(c.shape) for side in (predicted, wanted) for c in side.values()]
    if len(lengths) != 1 or 0 in lengths or any(len(shape) != 1 for shape in shapes):
        raise ValueError(f"every attribute must be [N] with the same N >= 1, got {shapes}")
    if any(c.is_floating_point() for side in (predicted, wanted) for c in side.values()):
        raise ValueError("classes must be integers, got floating-point values (scores instead of their argmax?)")
    right = {name: predicted[name].cpu() == wanted[name].cpu() for name in wanted}
    accuracy = {name: float(hits.double().mean()) for name, hits in right.items()}
    return {**accuracy, "caption": float(torch.stack(list(right.values())).all(0).double().mean())}


def wilson_interval(accuracy: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval for a share measured on ``count`` independent images (Wilson 1927); stays inside [0, 1] at the ends.

    Raises:
        ValueError: accuracy outside [0, 1], count below 1, confidence outside (0, 1).
    """
    if not 0 <= accuracy <= 1 or count < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"accuracy must be in [0, 1], count >= 1, confidence in (0, 1), got {accuracy}, {count}, {confidence}"
        )
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    spread = 1 + z * z / count
    centre = (accuracy + z * z / (2 * count)) / spread
    half = z * math.sqrt(accuracy * (1 - accuracy) / count + (z / (2 * count)) ** 2) / spread
    return max(0.0, centre - half), min(1.0, centre + half)
