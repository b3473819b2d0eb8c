"""What every text encoder offers: captions to token numbers, and these to the condition that the generator reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iris.nn.condition import TextCondition


class TextEncoder(nn.Module):
    """Captions -> token numbers -> TextCondition of ``length`` tokens, ``width`` wide.

    Numbers are what data sets hold and what caption dropout replaces: ``tokenise([""])[0]`` is the null prompt, a row
    of the same length as every other. A ``frozen`` encoder is never trained, and ``iris.randomness.initialise`` leaves
    its weights alone.
    """

    frozen = False
    width: int
    length: int

    def tokenise(self, captions: Sequence[str]) -> Tensor:
        """Numbers int64 [len(captions), N] on the CPU, N the same for every caption; "" is the null prompt."""
        raise TypeError(f"{type(self).__name__} does not define tokenise()")

    def forward(self, numbers: Tensor) -> TextCondition:
        """Numbers int64 [B, N] -> TextCondition, on the device of ``numbers``."""
        raise TypeError(f"{type(self).__name__} does not define forward()")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values from which ``build_text_encoder`` makes this encoder again, "name" among them."""
        raise TypeError(f"{type(self).__name__} does not define to_dict()")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TextEncoder:
        """An encoder from what ``to_dict`` gave, without "name"."""
        return cls(**values)

    def facts(self) -> dict[str, Any]:
        """What the encoding depends on beside the weights, as JSON-able values."""
        return self.to_dict()

    def fingerprint(self) -> str:
        """sha256 of ``facts`` and all weights: encoders with one fingerprint encode alike."""
        digest = hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode())
        weights = dict(self.named_parameters()) | dict(self.named_buffers())
        for name, tensor in sorted(weights.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()
