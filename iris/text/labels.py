"""Class labels as text: one learned token a class, for data whose captions are class names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iris.errors import SettingError
from iris.nn.condition import TextCondition
from iris.text.base import TextEncoder
from iris.text.words import TokenTable

NULL = 0  # the class of the empty caption, trained by caption dropout as in DiT (arXiv 2212.09748)
SHOWN = 10  # class names that an error message lists


class ClassLabels(TextEncoder):
    """Class names -> one learned token each, [B, 1] -> TextCondition with L = 1; trained together with the generator.

    Args:
        classes: unique names, which captions must match exactly. Class i has number i + 1, the null class "" has 0.
        width: W.

    Raises:
        SettingError: no class; a name that is empty or given twice; width < 1.
    """

    length = 1

    def __init__(self, classes: Sequence[str], width: int) -> None:
        super().__init__()
        _check(classes, width)
        self.classes, self.width = list(classes), width
        self.table = TokenTable(len(self.classes) + 1, width)
        self._numbers = {"": NULL} | {name: number + 1 for number, name in enumerate(self.classes)}

    @classmethod
    def from_captions(cls, captions: Sequence[str], width: int, most: int = 10_000) -> ClassLabels:
        """One class for each different caption, in alphabetical order.

        Raises:
            SettingError: more than ``most`` different captions, or none.
        """
        classes = sorted(set(captions) - {""})
        if len(classes) > most:
            raise SettingError(
                f"model.text=labels: {len(classes)} different captions are more than {most} classes; "
                "use model.text=words or clip"
            )
        return cls(classes, width)

    def tokenise(self, captions: Sequence[str]) -> Tensor:
        """Class numbers int64 [len(captions), 1].

        Raises:
            SettingError: a caption that is no class.
        """
        for caption in captions:
            if caption not in self._numbers:
                more = ", …" if len(self.classes) > SHOWN else ""
                raise SettingError(
                    f"caption {caption!r} is not one of the {len(self.classes)} classes of model.text=labels; "
                    f"allowed: {', '.join(self.classes[:SHOWN])}{more}"
                )
        return torch.tensor([self._numbers[caption] for caption in captions], dtype=torch.int64).unsqueeze(1)

    def forward(self, numbers: Tensor) -> TextCondition:
        tokens = self.table(numbers)
        return TextCondition(tokens, torch.ones_like(numbers, dtype=torch.bool), tokens[:, 0])

    def to_dict(self) -> dict[str, Any]:
        return {"name": "labels", "classes": self.classes, "width": self.width}


def _check(classes: Sequence[str], width: int) -> None:
    if width < 1:
        raise SettingError(f"model.text_width={width} must be at least 1")
    if not classes:
        raise SettingError("model.text=labels: there must be at least one class name; every caption is empty")
    seen: set[str] = set()
    for name in classes:
        if not isinstance(name, str) or not name.strip():
            raise SettingError(f"model.text=labels: class names must be text that is not empty, got {name!r}")
        if name in seen:
            raise SettingError(f"model.text=labels: class names must be unique, {name!r} is given twice")
        seen.add(name)
