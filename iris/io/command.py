"""What the commands share: their options, and a mistake told in one line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from iris.errors import SettingError
from iris.io.masking import masked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from iris.settings import Tree


def answer_options(words: list[str], tree: Callable[[], Tree], text: str) -> bool:
    """Answer ``--help``, ``--help GROUP`` and ``--cfg job``, the last with the other words composed.

    Args:
        words: of the command line.
        tree: the command's settings, made only if they are asked for.
        text: what ``--help`` says before the groups.

    Returns:
        whether one of them was there.

    Raises:
        SettingError: another option, or settings that cannot be composed.
    """
    for index, word in enumerate(words):
        if word in ("--help", "-h"):
            told = "\n".join(tree().explain(words[index + 1]) if words[index + 1 :] else [text, *tree().overview()])
            print(told)
            return True
        if word in ("--cfg", "-c") or word.startswith("--cfg="):
            what = word.partition("=")[2] or (words[index + 1] if index + 1 < len(words) else "")
            if what != "job":
                raise SettingError(f"--cfg {what}: only 'job' is there to be shown")
            rest = words[:index] + words[index + (1 if "=" in word else 2) :]
            print(masked(tree().dump(tree().compose(rest))), end="")
            return True
        if word.startswith("-"):
            raise SettingError(f"{word} is no option; allowed: --help, --help GROUP, --cfg job, and key=value settings")
    return False


def failed(error: Exception | str, code: int, who: str = "") -> int:
    """Say why in one line; returns the code. ``who``: which of several processes says it."""
    print(f"error{who}: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def written(words: Sequence[str], module: str) -> str:
    """A command line as a shell takes it, without passwords."""
    import shlex

    return shlex.join(["python", "-m", module, *map(masked, words)])
