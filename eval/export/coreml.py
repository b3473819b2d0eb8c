"""Does a part convert to Core ML? On Linux coremltools converts and cannot run: what is told is "converted", not "works".

With fp16 Core ML computes all of it in half precision, also what the modules compute in float32 (norms, recurrence,
transforms), where a floor of 1e-12 is 0: agreement on a device has to be seen before fp16 is used.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import coremltools as ct
import torch
from torch._decomp import get_decompositions  # no public name in torch 2.15
from torch.export import export

from eval.export.parts import ExportPart, export_friendly
from iris.errors import require_choice

PRECISIONS = {"fp32": ct.precision.FLOAT32, "fp16": ct.precision.FLOAT16}
TARGET = ct.target.iOS17


def select_scatter(x: torch.Tensor, source: torch.Tensor, dim: int, index: int) -> torch.Tensor:
    """x with ``source`` at one index of an axis; coremltools 9.0 refuses a source whose values are written as integers."""
    places = torch.arange(x.shape[dim]).reshape([-1 if axis == dim else 1 for axis in range(x.dim())])
    return torch.where(places == index % x.shape[dim], source.unsqueeze(dim).to(x.dtype), x)


# coremltools 9.0 does not know the first two.
DECOMPOSED = get_decompositions([torch.ops.aten.addcmul, torch.ops.aten.lerp]) | {
    torch.ops.aten.select_scatter.default: select_scatter
}


@dataclass(frozen=True)
class Conversion:
    """What became of one part.

    Attributes:
        part: its name.
        dtype: fp32 or fp16, of weights and computation.
        converted: a model was made. It was not run: Core ML's runtime is a part of macOS and iOS.
        why: what the converter said when it failed, "" otherwise.
        operations: operation of the ML program -> count, constants left out.
        size: bytes of the .mlpackage.
        coremltools: version.
    """

    part: str
    dtype: str
    converted: bool
    why: str
    operations: dict[str, int]
    size: int
    coremltools: str

    @property
    def status(self) -> str:
        """In words."""
        return "converted, not run" if self.converted else f"not converted: {self.why}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"status": self.status}


def convert_coreml(part: ExportPart, dtype: str = "fp16", folder: Path | None = None) -> Conversion:
    """Convert a part of ``parts_of`` to an ML program.

    Args:
        part: with float32 weights; masks, of which Core ML has no inputs, become float inputs of 0 and 1.
        dtype: fp32 or fp16.
        folder: keeps ``<part>.<dtype>.mlpackage``; None: it is only checked.

    Raises:
        SettingError: another dtype.
    """
    require_choice("runtime.precision", dtype, tuple(PRECISIONS))
    try:
        model = _convert(part, dtype)
    except Exception as error:  # the converter has no class of its own for what it does not know
        why = " ".join(f"{type(error).__name__}: {error}".split())
        return Conversion(part.name, dtype, False, why, {}, 0, ct.__version__)
    with tempfile.TemporaryDirectory() as scratch:
        path = (folder or Path(scratch)) / f"{part.name}.{dtype}.mlpackage"
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save(str(path))
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Conversion(part.name, dtype, True, "", _operations(model), size, ct.__version__)


def _convert(part: ExportPart, dtype: str) -> ct.models.MLModel:
    with export_friendly():
        program = export(_FloatMasks(part), _as_floats(part.inputs)).run_decompositions(DECOMPOSED)
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
        node.replace_all_uses_with(node.args[0])  # nothing is written in place
        program.graph.erase_node(node)
    return ct.convert(
        program,
        convert_to="mlprogram",
        compute_precision=PRECISIONS[dtype],
        minimum_deployment_target=TARGET,
        skip_model_load=True,
    )


class _FloatMasks(torch.nn.Module):
    """The part's module with masks as numbers."""

    def __init__(self, part: ExportPart) -> None:
        super().__init__()
        self.module, self.masks = part.module, [x.dtype == torch.bool for x in part.inputs]

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        answer = self.module(*(x > 0.5 if mask else x for x, mask in zip(inputs, self.masks, strict=True)))
        if isinstance(answer, tuple):
            return tuple(y.float() if y.dtype == torch.bool else y for y in answer)
        return answer


def _as_floats(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(x.float() if x.dtype == torch.bool else x for x in inputs)


def _operations(model: ct.models.MLModel) -> dict[str, int]:
    program = model.get_spec().mlProgram
    counts = Counter(
        operation.type
        for function in program.functions.values()
        for block in function.block_specializations.values()
        for operation in block.operations
    )
    counts.pop("const", None)
    return dict(counts.most_common())
