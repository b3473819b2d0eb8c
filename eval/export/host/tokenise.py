"""Captions to token numbers without PyTorch: what ``iris.text``'s encoders do, from files beside the exported parts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from iris.errors import SettingError

TOKENIZER = "tokenizer.json"  # of a CLIP, as Hugging Face's tokenizers library writes it
PAD, START, UNKNOWN = 0, 1, 2  # of iris.text.words
_WORD = re.compile(r"[a-z0-9]+")

Tokeniser = Callable[[Sequence[str]], np.ndarray]


def load_tokeniser(values: Mapping[str, Any], folder: Path) -> Tokeniser:
    """Captions -> numbers int64 [len(captions), N].

    Args:
        values: "text" of pipeline.json.
        folder: where a CLIP's tokenizer.json lies.

    Raises:
        SettingError: an encoder of another name.
    """
    name = values.get("name", "words")
    if name == "words":
        return _words(values["words"], values["length"])
    if name == "labels":
        return _labels(values["classes"])
    if name == "clip":
        return _clip(folder / TOKENIZER)
    if name == "drawn clip":
        return partial(drawn_numbers, count=values["vocab_size"], length=values["length"])
    raise SettingError(
        f"model.text={name!r} cannot be tokenised without PyTorch; allowed: words, labels, clip, drawn clip"
    )


def _words(words: Sequence[str], length: int) -> Tokeniser:
    index = {word: number for number, word in enumerate(words, UNKNOWN + 1)}

    def tokenise(captions: Sequence[str]) -> np.ndarray:
        rows = np.full((len(captions), length), PAD, np.int64)
        for row, caption in zip(rows, captions, strict=True):
            numbers = [START, *(index.get(word, UNKNOWN) for word in _WORD.findall(caption.lower()))][:length]
            row[: len(numbers)] = numbers
        return rows

    return tokenise


def _labels(classes: Sequence[str]) -> Tokeniser:
    index = {"": 0, **{name: number for number, name in enumerate(classes, 1)}}

    def tokenise(captions: Sequence[str]) -> np.ndarray:
        if unknown := [caption for caption in captions if caption not in index]:
            raise SettingError(f"caption {unknown[0]!r} is not one of the {len(classes)} classes of model.text=labels")
        return np.array([[index[caption]] for caption in captions], np.int64)

    return tokenise


def _clip(file: Path) -> Tokeniser:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda captions: np.array([row.ids for row in tokenizer.encode_batch(list(captions))], np.int64)


def drawn_numbers(captions: Sequence[str], count: int, length: int) -> np.ndarray:
    """Numbers int64 [len(captions), length] below ``count`` drawn for each caption, for weights that are drawn too and know
    no words; the last one marks the end."""
    seeds = [int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "little") for caption in captions]
    rows = np.stack([np.random.default_rng(seed).integers(count - 1, size=length) for seed in seeds])
    rows[:, -1] = count - 1
    return rows
