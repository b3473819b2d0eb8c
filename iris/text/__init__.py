"""Text encoders: captions -> what the generator is conditioned on. ``TEXT_ENCODERS`` names them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iris.errors import SettingError, require_choice
from iris.text.base import TextEncoder
from iris.text.cache import EmbeddedText, embed_captions
from iris.text.clip import CLIPText
from iris.text.labels import ClassLabels
from iris.text.prompts import encode_prompts
from iris.text.words import PAD, START, UNKNOWN, Vocabulary, WordEncoder

TEXT_ENCODERS: dict[str, type[TextEncoder]] = {"words": WordEncoder, "clip": CLIPText, "labels": ClassLabels}


def build_text_encoder(values: Mapping[str, Any]) -> TextEncoder:
    """The encoder that ``TextEncoder.to_dict`` described; values without a "name" are a word encoder's.

    Raises:
        SettingError: unknown name, or values that this encoder has no use for.
    """
    rest = dict(values)
    name = rest.pop("name", "words")
    require_choice("model.text", name, tuple(TEXT_ENCODERS))
    try:
        return TEXT_ENCODERS[name].from_dict(rest)
    except (TypeError, KeyError) as error:
        given = ", ".join(rest) or "nothing"
        raise SettingError(f"model.text={name}: cannot be built from {given} ({error})") from error


__all__ = [
    "PAD",
    "START",
    "TEXT_ENCODERS",
    "UNKNOWN",
    "CLIPText",
    "ClassLabels",
    "EmbeddedText",
    "TextEncoder",
    "Vocabulary",
    "WordEncoder",
    "build_text_encoder",
    "embed_captions",
    "encode_prompts",
]
