"""Token mixers: parts that let image tokens exchange information, each taking [B, h, w, D] to [B, h, w, D].

A new mixer is one file with one class and one line in ``MIXERS``; every grid, the command line and the conformance tests
take it from there.
"""

from __future__ import annotations

import inspect
import re

from torch import nn

from iris.errors import SettingError
from iris.mixers.attention import Attention
from iris.mixers.fourier import FourierMixer, FourierPathway
from iris.mixers.grfm import GRFM
from iris.mixers.recurrence import RecurrenceMixer, RecurrencePathway
from iris.mixers.spatial import SpatialMixer, SpatialPathway

MIXERS: dict[str, type[nn.Module]] = {
    "grfm": GRFM,
    "attention": Attention,
    "fourier": FourierMixer,
    "recurrence": RecurrenceMixer,
    "spatial": SpatialMixer,
}

PATHWAYS: dict[str, type[nn.Module]] = {
    "fourier": FourierPathway,
    "recurrence": RecurrencePathway,
    "spatial": SpatialPathway,
}

_SUBSET = re.compile(r"grfm\[([a-z_, ]*)\]")


def check_mixer(name: str) -> None:
    """Raise a SettingError unless ``name`` is a registered mixer or a subset such as ``grfm[fourier,recurrence]``."""
    subset = _SUBSET.fullmatch(name)
    if name not in MIXERS and subset is None:
        raise SettingError(
            f"model.mixer={name!r} is unknown; allowed: {', '.join(MIXERS)}, or grfm[...] with {', '.join(PATHWAYS)}"
        )
    if subset:
        _pathways(name, subset.group(1))


def build_mixer(name: str, dim: int, **options: object) -> nn.Module:
    """Make the mixer called ``name`` for tokens [B, h, w, dim].

    ``options`` common to all: ``width`` (channels inside, default ``dim``; what `match` resizes), ``heads`` (heads of
    attention and spatial decay, blocks of block-diagonal maps; must divide ``width``).

    Raises:
        SettingError: unknown mixer, pathway or option, or a width that heads do not divide.
    """
    check_mixer(name)
    subset = _SUBSET.fullmatch(name)
    kind = GRFM if subset else MIXERS[name]
    allowed = [p for p in inspect.signature(kind.__init__).parameters if p not in ("self", "dim", "pathways")]
    unknown = [option for option in options if option not in allowed]
    if unknown:
        raise SettingError(f"mixer {name}: unknown option {', '.join(unknown)}; allowed: {', '.join(allowed)}")
    if kind is GRFM:
        options["pathways"] = _pathways(name, subset.group(1)) if subset else dict(PATHWAYS)
    return kind(dim, **options)


def _pathways(name: str, listed: str) -> dict[str, type[nn.Module]]:
    names = [part.strip() for part in listed.split(",") if part.strip()]
    if not names or len(set(names)) != len(names) or any(part not in PATHWAYS for part in names):
        raise SettingError(f"model.mixer={name!r}: list different pathways out of {', '.join(PATHWAYS)}")
    return {part: PATHWAYS[part] for part in PATHWAYS if part in names}
