"""Captions -> text tokens: the small word-level encoder of the embedded default, trained with the generator."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iris.errors import SettingError
from iris.nn.condition import TextCondition
from iris.nn.layers import FeedForward, Linear, require_divisible, rms_normalise, split_heads
from iris.text.base import TextEncoder

PAD, START, UNKNOWN = 0, 1, 2
_WORD = re.compile(r"[a-z0-9]+")


class Vocabulary:
    """Words -> numbers. Sequences start with a start token; the empty caption is that token alone (the null prompt)."""

    def __init__(self, words: Sequence[str], length: int) -> None:
        self.words, self.length = list(words), length
        self._index = {word: number + UNKNOWN + 1 for number, word in enumerate(self.words)}

    @classmethod
    def from_captions(cls, captions: Sequence[str], length: int, most: int = 4000) -> Vocabulary:
        """The ``most`` frequent words of ``captions`` (ties in alphabetical order).

        Raises:
            SettingError: no caption holds a word.
        """
        counts = Counter(word for caption in captions for word in _WORD.findall(caption.lower()))
        if not counts:
            raise SettingError("data.text_column: every caption is empty")
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(ranked[:most], length)

    def __len__(self) -> int:
        return len(self.words) + UNKNOWN + 1

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Token numbers int64 [len(captions), length], cut or padded with ``PAD``."""
        rows = torch.full((len(captions), self.length), PAD)
        for row, caption in zip(rows, captions, strict=True):
            numbers = [START] + [self._index.get(word, UNKNOWN) for word in _WORD.findall(caption.lower())]
            numbers = numbers[: self.length]
            row[: len(numbers)] = torch.tensor(numbers)
        return rows


class TokenTable(nn.Module):
    """Learned vectors for ``count`` numbers, unit variance at the start: int64 [...] -> [..., width]."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, numbers: Tensor) -> Tensor:
        return F.embedding(numbers, self.weight)


class TextLayer(nn.Module):
    """Pre-norm self-attention and feed-forward over text tokens [B, L, W]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out, self.feed_forward = Linear(width, 3 * width), Linear(width, width), FeedForward(width, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = split_heads(self.qkv(rms_normalise(x)), 3, self.heads)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.feed_forward(rms_normalise(x))


class WordEncoder(TextEncoder):
    """Word and position vectors, then transformer layers: token numbers [B, L] -> TextCondition of width W."""

    def __init__(self, vocabulary: Vocabulary, width: int, layers: int = 1, heads: int = 4) -> None:
        super().__init__()
        require_divisible("model.text_width", width, "text heads", heads)
        self.vocabulary, self.width, self.heads = vocabulary, width, heads
        self.word, self.position = TokenTable(len(vocabulary), width), TokenTable(vocabulary.length, width)
        self.layers = nn.ModuleList(TextLayer(width, heads) for _ in range(layers))

    @property
    def length(self) -> int:
        return self.vocabulary.length

    def tokenise(self, captions: Sequence[str]) -> Tensor:
        return self.vocabulary.encode(captions)

    def forward(self, numbers: Tensor) -> TextCondition:
        mask = numbers != PAD
        x = self.word(numbers) + self.position(torch.arange(numbers.shape[1], device=numbers.device))
        for layer in self.layers:
            x = layer(x, mask)
        counted = mask.unsqueeze(-1).to(x.dtype)
        return TextCondition(x, mask, (x * counted).sum(1) / counted.sum(1))

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": "words",
            "words": self.vocabulary.words,
            "length": self.length,
            "width": self.width,
            "layers": len(self.layers),
            "heads": self.heads,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WordEncoder:
        shape = {name: value for name, value in values.items() if name not in ("words", "length")}
        return cls(Vocabulary(values["words"], values["length"]), **shape)
