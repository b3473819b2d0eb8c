"""Parts as ExecuTorch programs for the XNNPACK backend, in float32, float16, or with 8-bit weights.

What version 1.5.1 cannot do, or does otherwise than PyTorch, and what is done about it:

- Complex tensors have no kernel (``aten.complex`` is rejected): the Fourier transform is a product with real matrices.
- LayerNorm in half precision is wrong from 256 channels up, without a word: it is computed in float32.
- XNNPACK computes the tanh form of GELU as the erf form, 1.5e-4 of the output away: within what is allowed, so it stays.
- Quantising a whole graph fails (static: when it runs, dynamic: when it is lowered): linear layers alone are quantised.
- A quantised linear layer on a convolution's permuted output cannot be lowered ("Weight and Input should both be
  quantized"): linear layers on a grid that are quantised work on rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from executorch.exir import EdgeProgramManager, to_edge_transform_and_lower
from torch import Tensor, nn
from torch.export import ExportedProgram, export
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from eval.export.host.executorch import load_library
from eval.export.parts import ExportPart, GeneratorPart, export_friendly
from eval.export.passes import generator_in_passes

LIBRARIES = ("executorch", "torch", "torchao")  # whose versions the files depend on


def write_part(part: ExportPart, precision: str, folder: Path) -> dict[str, Any]:
    """Write ``<part>.pte``. A generator with a shared core has the methods "start", "pass" and "read", which serve any
    number of iterations; all else has one, "forward".

    fp16: weights and activations, but for what the modules compute in float32 (norms, recurrence, transforms, times).
    int8: the weights of linear layers but the part's ``precise`` ones, a scale for each output, their inputs quantised as
    they come (dynamic); the rest stays float32.

    Args:
        part: of ``parts_of``.
        precision: fp32, fp16 or int8.
        folder: that is there.

    Returns:
        {"file", "methods": {name: see ``ExportPart.signature`` and ``operators_of``, and "planned_bytes": what the program
        plans for activations, without XNNPACK's scratch memory}}.

    Raises:
        SettingError: what it takes to run the file, which a check will, is not there.
    """
    load_library()  # now, not after the minutes that lowering takes
    methods, path = methods_of(part), folder / f"{part.name}.pte"
    edge = lower(methods, precision)
    operators = {name: operators_of(edge.exported_program(name)) for name in methods}
    program = edge.to_executorch()  # which changes what ``edge`` holds
    with path.open("wb") as file:
        program.write_to_file(file)
    plans = {plan.name: plan for plan in program.executorch_program.execution_plan}
    planned = {name: {"planned_bytes": sum(plans[name].non_const_buffer_sizes)} for name in methods}
    return {
        "file": path.name,
        "methods": {name: one.signature() | operators[name] | planned[name] for name, one in methods.items()},
    }


def methods_of(part: ExportPart) -> dict[str, ExportPart]:
    """The functions that ``part`` is exported as, by name: one, or of a generator with a shared core its three passes."""
    if isinstance(part.module, GeneratorPart) and part.module.generator.config.depth.share:
        return {one.name: one for one in generator_in_passes(part)}
    return {"forward": part}


def lower(methods: Mapping[str, ExportPart], precision: str = "fp32") -> EdgeProgramManager:
    """Trace each of ``methods`` and hand to XNNPACK what it takes; the rest is left to ExecuTorch's portable kernels."""
    traced = {}
    with export_friendly():
        for name, part in methods.items():
            given = _half(part) if precision == "fp16" else part
            program = export(given.module, given.inputs)
            traced[name] = _quantised(program, part) if precision == "int8" else program
    return to_edge_transform_and_lower(traced, partitioner=[XnnpackPartitioner()])


class WideLayerNorm(nn.Module):
    """``norm`` computed in float32, whatever comes in."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.shape, self.eps, self.weight, self.bias = norm.normalized_shape, norm.eps, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.shape, weight, bias, self.eps).to(x.dtype)


def _half(part: ExportPart) -> ExportPart:
    """The part in float16, in which every LayerNorm computes in float32."""
    half = part.to(torch.float16)
    for parent in list(half.module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(parent, name, WideLayerNorm(child))
    return half


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
        if made.dim() != 4:  # text: rows would have strides in one trace that the next one has not
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
