"""From settings to a stage and all that it builds on; nothing is made yet.

data ─> latent ─> encoded ─┐
        captions ──────────┴─> class ─> text ─> aesthetic ─> student
"""

from __future__ import annotations

from dataclasses import replace

from iris.errors import SettingError
from iris.stages.data import unselected
from iris.stages.engine import Context, Stage, Work, named
from iris.stages.flow import AestheticStage, ClassStage, OnLatents, TextStage, latent_behind, text_of_folder
from iris.stages.latent import LatentStage
from iris.stages.settings import STAGES, Recipe
from iris.stages.student import StudentStage

KINDS: dict[str, type[OnLatents]] = {
    "class": ClassStage,
    "text": TextStage,
    "aesthetic": AestheticStage,
    "distill": StudentStage,
}
# What ``start`` may name; None: it may also be null. The first is the default.
STARTS: dict[str, tuple[str | None, ...]] = {
    "class": (None,),
    "text": (None, "class"),
    "aesthetic": ("text", "class"),
    "distill": ("text", "class", "aesthetic"),
}


def stage_of(recipe: Recipe, context: Context) -> Stage:
    """The stage that a recipe ends with.

    Raises:
        SettingError: anything that would fail later and can be known now.
    """
    if recipe.stage == "vae":
        for name, value in (("start", recipe.start), ("latent.weights", recipe.latent.weights)):
            if value is not None:
                raise SettingError(f"{name}={value}: stage=vae builds on nothing; allowed: null")
        if recipe.data.live:
            raise SettingError(
                "data.live=true: stage=vae trains on what is stored; allowed: false (stages class, text and aesthetic may "
                "read live)"
            )
        recipe.data.source("train")  # which says that crops must be centred
        return LatentStage(context, recipe)
    return model_stage(recipe, context)


def model_stage(recipe: Recipe, context: Context) -> OnLatents:
    """The stage of a model that makes images, at the end of a recipe's chain.

    Raises:
        SettingError: as ``stage_of``.
    """
    start = _start(recipe, context)
    latent = _latent(recipe, context) if start is None else latent_behind(start)
    return KINDS[recipe.stage](context, recipe, latent, start)


def _latent(recipe: Recipe, context: Context) -> Work:
    if recipe.latent.weights is not None:
        return named("latent.weights", recipe.latent.weights, context)
    return LatentStage(context, recipe)


def _start(recipe: Recipe, context: Context) -> Work | None:
    """What ``start`` names: "class,text" is the text stage that started from the class stage."""
    word, allowed = recipe.start, STARTS[recipe.stage]
    if word is None:
        word = allowed[0]
    *before, last = (word or "").split(",")
    if word is None:
        return None
    if (last in STAGES and last not in allowed) or (before and last not in STAGES):
        stages = ", ".join("null" if name is None else name for name in allowed)
        raise SettingError(
            f"start={recipe.start or 'null'} cannot be used with stage={recipe.stage}; allowed: {stages}, a key or a folder"
        )
    if last in STAGES:
        # What a stage on the way starts from is its own choice; rows are selected for the named stage, and for aesthetic.
        data = recipe.data if last == "aesthetic" else unselected(recipe.data)
        return model_stage(replace(recipe, stage=last, start=",".join(before) or None, data=data), context)
    if recipe.latent.weights is not None:
        raise SettingError(
            f"latent.weights={recipe.latent.weights}: the weights of start={word} bring their own latent; allowed: null"
        )
    found = named("start", word, context)
    text_of_folder(found)  # a latent's weights are no start
    return found
