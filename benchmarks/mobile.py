"""IRIS on a phone's runtimes: seconds, memory by part, and the memory caps under which an image is made.

    python -m benchmarks.mobile work=DIR                                    # everything, then the report
    python -m benchmarks.mobile work=DIR phase=export presets=tiny          # one phase, some of it

The presets at 256x256, 4 steps of 4 and of 8 iterations, no guidance, in PyTorch, ONNX Runtime and ExecuTorch. Weights
are drawn, the text encoder's too, which has CLIP ViT-L/14's shape: that tells cost, not quality. What 8-bit weights do to
quality is measured on the small trained model that is shipped. Phases, each of which goes on where it was stopped:

    export      write the files and compare their images with PyTorch's (minutes to hours, no quiet machine needed)
    mixers      each mixer alone in ExecuTorch, against PyTorch
    coreml      convert to Core ML, where coremltools is installed
    quality     Fréchet distance after 8-bit weights, on the shipped model
    memory      peak memory in fresh processes, whole and by part, and runs under caps
    latency     time, runtimes in turn; on a quiet machine
    report      reports/mobile/: results.csv, report.md, index.html

Words, with their defaults:

    work=               files and rows, several GB; required
    phase=all           one, or several with commas
    presets=tiny,small,base  runtimes=pytorch,onnxruntime,executorch  iterations=4,8
    rounds=10           of latency; threads=0: as many as there are processors
    samples=2000        pictures of quality
    out=reports/mobile
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from eval.speed.workers import Loader
from iris.errors import SettingError, require_choice

STEPS = 4
DTYPES = {"pytorch": ("fp32",), "onnxruntime": ("fp32", "fp16", "int8"), "executorch": ("fp32", "fp16", "int8")}
PRESETS = ("tiny", "small", "base")
PHASES = ("export", "mixers", "coreml", "quality", "memory", "latency", "report")
RESIDENT = ("all", "one part")  # what is loaded at a time


@dataclass(frozen=True)
class Plan:
    """What is measured; see the module.

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
        given: dict[str, Any] = {"work": "", "phase": "all", "threads": "0"}
        for word in words:
            key, equals, value = word.partition("=")
            if not equals:
                raise SettingError(f"{word!r} is not a word of the form name=value")
            require_choice("the name of a word", key, tuple(field.name for field in fields(cls)))
            given[key] = value
        if not given["work"]:
            raise SettingError("work=DIR is needed: a folder for several GB of files")
        values = {name: _read(name, value) for name, value in given.items()}
        if values["phase"] == ("all",):
            values["phase"] = PHASES
        values["threads"] = values["threads"] or os.cpu_count() or 1
        return cls(**values)

    def setups(self) -> list[Setup]:
        """All that is measured, preset by preset."""
        return [
            Setup(self.work, preset, runtime, dtype, iterations)
            for preset in self.presets
            for iterations in self.iterations
            for runtime in self.runtimes
            for dtype in DTYPES[runtime]
        ]


def _read(name: str, value: str) -> Any:
    if name in ("work", "out"):
        return Path(value).expanduser()
    try:
        if name == "iterations":
            return tuple(int(one) for one in value.split(","))
        return int(value) if name in ("rounds", "threads", "samples") else tuple(value.split(","))
    except ValueError:
        raise SettingError(f"{name}={value} must be a whole number") from None


@dataclass(frozen=True)
class Setup:
    """One preset in one runtime and precision, at one number of iterations."""

    work: Path
    preset: str
    runtime: str
    dtype: str
    iterations: int

    def __str__(self) -> str:
        return f"{self.preset}-{self.runtime}-{self.dtype}-{self.iterations}"

    @property
    def folder(self) -> Path:
        """Where its exported files are. A file of ONNX Runtime has its number of iterations in it."""
        name = f"onnx-{self.iterations}" if self.runtime == "onnxruntime" else self.runtime
        return self.work / self.preset / name

    def loader(self, resident: str = "all") -> Loader:
        """How a measuring process gets it."""
        if self.runtime == "pytorch":
            return Loader(
                "eval.models.loading:load_for_measuring",
                {"preset": self.preset, "steps": STEPS, "iterations": self.iterations, "resident": resident},
            )
        given = {"folder": str(self.folder), "dtype": self.dtype, "steps": STEPS}
        if resident != "all":
            given["keep"] = []
        if self.runtime == "onnxruntime":
            lean = {} if resident == "all" else {"prepack": False}
            return Loader("eval.export.ort_measuring:load_for_measuring", given | {"guidance": 1.0} | lean)
        return Loader("eval.export.executorch_measuring:load_for_measuring", given | {"iterations": self.iterations})


def phases() -> dict[str, Callable[[Plan], None]]:
    """What does each phase; imported here, since each brings libraries that take seconds."""
    from benchmarks import mobile_export, mobile_measure, mobile_report

    return {
        "export": mobile_export.export,
        "mixers": mobile_export.mixers,
        "coreml": mobile_export.coreml,
        "quality": mobile_measure.quality,
        "memory": mobile_measure.memory,
        "latency": mobile_measure.latency,
        "report": mobile_report.write_report,
    }


def main(words: Sequence[str] | None = None) -> None:
    """Run the phases of a command line; bad input ends it with one line."""
    try:
        plan = Plan.of(sys.argv[1:] if words is None else words)
        todo = phases()
        for name in PHASES:
            if name in plan.phase:
                todo[name](plan)
    except SettingError as error:
        raise SystemExit(f"python -m benchmarks.mobile: {error}") from None


if __name__ == "__main__":
    main()
