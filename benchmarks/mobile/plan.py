"""What ``benchmarks.mobile`` is asked for, and the setups that it measures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from eval.export import RUNTIMES
from eval.speed.workers import Loader
from iris.errors import SettingError, require_choice
from iris.io.files import write_json

STEPS = 4
DTYPES = RUNTIMES | {"pytorch": ("fp32",)}  # half precision is many times slower there on a processor
RUNTIME_NAMES = {"pytorch": "PyTorch", "onnx": "ONNX Runtime", "executorch": "ExecuTorch"}
PRESETS = ("tiny", "small", "base")
PHASES = ("export", "mixers", "coreml", "quality", "memory", "latency", "report")
RESIDENT = ("all", "one part")  # what is loaded at a time


@dataclass(frozen=True)
class Setup:
    """One preset in one runtime and precision, at one number of iterations."""

    preset: str
    runtime: str
    dtype: str
    iterations: int

    @classmethod
    def of(cls, row: dict[str, Any]) -> Setup:
        """That of a measured row."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    def __str__(self) -> str:
        return f"{self.preset}-{self.runtime}-{self.dtype}-{self.iterations}"

    def __lt__(self, other: Setup) -> bool:
        return self._order < other._order

    @property
    def _order(self) -> tuple[int, ...]:
        """As the tables show it."""
        dtypes = DTYPES[self.runtime]
        return PRESETS.index(self.preset), self.iterations, list(DTYPES).index(self.runtime), dtypes.index(self.dtype)

    @property
    def name(self) -> str:
        """Runtime and precision."""
        return f"{RUNTIME_NAMES[self.runtime]} {self.dtype}"

    @property
    def label(self) -> str:
        """All of it, as a table's row is called."""
        return f"{self.preset}, {self.name}, ×{self.iterations}"

    def at(self, iterations: int) -> Setup:
        """The same at another number of iterations."""
        return replace(self, iterations=iterations)

    def about(self) -> dict[str, Any]:
        """Its names as values of a row."""
        return asdict(self)

    def folder(self, work: Path) -> Path:
        """Where it is exported to. A file of ONNX Runtime has its number of iterations in it."""
        name = f"{self.runtime}-{self.dtype}"
        return work / self.preset / (f"{name}-{self.iterations}" if self.runtime == "onnx" else name)

    def loader(self, work: Path, resident: str = "all") -> Loader:
        """How a measuring process gets it."""
        given = {"steps": STEPS, "iterations": self.iterations, "guidance": 1.0, "resident": resident}
        if self.runtime == "pytorch":
            return Loader("eval.models.loading:load_for_measuring", given | {"preset": self.preset})
        return Loader("eval.export.measuring:load_for_measuring", given | {"folder": str(self.folder(work))})


@dataclass(frozen=True)
class Plan:
    """What is measured; see ``benchmarks.mobile.__main__``.

    Raises:
        SettingError: an unknown name, or a number that cannot be used.
    """

    work: Path
    phase: tuple[str, ...] = PHASES
    presets: tuple[str, ...] = PRESETS
    runtimes: tuple[str, ...] = tuple(DTYPES)
    iterations: tuple[int, ...] = (4, 8)
    rounds: int = 10
    threads: int = 0
    samples: int = 2000
    out: Path = Path("reports/mobile")

    def __post_init__(self) -> None:
        for name, allowed in (("phase", PHASES), ("presets", PRESETS), ("runtimes", tuple(DTYPES))):
            for value in getattr(self, name):
                require_choice(name, value, allowed)
        for name, least in (("rounds", 2), ("threads", 1), ("samples", 100)):
            if getattr(self, name) < least:
                raise SettingError(f"{name}={getattr(self, name)} must be at least {least}")
        if not self.iterations or min(self.iterations) < 1:
            raise SettingError(f"iterations={self.iterations} must be whole numbers of at least 1")

    @classmethod
    def of(cls, words: Sequence[str]) -> Plan:
        """The plan of a command line."""
        given = {"phase": "all", "threads": "0"}
        for word in words:
            key, equals, value = word.partition("=")
            if not equals:
                raise SettingError(f"{word!r} is not a word of the form name=value")
            require_choice("the name of a word", key, tuple(field.name for field in fields(cls)))
            given[key] = value
        if not given.get("work"):
            raise SettingError("work=DIR is needed: a folder for several GB of files")
        values = {name: _read(name, value) for name, value in given.items()}
        if values["phase"] == ("all",):
            values["phase"] = PHASES
        values["threads"] = values["threads"] or os.cpu_count() or 1
        return cls(**values)

    def setups(self) -> list[Setup]:
        """All that is measured, preset by preset."""
        return [
            Setup(preset, runtime, dtype, iterations)
            for preset in self.presets
            for iterations in self.iterations
            for runtime in self.runtimes
            for dtype in DTYPES[runtime]
        ]

    def row(self, name: str) -> Path:
        """Where the measurement called ``name`` is a JSON file."""
        return self.work / "rows" / f"{name}.json"

    def once(self, name: str, make: Callable[[], Any]) -> None:
        """Write what ``make`` gives as row ``name``, unless it is there."""
        path = self.row(name)
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        write_json(path, make())
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


def _read(name: str, value: str) -> Any:
    if name in ("work", "out"):
        return Path(value).expanduser()
    try:
        if name == "iterations":
            return tuple(int(one) for one in value.split(","))
        return int(value) if name in ("rounds", "threads", "samples") else tuple(value.split(","))
    except ValueError:
        raise SettingError(f"{name}={value} must be a whole number") from None
