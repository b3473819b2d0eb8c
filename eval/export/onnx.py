"""Parts as ONNX files for ONNX Runtime, in float32, float16 or with 8-bit weights."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnx_ir.passes import Sequential, common
from onnxruntime.quantization import QuantType, quantize_dynamic

from eval.export.loop import looped
from eval.export.parts import ExportPart, export_friendly

LIBRARIES = ("onnx", "onnxruntime", "torch")  # whose versions the files depend on
OPSET = 20
INTEGER_PRODUCT = "MatMulInteger"


def write_part(part: ExportPart, precision: str, folder: Path) -> dict[str, Any]:
    """Write ``<part>.onnx``, its weights in a .data file beside it; passes through a shared core become one ONNX Scan.

    fp16: weights and activations, except what the modules compute in float32: norms, recurrence, transforms, times.
    int8: the weights of linear layers, 8 bits a number with a scale a channel, and their inputs, quantised as they come
    (dynamic). Convolutions, the recurrence's gates, spectral networks and the constant matrices stay in float32.

    Args:
        part: of ``parts_of``.
        precision: fp32, fp16 or int8.
        folder: that is there.

    Returns:
        {"file", "methods" ({"forward": see ``ExportPart.signature``}), "opset", "nodes", "products" (operation -> count, of
        MatMul, Gemm and MatMulInteger)}.

    Raises:
        onnx.checker.ValidationError: the file is not valid.
    """
    given, path = looped(part), folder / f"{part.name}.onnx"
    if precision == "int8":
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            quantise(save(to_graph(given), Path(scratch) / path.name), path, precise_weights(given))
    else:
        save(to_graph(given.to(torch.float16) if precision == "fp16" else given), path)
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    counts = Counter(node.op_type for node, _ in walk(model.graph))
    return {
        "file": path.name,
        "methods": {"forward": part.signature()},
        "opset": {opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        "nodes": counts.total(),
        "products": {kind: counts[kind] for kind in ("MatMul", "Gemm", INTEGER_PRODUCT)},
    }


def to_graph(part: ExportPart, scan: str = "doubling") -> onnx_ir.Model:
    """The part as an optimised ONNX graph."""
    # By default dynamo makes sizes that differ between two calls free, in a loop's body too; shapes are static here.
    with export_friendly(scan), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        program = torch.onnx.export(
            part.module,
            part.inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(part.input_names),
            output_names=list(part.output_names),
            verbose=False,
        )
    return program.model


def save(graph: onnx_ir.Model, path: Path) -> Path:
    """Write a graph, and all weights to a file that a runtime can map instead of reading; returns ``path``.

    What the exporter notes about each operation takes more space than the operations; it is left out.
    """
    clean = Sequential(
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
    )
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    onnx_ir.save(clean(graph).model, path, external_data=f"{path.name}.data")
    return path


def precise_weights(part: ExportPart) -> list[np.ndarray]:
    """The weights of ``part`` that keep their precision; not every generator has each."""
    weights = dict(part.module.named_parameters())
    return [weights[name].detach().numpy() for name in part.precise if name in weights]


def quantise(source: Path, path: Path, precise: Sequence[np.ndarray] = ()) -> Path:
    """Write ``source``, a float32 file, with 8-bit weights in its linear layers except ``precise``; returns ``path``.

    Weights are unsigned: ONNX Runtime's products of signed ones saturate on x86 processors without VNNI, where images of
    the shipped model came out 9.8 of 255 off (root mean square), against 1.5.
    """
    names = linear_layers(onnx.load(source), precise)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / "quantised.onnx"
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)  # it advises to optimise first, which is done
        try:
            quantize_dynamic(
                source,
                made,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                weight_type=QuantType.QUInt8,
                nodes_to_quantize=[*names, *(f"{name}_MatMul" for name in names)],  # what it makes of a Gemm
                extra_options={"EnableSubgraph": True},
            )
        finally:
            root.setLevel(level)
        return save(onnx_ir.load(made), path)


def linear_layers(model: onnx.ModelProto, precise: Sequence[np.ndarray] = ()) -> list[str]:
    """Names of the products x W with a constant matrix W, in all graphs, W none of ``precise``.

    That is nn.Linear and nothing else: the recurrence's gates and spectral networks are block-diagonal, hence stacks of
    matrices, and Fourier transform, cosine transform and decay are products with a constant on the left. Export gives
    transposed weights new names, so that ``precise`` ones are known by their values.
    """

    def is_precise(tensor: onnx.TensorProto) -> bool:
        value = onnx.numpy_helper.to_array(tensor)
        return any(np.array_equal(value, known) or np.array_equal(value, known.T) for known in precise)

    return [
        node.name
        for node, constants in walk(model.graph)
        if node.op_type in ("MatMul", "Gemm")
        and node.input[1] in constants
        and len(constants[node.input[1]].dims) == 2
        and not is_precise(constants[node.input[1]])
    ]


def walk(
    graph: onnx.GraphProto, outside: Mapping[str, onnx.TensorProto] = {}
) -> Iterator[tuple[onnx.NodeProto, dict[str, onnx.TensorProto]]]:
    """All nodes, those of loop bodies too, each with the constants that it can read, by name."""
    constants = {**outside, **{tensor.name: tensor for tensor in graph.initializer}}
    for node in graph.node:
        yield node, constants
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from walk(attribute.g, constants)
