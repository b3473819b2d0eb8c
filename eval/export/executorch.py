"""Parts as ExecuTorch programs for the XNNPACK backend, in float32, float16, or with 8-bit weights; each compared with PyTorch.

What version 1.5.1 cannot do, or does otherwise than PyTorch, and what is done about it:

- Complex tensors have no kernel (``aten.complex`` is rejected): the Fourier transform is a product with real matrices.
- LayerNorm in half precision is wrong from 256 channels up, without a word: it is computed in float32.
- XNNPACK computes the tanh form of GELU as the erf form, 1.5e-4 of the output away: within what is allowed, so it stays.
- Quantising a whole graph fails (static: when it runs, dynamic: when it is lowered): linear layers alone are quantised.
- A quantised linear layer on a convolution's permuted output cannot be lowered ("Weight and Input should both be
  quantized"): linear layers that are quantised work on rows.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from executorch.exir import EdgeProgramManager, ExecutorchProgramManager, to_edge_transform_and_lower
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime
from torch import Tensor, nn
from torch.export import ExportedProgram, export
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from eval.export.executorch_host import progress_of, run_in_passes
from eval.export.parts import Cast, ExportPart, GeneratorPart, export_friendly
from eval.export.passes import generator_in_passes, least_passes
from iris.errors import SettingError, require_choice
from iris.io.files import write_json

DTYPES = ("fp32", "fp16", "int8")
MANIFEST = "manifest.json"
WHOLE = "forward"  # the method of a part that is one function
IN_FLOAT32 = ("t", "progress")  # times: half precision would make 0.999 a 1


def export_executorch(
    parts: Mapping[str, ExportPart],
    folder: Path | str,
    dtypes: str | Sequence[str] = "fp32",
    scan: str = "doubling",
    passes: bool = True,
) -> dict[str, Any]:
    """Write each part in each of ``dtypes`` to ``folder`` as ``<part>.<dtype>.pte``.

    fp16: weights and activations, but for what the modules compute in float32 (norms, recurrence, transforms, times).
    int8: the weights of linear layers but the part's ``precise`` ones, a scale for each output, their inputs quantised as
    they come (dynamic); the rest stays float32.

    Args:
        parts: of ``parts_of``.
        folder: made if it is missing; files and manifest entries of other parts and dtypes in it stay.
        dtypes: fp32, fp16 or int8, one or several.
        scan: of ``export_friendly``.
        passes: a generator with a shared core is one file with the methods "start", "pass" and "read", which serves any
            number of iterations; False, or a core that is not shared: one method, its passes unrolled.

    Returns:
        the manifest, which is also written to manifest.json: {"versions": …, "files": [{"part", "dtype", "file",
        "bytes", "sha256", "methods": {name: {"delegates", "undelegated" (operator -> count), "planned_bytes", "inputs",
        "outputs" (name -> shape and dtype)}}, "least_passes" (of a loop, see ``progress_of``), "agreement"}, …]}.
        ``planned_bytes`` is what the program plans for activations, without XNNPACK's scratch memory.

    Raises:
        SettingError: an unknown dtype or scan.
        ValueError: no parts or dtypes, or a part whose output is not finite.
    """
    dtypes = (dtypes,) if isinstance(dtypes, str) else tuple(dtypes)
    if not parts or not dtypes:
        raise ValueError("export_executorch needs at least one part and one dtype")
    for dtype in dtypes:
        require_choice("export.dtype", dtype, DTYPES)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {}
    for part in parts.values():
        methods = methods_of(part, passes)
        for dtype in dtypes:
            path = folder / f"{part.name}.{dtype}.pte"
            edge = lower(methods, dtype, scan)
            operators = {name: operators_of(edge.exported_program(name)) for name in methods}
            program = edge.to_executorch()  # which changes what ``edge`` holds
            with path.open("wb") as file:
                program.write_to_file(file)
            manifest = _record(folder, _entry(part, dtype, path, methods, operators, program))
    return manifest


def methods_of(part: ExportPart, passes: bool = True) -> dict[str, ExportPart]:
    """The functions that ``part`` is exported as, by name: one, or of a generator with a shared core its three passes."""
    if passes and isinstance(part.module, GeneratorPart) and part.module.generator.config.depth.share:
        return {one.name: one for one in generator_in_passes(part)}
    return {WHOLE: part}


def lower(methods: Mapping[str, ExportPart], dtype: str = "fp32", scan: str = "doubling") -> EdgeProgramManager:
    """Trace each of ``methods`` and hand to XNNPACK what it takes; the rest is left to ExecuTorch's portable kernels."""
    require_choice("export.dtype", dtype, DTYPES)
    if dtype == "fp16":
        half = {id(part.module): _half(part.module) for part in methods.values()}
        methods = {name: _cast(part, half[id(part.module)]) for name, part in methods.items()}
    traced = {}
    with export_friendly(scan):
        for name, part in methods.items():
            program = export(part.module, part.inputs)
            traced[name] = _quantised(program, part) if dtype == "int8" else program
    return to_edge_transform_and_lower(traced, partitioner=[XnnpackPartitioner()])


class Program:
    """A .pte file in ExecuTorch's Python runtime, read from the file, which is more stable there than from bytes.

    Raises:
        SettingError: no such file.
    """

    def __init__(self, path: Path | str, threads: int | None = None) -> None:
        """``threads``: of all programs of this process, since they share one pool (None: as it is)."""
        if not Path(path).is_file():
            raise SettingError(f"program={path} is not a file; export_executorch writes one")
        if threads is not None:
            portable_lib._unsafe_reset_threadpool(threads)
        self._program = Runtime.get().load_program(Path(path))  # methods do not keep it alive
        self.methods = tuple(sorted(self._program.method_names))

    def run(self, method: str, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Outputs of ``method``, in memory of their own."""
        require_choice("method", method, self.methods)
        return tuple(y.clone() for y in self._program.load_method(method).execute([x.contiguous() for x in inputs]))


def run_file(path: Path | str, part: ExportPart, passes: bool = True) -> tuple[Tensor, ...]:
    """Outputs of an exported file of ``part`` on the part's inputs; ``passes`` as it was exported with."""
    program, methods = Program(path), methods_of(part, passes)
    if WHOLE in methods:
        return program.run(WHOLE, part.inputs)

    def run(name: str, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = program.run(name, [known[given] for given in methods[name].input_names])
        return dict(zip(methods[name].output_names, outputs, strict=True))

    progress = progress_of(part.module.iterations, least_passes(part.module.generator.config))
    inputs = dict(zip(part.input_names, part.inputs, strict=True))
    return (run_in_passes(run, inputs, [torch.tensor([done]) for done in progress]),)


def agreement(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """Distance from PyTorch's float32 outputs, of several the worst.

    "rms": root mean square of the difference over that of what is expected; "max": largest over largest.

    Raises:
        ValueError: outputs that are not finite, or of which PyTorch's are all zero.
    """
    worst = {"rms": 0.0, "max": 0.0}
    for got, wanted in zip(outputs, expected, strict=True):
        got, wanted = got.double(), wanted.double()
        if not (got.isfinite().all() and wanted.isfinite().all() and wanted.any()):
            raise ValueError("outputs must be finite and PyTorch's not all zero to be compared")
        difference = got - wanted
        worst["rms"] = max(worst["rms"], float(difference.norm() / wanted.norm()))
        worst["max"] = max(worst["max"], float(difference.abs().max() / wanted.abs().max()))
    return worst


class WideLayerNorm(nn.Module):
    """``norm`` computed in float32, whatever comes in."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.shape, self.eps, self.weight, self.bias = norm.normalized_shape, norm.eps, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.shape, weight, bias, self.eps).to(x.dtype)


def _half(module: nn.Module) -> nn.Module:
    """A float16 copy in which every LayerNorm computes in float32."""
    module = copy.deepcopy(module).to(torch.float16)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(parent, name, WideLayerNorm(child))
    return module


def _cast(part: ExportPart, half: nn.Module) -> ExportPart:
    kept = [number for number, name in enumerate(part.input_names) if name in IN_FLOAT32]
    return replace(part, module=Cast(half, torch.float16, kept).eval())


def _quantised(program: ExportedProgram, part: ExportPart) -> ExportedProgram:
    """``program`` with 8-bit weights in the linear layers of ``part``, and their inputs in 8 bits with a scale of their own."""
    layers = {f"{name}.weight" for name, layer in part.module.named_modules() if isinstance(layer, nn.Linear)}
    layers -= set(part.precise)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
    quantizer.set_filter_function(
        lambda node: node.target is torch.ops.aten.linear.default and node.args[1].target in layers
    )
    prepared = prepare_pt2e(_on_rows(program.module()), quantizer)
    prepared(*part.inputs)
    return export(convert_pt2e(prepared), part.inputs)


def _on_rows(traced: GraphModule) -> GraphModule:
    """The same with linear layers that work on rows [B h w, D] where they did on [B, h, w, D]."""
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        given, made = node.args[0], node.meta["val"]
        if made.dim() <= 2:
            continue
        with traced.graph.inserting_before(node):
            rows = traced.graph.call_function(
                torch.ops.aten.reshape.default, (given, [-1, given.meta["val"].shape[-1]])
            )
        with traced.graph.inserting_after(node):
            grid = traced.graph.call_function(torch.ops.aten.reshape.default, (node, list(made.shape)))
        node.replace_all_uses_with(grid, delete_user_cb=lambda user, grid=grid: user is not grid)
        node.replace_input_with(given, rows)
        rows.meta["val"], grid.meta["val"] = given.meta["val"].flatten(0, -2), made
        node.meta["val"] = made.flatten(0, -2)
    traced.recompile()
    return traced


def _entry(
    part: ExportPart,
    dtype: str,
    path: Path,
    methods: Mapping[str, ExportPart],
    operators: Mapping[str, dict[str, Any]],
    program: ExecutorchProgramManager,
) -> dict[str, Any]:
    plans = {plan.name: plan for plan in program.executorch_program.execution_plan}
    outputs = run_file(path, part, WHOLE not in methods)
    looped = {} if WHOLE in methods else {"least_passes": least_passes(part.module.generator.config)}
    return {
        "part": part.name,
        "dtype": dtype,
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "methods": {
            name: operators[name]
            | {
                "planned_bytes": sum(plans[name].non_const_buffer_sizes),
                "inputs": _shapes(one.input_names, one.inputs),
                "outputs": _shapes(one.output_names, one.outputs()),
            }
            for name, one in methods.items()
        },
        **looped,
        "agreement": agreement(outputs, part.outputs()),
    }


def _shapes(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Any]:
    return {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in zip(names, tensors, strict=True)
    }


def operators_of(program: ExportedProgram) -> dict[str, Any]:
    """How many subgraphs XNNPACK took, and the operators that it left."""
    found = Counter(_name(node.target) for node in program.graph.nodes if node.op == "call_function")
    delegates = found.pop("executorch_call_delegate", 0)
    found.pop("getitem", None)
    return {"delegates": delegates, "undelegated": dict(found.most_common())}


def _name(target: Any) -> str:
    """Such as "aten.mean.dim"."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return target.__name__
    return ".".join(filter(None, (schema.name.replace("::", "."), schema.overload_name)))


def _record(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """The folder's manifest with ``entry`` in the place of an older one for the same part and dtype."""
    path, files = folder / MANIFEST, []
    if path.exists():
        files = json.loads(path.read_text())["files"]
    files = [old for old in files if (old["part"], old["dtype"]) != (entry["part"], entry["dtype"])] + [entry]
    manifest = {
        "runtime": "executorch",
        "backend": "xnnpack",
        "versions": {name: version(name) for name in ("executorch", "torch", "torchao")},
        "files": sorted(files, key=lambda one: (one["part"], one["dtype"])),
    }
    write_json(path, manifest)
    return manifest
