"""What a model can do on the drawn worlds, skill by skill, as GenEval reports it (Ghosh et al. 2023, arXiv:2310.11513).

A skill is right on an image when every attribute of that skill is: both colours for ``shapes2``'s colour. Captions
with a colour-shape pair that training never showed are reported apart, and the difference is the compositional gap.
A skill that a world cannot show, or that was not read, has no number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.metrics.bootstrap import wilson_interval
from iris.data.world import World
from iris.errors import SettingError

SKILLS = ("colour", "shape", "size", "position", "count", "relation", "background")
ALL = "all"  # every skill that was read, right on the same image
COUNT = "count"  # objects on the picture, as eval.metrics.objects.count_objects reads them
OTHER = "other_"  # prefix of a second object's attribute
ABSENT, NOT_READ, NO_IMAGES = "not in this world", "not read", "no such captions"


@dataclass(frozen=True)
class Share:
    """A share of images with its interval: Wilson's, or Newcombe's (1998) for a difference of two shares."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class SkillSummary:
    """Accuracy by skill, and under "all"; a string instead of a share says why there is none.

    Attributes:
        world: that the captions come from.
        seen: on captions whose colour-shape pairs were in training.
        heldout: on captions with a pair that never was.
        gap: seen minus held-out accuracy.
        confidence: of all intervals.
    """

    world: str
    seen: dict[str, Share | str]
    heldout: dict[str, Share | str]
    gap: dict[str, Share | str]
    confidence: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON: world, confidence, and under seen, heldout and gap {skill: {value, low, high, n}, or why not}."""
        parts = {
            name: {skill: share if isinstance(share, str) else vars(share) for skill, share in part.items()}
            for name, part in (("seen", self.seen), ("heldout", self.heldout), ("gap", self.gap))
        }
        return {"world": self.world, "confidence": self.confidence, **parts}


def summarise_skills(
    world: World, predicted: Mapping[str, Tensor], wanted: Mapping[str, Tensor | np.ndarray], confidence: float = 0.95
) -> SkillSummary:
    """Accuracy by skill of images [N] against what their captions name.

    Args:
        world: of the captions, from ``iris.data.WORLDS``.
        predicted: attribute -> class [N] read off the images by a judge (``Judge.attributes``), and under "count", if
            it is to be reported, the number of objects [N] (``count_objects``).
        wanted: attribute -> class [N] that the captions name, all of the world's.
        confidence: of the intervals.

    Raises:
        SettingError: attributes that are not the world's, or classes out of range.
        ValueError: other attributes read than named, lengths that differ, no images, classes that are no integers.
    """
    named = {name: torch.as_tensor(classes) for name, classes in wanted.items()}
    if set(named) != set(world.attributes):
        raise SettingError(
            f"wanted: world {world.name} has the attributes {', '.join(world.attributes)}, got "
            f"{', '.join(named) or 'none'}"
        )
    if COUNT in predicted:
        objects = torch.full_like(next(iter(named.values())), len(world.pairs))
        named[COUNT] = objects
    read = {name: torch.as_tensor(classes).cpu() for name, classes in predicted.items()}
    _check_classes(read, named)
    right = right_by_skill({name: read[name] == named[name] for name in named})
    heldout = torch.from_numpy(_is_heldout(world, named))
    parts = []
    for chosen in (~heldout, heldout):
        parts.append({skill: _share(hits[chosen], confidence) for skill, hits in right.items()})
    seen, unseen = ({skill: part.get(skill, _why_absent(skill)) for skill in (*SKILLS, ALL)} for part in parts)
    gap = {skill: _difference(seen[skill], unseen[skill], confidence) for skill in seen}
    return SkillSummary(world.name, seen, unseen, gap, confidence)


def right_by_skill(right: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whether each image [N] is right in all attributes of a skill, by skill, then under "all".

    Args:
        right: attribute -> bool [N].

    Raises:
        SettingError: an attribute that belongs to no skill.
    """
    grouped: dict[str, list[Tensor]] = {}
    for name, hits in right.items():
        skill = name.removeprefix(OTHER)
        if skill not in SKILLS:
            raise SettingError(f"attribute {name!r} belongs to no skill; skills: {', '.join(SKILLS)}")
        grouped.setdefault(skill, []).append(hits)
    skills = {skill: torch.stack(parts).all(0) for skill, parts in grouped.items()}
    return {**skills, ALL: torch.stack(list(skills.values())).all(0)}


def _check_classes(predicted: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise a ValueError unless both sides name the same attributes, each with one integer an image."""
    if set(predicted) != set(wanted):
        raise ValueError(f"attributes predicted are {sorted(predicted)}, wanted {sorted(wanted)}")
    both = [*predicted.values(), *wanted.values()]
    shapes = {tuple(classes.shape) for classes in both}
    if len(shapes) != 1 or any(len(shape) != 1 or shape[0] == 0 for shape in shapes):
        raise ValueError(f"every attribute must be [N] with the same N >= 1, got {sorted(shapes)}")
    if any(classes.is_floating_point() for classes in both):
        raise ValueError("classes must be integers, got floating-point values (scores instead of their argmax?)")


def _is_heldout(world: World, wanted: Mapping[str, Tensor]) -> np.ndarray:
    attributes = {name: wanted[name].numpy() for name in world.attributes}
    for name, classes in attributes.items():
        if classes.min() < 0 or classes.max() >= len(world.attributes[name]):
            raise SettingError(f"wanted: {name} of world {world.name} must be in 0..{len(world.attributes[name]) - 1}")
    return world.is_heldout(attributes)


def _why_absent(skill: str) -> str:
    return NOT_READ if skill == COUNT else ABSENT


def _share(hits: Tensor, confidence: float) -> Share | str:
    if not len(hits):
        return NO_IMAGES
    value = float(hits.double().mean())
    return Share(value, *wilson_interval(value, len(hits), confidence), len(hits))


def _difference(a: Share | str, b: Share | str, confidence: float) -> Share | str:
    """a - b with the hybrid score interval of Newcombe 1998, method 10; n is the smaller of the two."""
    if isinstance(a, str) or isinstance(b, str):
        return a if isinstance(a, str) else str(b)
    value = a.value - b.value
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    high = value + math.hypot(a.high - a.value, b.value - b.low)
    return Share(value, low, high, min(a.n, b.n))
