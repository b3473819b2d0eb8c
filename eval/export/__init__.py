"""A model as files for phone runtimes. Importing this package imports neither torch nor a runtime."""

from __future__ import annotations

from dataclasses import dataclass

from iris.errors import SettingError
from iris.settings import setting

# Runtime -> precisions. A model in PyTorch is not exported: it computes in ``DTYPES[precision]``.
RUNTIMES = {
    "pytorch": ("fp32", "bf16", "fp16"),
    "onnx": ("fp32", "fp16", "int8"),
    "executorch": ("fp32", "fp16", "int8"),
}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Settings runtime.*: what a model runs in."""

    name: str = setting("pytorch", "onnx: ONNX Runtime", choices=tuple(RUNTIMES))
    precision: str = setting("fp32", "of weights and computation", choices=tuple(DTYPES))

    def __post_init__(self) -> None:
        if self.precision not in RUNTIMES[self.name]:
            having = " or ".join(name for name, precisions in RUNTIMES.items() if self.precision in precisions)
            raise SettingError(
                f"runtime.precision={self.precision} needs runtime.name={having}; runtime.name={self.name} has "
                f"{', '.join(RUNTIMES[self.name])}"
            )
