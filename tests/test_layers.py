"""Imports of the product's code point downwards, between packages and between folders, and go in no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("iris", "eval", "ablations")
# The rooms of each package from the bottom up. One imports only what stands before it, here or in a package before.
FLOORS = {
    "iris": (
        "errors",
        "settings",
        "randomness",
        "io",
        "nn",
        "latents",
        "text",
        "data",
        "diffusion",
        "model",
        "training",
        "pipeline",
        "presets",
        "stages",
    ),
    "eval": (
        "judges",
        "metrics",
        "speed",
        "targets",
        "results",
        "report",
        "export",
        "models",
        "subjects",
        "settings",
        "stages",
        "evaluate",
        "compare",
    ),
    "ablations": ("conf", "question", "answer", "launch", "track", "report", "session", "verbs", "run"),
}
FACES = ("__main__", "")  # a package's commands and what it exports may name anything in it


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the product."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The product's modules that a file imports, anywhere in it; for a type checker's eyes alone does not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name:
                yield name


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Module -> what it imports."""
    known = modules()
    return {name: set(imported(path, known)) - {name} for name, path in known.items()}


def room(module: str) -> tuple[str, str]:
    """The package and the room of a module; its faces have none."""
    package, _, rest = module.partition(".")
    return package, rest.partition(".")[0]


def height(module: str) -> tuple[int, int]:
    """How high a module's room is."""
    package, name = room(module)
    floors = FLOORS[package]
    if module.endswith("__main__"):  # a command
        return PACKAGES.index(package), len(floors)
    return PACKAGES.index(package), len(floors) if name in FACES else floors.index(name)


def test_every_room_has_a_floor(graph):
    rooms = {room(module) for module in graph}
    assert {name for package, name in rooms if name not in FACES and name not in FLOORS[package]} == set()
    assert {(package, name) for package in PACKAGES for name in FLOORS[package]} <= rooms


def test_imports_point_downwards(graph):
    upwards = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if room(module) != room(other) and height(module) < height(other)
    ]
    assert upwards == []


def test_no_module_is_in_a_circle(graph):
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_inference_imports_nothing_of_training():
    """What makes images is loaded by an application; it brings no optimiser, no loop and nothing that measures."""
    import subprocess
    import sys

    code = "import sys, iris.pipeline; print(*[name for name in sys.modules if name.startswith(('iris.', 'eval', 'ablations'))])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wrong = [n for n in loaded.split() if n.startswith(("iris.training", "iris.stages", "eval", "ablations"))]
    assert wrong == []
