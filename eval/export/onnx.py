"""Parts as ONNX files for ONNX Runtime, in float32, float16 or with 8-bit weights; each compared with PyTorch."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import torch
from onnx_ir.passes import Sequential, common
from onnxruntime.quantization import QuantType, quantize_dynamic

from eval.export.loop import looped
from eval.export.parts import ExportPart, export_friendly
from iris.errors import require_choice
from iris.io.files import write_json

DTYPES = ("fp32", "fp16", "int8")
MANIFEST = "manifest.json"
OPSET = 20
ERRORS = 3  # ONNX Runtime's level of logging; it warns of what it cannot fold in half precision
INTEGER_PRODUCT = "MatMulInteger"


@dataclass(frozen=True)
class Agreement:
    """How far a file's outputs are from those of PyTorch in float32, on the part's inputs.

    ``rms``: root mean square of the difference over that of PyTorch's output. ``max``: largest difference over the
    largest output. The worst of several outputs.
    """

    rms: float
    max: float


def export_onnx(
    parts: Mapping[str, ExportPart],
    folder: Path | str,
    dtypes: str | Sequence[str] = "fp32",
    *,
    scan: str = "doubling",
    loop: bool = True,
) -> dict[str, Any]:
    """Write each part in each of ``dtypes`` to ``folder``: <part>.<dtype>.onnx, its weights in a .data file beside it.

    fp16: weights and activations, except what the modules compute in float32: norms, recurrence, transforms, times.
    int8: the weights of linear layers, 8 bits a number with a scale a channel, and their inputs, quantised as they come
    (dynamic). Convolutions, the recurrence's gates, spectral networks and the constant matrices stay in float32.

    Args:
        parts: of ``parts_of``.
        folder: made if it is missing; what other dtypes left in it stays.
        dtypes: fp32, fp16 or int8, one or several.
        scan: the recurrence's form, see ``export_friendly``.
        loop: passes through a shared core as one ONNX Scan; False unrolls them.

    Returns:
        what is also written to manifest.json: {"versions": {library: version}, "files": [one entry a file, see
        ``describe``]}.

    Raises:
        SettingError: an unknown dtype or scan.
        ValueError: no parts, no dtypes, or a part whose output is not finite.
    """
    dtypes = (dtypes,) if isinstance(dtypes, str) else tuple(dtypes)
    if not parts or not dtypes:
        raise ValueError(f"parts and dtypes must not be empty, got {list(parts)} and {list(dtypes)}")
    for dtype in dtypes:
        require_choice("export.dtype", dtype, DTYPES)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for part in parts.values():
        paths = _write(looped(part) if loop else part, [dtype for dtype in DTYPES if dtype in dtypes], folder, scan)
        entries += [describe(part, dtype, path) for dtype, path in paths.items()]
    return _add_to_manifest(folder, entries)


def _write(part: ExportPart, dtypes: Sequence[str], folder: Path, scan: str) -> dict[str, Path]:
    """Write a part's files; 8-bit weights are made from float32's, which is thrown away where it is not asked for."""
    paths = {dtype: folder / f"{part.name}.{dtype}.onnx" for dtype in dtypes}
    if "fp16" in paths:
        save(to_graph(part.to(torch.float16), scan), paths["fp16"])
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        plain = paths.get("fp32", Path(scratch) / "plain.onnx")
        if {"fp32", "int8"} & set(paths):
            save(to_graph(part, scan), plain)
        if "int8" in paths:
            quantise(plain, paths["int8"], precise_weights(part))
    return paths


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

    x86 processors without VNNI can saturate in ONNX Runtime's 8-bit products; ``agreement`` would show it.
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
                weight_type=QuantType.QInt8,
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


def describe(part: ExportPart, dtype: str, path: Path) -> dict[str, Any]:
    """What the manifest says of a file, after checking it.

    Returns:
        {"part", "dtype", "file", "bytes" (with the weights), "sha256" (file -> digest), "opset", "nodes", "products"
        (operation -> count, of MatMul, Gemm and MatMulInteger), "inputs" and "outputs" (name -> shape), "agreement"}.

    Raises:
        onnx.checker.ValidationError: the file is not valid.
        ValueError: PyTorch's output, or the file's, is not finite.
    """
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    counts = Counter(node.op_type for node, _ in walk(model.graph))
    files = [path, path.with_name(f"{path.name}.data")]
    files = [file for file in files if file.exists()]
    outputs = part.outputs()
    return {
        "part": part.name,
        "dtype": dtype,
        "file": path.name,
        "bytes": sum(file.stat().st_size for file in files),
        "sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
        "opset": {opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        "nodes": counts.total(),
        "products": {kind: counts[kind] for kind in ("MatMul", "Gemm", INTEGER_PRODUCT)},
        "inputs": {name: list(x.shape) for name, x in zip(part.input_names, part.inputs, strict=True)},
        "outputs": {name: list(y.shape) for name, y in zip(part.output_names, outputs, strict=True)},
        "agreement": asdict(agreement(part, path)),
    }


def agreement(part: ExportPart, path: Path) -> Agreement:
    """Run a file in ONNX Runtime on the part's inputs and compare it with PyTorch.

    Raises:
        ValueError: PyTorch's output, or the file's, is not finite.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), ERRORS
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {name: x.numpy() for name, x in zip(part.input_names, part.inputs, strict=True)})
    worst = Agreement(0.0, 0.0)
    for name, found, expected in zip(part.output_names, outputs, part.outputs(), strict=True):
        found, expected = found.astype(np.float64), expected.numpy().astype(np.float64)
        if not (np.isfinite(found).all() and np.isfinite(expected).all()):
            raise ValueError(f"output {name} of part {part.name} is not finite")
        difference, largest = np.abs(found - expected), max(np.abs(expected).max(), np.finfo(np.float32).tiny)
        size = max(np.sqrt(np.square(expected).mean()), np.finfo(np.float32).tiny)
        worst = Agreement(
            max(worst.rms, float(np.sqrt(np.square(difference).mean()) / size)),
            max(worst.max, float(difference.max() / largest)),
        )
    return worst


def _add_to_manifest(folder: Path, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Put entries in the place of older ones of the same files."""
    path, fresh = folder / MANIFEST, {entry["file"] for entry in entries}
    old = json.loads(path.read_text())["files"] if path.exists() else []
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
    manifest = {"versions": versions, "files": [entry for entry in old if entry["file"] not in fresh] + entries}
    write_json(path, manifest)
    return manifest
