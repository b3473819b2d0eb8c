"""The judge of an evaluation: described before anything is computed, loaded when it is first asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from eval.judges import Judge, describe, load_judge
from eval.settings import JudgeChoice
from iris.errors import SettingError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Judging:
    """A judge by its settings.

    Raises:
        SettingError: there is none, or its weights are not what they should be.
    """

    choice: JudgeChoice
    device: str = "cpu"

    @property
    def name(self) -> str:
        """As in ``eval.judges.JUDGES``."""
        return self.choice.name

    @cached_property
    def about(self) -> dict[str, Any]:
        """What is known without loading it; see ``eval.judges.describe``."""
        return _told(lambda: describe(**vars(self.choice)))

    def facts(self) -> dict[str, Any]:
        """What determines its features and scores, and nothing of where its weights lie."""
        facts = {"name": self.name, "sha256": self.about["sha256"], "resize": self.about["resize"]}
        return facts | {name: getattr(self.choice, name) for name in ("model", "prefix") if getattr(self.choice, name)}

    @cached_property
    def judge(self) -> Judge:
        """The network.

        Raises:
            SettingError: its weights were exchanged since it was described.
        """
        judge = _told(lambda: load_judge(device=self.device, **vars(self.choice)))
        if judge.sha256 != self.about["sha256"]:
            raise SettingError(
                f"judge {judge.name}: the weights now have sha256 {judge.sha256}, the plan was made with "
                f"{self.about['sha256']}; put those back or start again"
            )
        return judge


def _told(make: Callable[[], Value]) -> Value:
    try:
        return make()
    except SettingError:
        raise
    except (ValueError, OSError) as error:  # weights that are not what they should be, or not readable
        raise SettingError(f"judge: {error}") from error
