"""The five stages of training: from the words of a command line to finished weights."""

from __future__ import annotations

from collections.abc import Sequence

from iris.errors import SettingError
from iris.stages.base import Desk, Stage, Weights, named
from iris.stages.distill import DistillStage
from iris.stages.flow import FlowStage
from iris.stages.settings import Settings, settings_of, words_for
from iris.stages.vae import VAEStage

KINDS: dict[str, type[Stage]] = {
    "vae": VAEStage,
    "class": FlowStage,
    "text": FlowStage,
    "aesthetic": FlowStage,
    "distill": DistillStage,
}
# The stages that ``from`` may name; None: it may also be null.
STARTS: dict[str, tuple[str | None, ...]] = {
    "vae": (None,),
    "class": (None,),
    "text": (None, "class"),
    "aesthetic": ("text", "class"),
    "distill": ("text", "class", "aesthetic"),
}


def stage_of(words: Sequence[str], desk: Desk) -> Stage:
    """The stage of a command line, with those that it builds on; nothing is made yet.

    Raises:
        SettingError: anything that would fail later and can be known now.
    """
    settings = settings_of(words)
    return KINDS[settings.stage](settings, desk, _earlier(settings, words, desk))


def _earlier(settings: Settings, words: Sequence[str], desk: Desk) -> dict[str, Weights]:
    if settings.stage == "vae":
        for name, value in (("from", settings.start), ("vae", settings.vae)):
            if value is not None:
                raise SettingError(f"{name}={value}: stage=vae builds on nothing; allowed: null")
        return {}
    if settings.start is not None or None not in STARTS[settings.stage]:
        return {"start": _start(settings, words, desk)}
    if settings.vae is not None:
        return {"vae": named("vae", settings.vae, desk)}
    return {"vae": stage_of(words_for("vae", words), desk)}


def _start(settings: Settings, words: Sequence[str], desk: Desk) -> Weights:
    """The weights of ``from``."""
    word, allowed = settings.start, STARTS[settings.stage]
    if word is None or (word in KINDS and word not in allowed):
        stages = ", ".join("null" if name is None else name for name in allowed)
        raise SettingError(
            f"from={word or 'null'} cannot be used with stage={settings.stage}; allowed: {stages}, a key or a folder"
        )
    if word in KINDS:
        # What a stage on the way starts from is its own choice: weights of aesthetic, of text.
        return stage_of(words_for(word, words), desk)
    if settings.vae is not None:
        raise SettingError(f"vae={settings.vae}: the weights of from={word} bring their own latent; allowed: null")
    return named("from", word, desk)
