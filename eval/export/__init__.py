"""A model as files for phone runtimes, and what makes images of them. Importing this package imports neither torch nor a
runtime.

An exported model is a folder: pipeline.json says what it is and names the files of its parts, which lie beside it
(``eval.export.model.export_model`` writes it, ``eval.export.host`` runs it). Adding a runtime is a module here that writes
a part, one in ``host`` that runs it, and a line in ``RUNTIMES`` and in the tables that name both.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from iris.errors import SettingError
from iris.settings import check, setting

# Runtime -> precisions. A model in PyTorch is not exported: it computes in ``DTYPES[precision]``.
RUNTIMES = {
    "pytorch": ("fp32", "bf16", "fp16"),
    "onnx": ("fp32", "fp16", "int8"),
    "executorch": ("fp32", "fp16", "int8"),
}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}  # as torch names them
EXTRAS = {"onnx": "export", "executorch": "executorch"}  # of this project, which bring the runtime
PIPELINE = "pipeline.json"
PARTS = ("text", "generator", "decoder")


@dataclass(frozen=True)
class Runtime:
    """Settings runtime.*: what a model runs in.

    Attributes:
        name: pytorch, onnx (ONNX Runtime) or executorch (with XNNPACK).
        precision: of weights and computation. int8: weights of linear layers in 8 bits, their inputs quantised as they
            come; the rest in float32.

    Raises:
        SettingError: an unknown runtime, or a precision that it has not.
    """

    name: str = setting("pytorch", "onnx: ONNX Runtime; executorch: with XNNPACK", choices=tuple(RUNTIMES))
    precision: str = setting("fp32", "of weights and computation", choices=tuple(DTYPES))

    def __post_init__(self) -> None:
        check(self, "runtime")
        if self.precision not in RUNTIMES[self.name]:
            having = " or ".join(name for name, precisions in RUNTIMES.items() if self.precision in precisions)
            raise SettingError(
                f"runtime.precision={self.precision} needs runtime.name={having}; runtime.name={self.name} has "
                f"{', '.join(RUNTIMES[self.name])}"
            )


def module_of(runtime: str, name: str) -> ModuleType:
    """The module ``name``, which needs the runtime's optional packages.

    Raises:
        SettingError: one of them is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SettingError(
            f"runtime.name={runtime} needs {error.name}, which is not installed: uv sync --extra {EXTRAS[runtime]}"
        ) from error
