"""Token mixers: parts that let image tokens exchange information, each taking [B, h, w, D] to [B, h, w, D].

A new mixer is one file with one class and one line in ``MIXERS``; every grid, the command line and the conformance tests
take it from there. One that lives elsewhere is named ``my_module:MyMixer``.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from iris.errors import SettingError
from iris.nn.mixers.attention import Attention, AttentionOptions
from iris.nn.mixers.convolution import Convolution3, Convolution7
from iris.nn.mixers.fourier import FourierMixer, FourierOptions
from iris.nn.mixers.grfm import GRFM, PATHWAYS, FusionOptions, check_pathways
from iris.nn.mixers.identity import Identity
from iris.nn.mixers.linear_attention import LinearAttention
from iris.nn.mixers.recurrence import RecurrenceMixer, RecurrenceOptions
from iris.nn.mixers.spatial import SpatialMixer, SpatialOptions

MIXERS: dict[str, type[nn.Module]] = {
    "grfm": GRFM,
    "attention": Attention,
    "linear_attention": LinearAttention,
    "conv3": Convolution3,
    "conv7": Convolution7,
    "identity": Identity,
    "fourier": FourierMixer,
    "recurrence": RecurrenceMixer,
    "spatial": SpatialMixer,
}

_SUBSET = re.compile(r"grfm\[([a-z_, ]*)\]")
_OUTSIDE = re.compile(r"([\w.]+):(\w+)")
_COMMON = ("dim", "width", "heads")


@dataclass(frozen=True)
class MixerOptions:
    """The settings that only some mixers read; each mixer takes the groups that its constructor names."""

    fourier: FourierOptions = field(default_factory=FourierOptions)
    recurrence: RecurrenceOptions = field(default_factory=RecurrenceOptions)
    spatial: SpatialOptions = field(default_factory=SpatialOptions)
    fusion: FusionOptions = field(default_factory=FusionOptions)
    attention: AttentionOptions = field(default_factory=AttentionOptions)

    @classmethod
    def from_dict(cls, values: dict[str, dict[str, Any]]) -> MixerOptions:
        """From plain values, {"fourier": {"form": …}, …}; what is absent keeps its default."""
        kinds = {group.name: group.default_factory for group in fields(cls)}
        return cls(**{name: kinds[name](**given) for name, given in values.items()})


OPTION_GROUPS = tuple(group.name for group in fields(MixerOptions))


def check_mixer(name: str) -> None:
    """Raise a SettingError unless ``name`` is a registered mixer, a subset such as ``grfm[fourier,recurrence]``, or an
    importable ``my_module:MyMixer``."""
    _kind(name)


def option_groups(name: str) -> tuple[str, ...]:
    """The option groups that the mixer called ``name`` reads, such as ("attention",); of a GRFM, those of its pathways."""
    kind, pathways = _kind(name)
    named = [group for group in inspect.signature(kind.__init__).parameters if group in OPTION_GROUPS]
    return tuple(group for group in named if pathways is None or group in pathways or group not in PATHWAYS)


def source_digest(name: str) -> str:
    """SHA-256 of the file that defines the mixer called ``name``: what a result depends on when it lies outside."""
    return hashlib.sha256(Path(inspect.getfile(_kind(name)[0])).read_bytes()).hexdigest()


def is_resizable(name: str) -> bool:
    """Whether ``width`` changes the size of the mixer called ``name``: as it says, or if its constructor takes one."""
    kind = _kind(name)[0]
    return getattr(kind, "resizable", "width" in inspect.signature(kind.__init__).parameters)


def build_mixer(
    name: str, dim: int, width: int | None = None, heads: int = 4, options: MixerOptions = MixerOptions()
) -> nn.Module:
    """Make the mixer called ``name`` for tokens [B, h, w, dim].

    Args:
        name: a key of ``MIXERS``, ``grfm[…]`` with pathways, or ``my_module:MyMixer``, which gets those of ``dim``,
            ``width``, ``heads`` and the option groups that its constructor names.
        width: channels inside (None: ``dim``); what `match` resizes.
        heads: heads of attention and spatial decay, blocks of block-diagonal maps; must divide ``width``.
        options: the settings that only some mixers read.

    Raises:
        SettingError: unknown mixer or pathway, or a width that heads do not divide.
    """
    kind, pathways = _kind(name)
    accepted = inspect.signature(kind.__init__).parameters
    given = {"dim": dim, "width": width, "heads": heads} | {group: getattr(options, group) for group in OPTION_GROUPS}
    arguments = {key: value for key, value in given.items() if key in accepted}
    if pathways is not None:
        arguments["pathways"] = pathways
    return kind(**arguments)


def _kind(name: str) -> tuple[type[nn.Module], tuple[str, ...] | None]:
    """The class called ``name`` and, for ``grfm[…]``, its pathways."""
    subset, outside = _SUBSET.fullmatch(name), _OUTSIDE.fullmatch(name)
    if subset:
        return GRFM, check_pathways([part.strip() for part in subset.group(1).split(",") if part.strip()])
    if outside:
        return _outside(name, *outside.groups()), None
    if name not in MIXERS:
        raise SettingError(
            f"model.mixer={name!r} is unknown; allowed: {', '.join(MIXERS)}, grfm[...] with {', '.join(PATHWAYS)}, "
            "or my_module:MyMixer"
        )
    return MIXERS[name], None


def _outside(name: str, module: str, attribute: str) -> type[nn.Module]:
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SettingError(
            f"model.mixer={name!r} cannot be imported ({error}); give module:Class on the Python path"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise SettingError(f"model.mixer={name!r} must be a torch.nn.Module class, is {kind!r}")
    accepted = inspect.signature(kind.__init__).parameters
    needed = [
        p.name
        for p in list(accepted.values())[1:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    strange = [p for p in needed if p not in (*_COMMON, *OPTION_GROUPS)]
    if "dim" not in accepted or strange:
        raise SettingError(
            f"model.mixer={name!r}: its constructor must take dim, may take width, heads and option groups "
            f"({', '.join(OPTION_GROUPS)}), and needs no other argument; got {', '.join(accepted)}"
        )
    return kind
