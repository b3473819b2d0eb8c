"""``python -m ablations VERB``: look at trials and keep the runs folder; ``python -m ablations.run`` runs grids."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from rich.console import Console

from iris.errors import SettingError
from iris.io.command import answer_options, failed
from iris.settings import Tree, suggestion

# Verb -> what it does. Each is a module of ablations.verbs.
VERBS = {
    "show": "a trial by its key: settings, state, results, files",
    "diff": "what differs between two trials",
    "gc": "what the runs folder holds, and what may go",
    "sync": "send to MLflow what is missing there",
}
HELP = "\n".join(
    [
        "Look at trials and keep the runs folder; python -m ablations.run runs grids.",
        "",
        *(f"  python -m ablations {verb:6} {text}" for verb, text in VERBS.items()),
        "",
        "python -m ablations VERB --help says more.",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("--help", "-h"):
        print(HELP)
        return 0 if words else 2
    try:
        return obey(words[0], words[1:])
    except SettingError as error:
        return failed(error, 2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def obey(verb: str, words: list[str]) -> int:
    """Run one verb.

    Raises:
        SettingError: a verb, a setting or a number of names that is not allowed.
    """
    if verb not in VERBS:
        raise SettingError(f"{verb!r} is no verb{suggestion(verb, VERBS)}; allowed: {', '.join(VERBS)}")
    module = importlib.import_module(f"ablations.verbs.{verb}")
    tree = Tree(module.Settings, {}, example="runs_dir=runs")
    if answer_options(words, lambda: tree, module.HELP):
        return 0
    names = [word for word in words if "=" not in word]
    settings = tree.build([word for word in words if "=" in word])
    _check_names(verb, names, module)
    return module.run(names, settings, Console())


def _check_names(verb: str, names: list[str], module: ModuleType) -> None:
    fewest, most = module.NAMES
    if len(names) < fewest or (most is not None and len(names) > most):
        usage = next(line.strip() for line in module.HELP.splitlines() if "python -m ablations" in line)
        raise SettingError(f"{verb}: {len(names)} names given; write: {usage}")


if __name__ == "__main__":
    sys.exit(main())
