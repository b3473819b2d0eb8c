"""A whole model as a folder for a phone's runtime: ``export_model`` writes it, ``eval.export.host`` makes images with it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import iris
from eval.export import PIPELINE, Runtime, module_of
from eval.export.host.pipeline import damaged, evaluate, opener, progress_of
from eval.export.host.tokenise import TOKENIZER
from eval.export.parts import ExportPart, GeneratorPart, TextPart, agreement, parts_of
from eval.export.passes import least_passes
from iris.errors import SettingError
from iris.io.files import read_json, write_json
from iris.io.hashing import digest, file_sha256, files_sha256
from iris.nn.mixers import source_digest
from iris.pipeline import IrisPipeline
from iris.text import TextEncoder

WRITERS = {"onnx": "eval.export.onnx", "executorch": "eval.export.executorch"}
PARTIAL = ".partial"  # folder of the part that is being written


def export_model(
    source: Path | IrisPipeline, folder: Path, runtime: str, dtype: str, *, batch: int, iterations: int | None = None
) -> dict[str, Any]:
    """Write a model's parts for a runtime, and pipeline.json, which says all that a host needs to know.

    A part is named in pipeline.json once it is done, and a host refuses a folder that lacks one. Called again, after it was
    killed or not, it keeps the parts that would come out the same.

    Args:
        source: a saved model's folder, or a pipeline, with float32 weights.
        folder: made if it is missing.
        runtime: onnx or executorch.
        dtype: fp32, fp16 or int8; see ``Runtime``.
        batch: images that the files make at a time.
        iterations: passes through the core (None: as the source samples, or was trained). ONNX files have their number
            fixed. ExecuTorch's serve any, and this is the host's default, unless the passes have weights of their own.

    Returns:
        pipeline.json: {"runtime", "dtype", "batch", "latent" ([C, h, w] of one), "size" ([H, W] in pixels), "iterations",
        "least_passes" (see ``progress_of``), "text" (for ``load_tokeniser``), "source" ({"fingerprint": of weights and
        configuration}), "sampling" (fields of ``Sampling`` that the source's config.json gives, iterations apart),
        "versions", "parts": {name: what ``write_part`` of the runtime's module returns, "files" ({name: {"bytes",
        "sha256"}}), "parameters", "agreement" (with PyTorch in float32, see ``agreement``) and "key"}}.

    Raises:
        SettingError: an unknown runtime or dtype, one that is not exported or not installed; what ``parts_of`` refuses.
        ValueError: batch below 1, or a part whose output is not finite.
    """
    Runtime(runtime, dtype)
    if runtime not in WRITERS:
        raise SettingError(f"runtime.name={runtime} runs models as they are saved; exported are {', '.join(WRITERS)}")
    writer = module_of(runtime, WRITERS[runtime])
    pipeline = source if isinstance(source, IrisPipeline) else IrisPipeline.from_pretrained(source)
    sampling = _sampling(pipeline)
    default = sampling.pop("iterations", None)
    parts = parts_of(pipeline, batch, None, default if iterations is None else iterations)
    origins = {name: _origin(pipeline, part) for name, part in parts.items()}
    about = {"runtime": runtime, "dtype": dtype, **_about(parts), "source": {"fingerprint": digest(origins)}}
    about |= {"sampling": sampling, "versions": {name: version(name) for name in writer.LIBRARIES}}
    keys = {name: _key(part, origins[name], about) for name, part in parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    known = (read_json(folder / PIPELINE) or {}).get("parts", {})
    kept = [name for name, one in known.items() if one["key"] == keys.get(name) and not damaged(folder, one)]
    about["parts"] = {name: known[name] for name in kept}
    write_json(folder / PIPELINE, about)
    for file in [file for name, one in known.items() if name not in kept for file in one["files"]]:
        (folder / file).unlink(missing_ok=True)
    _write_words(parts["text"].module.encoder, folder)
    for name, part in parts.items():
        if name not in about["parts"]:
            about["parts"][name] = _write(part, writer, folder, about) | {"key": keys[name]}
            write_json(folder / PIPELINE, about)
    return about


def check_part(path: Path, entry: Mapping[str, Any], part: ExportPart, runtime: str) -> dict[str, float]:
    """``agreement`` of a part's file with PyTorch, run as a host runs it.

    Args:
        path, entry: of what ``write_part`` wrote of ``part``.
        runtime: that it was written for.

    Raises:
        SettingError: the runtime, or what it needs to run, is not installed.
        ValueError: an output is not finite.
    """
    opened = opener(runtime)(path, entry, torch.get_num_threads())
    known = {name: x.numpy() for name, x in zip(part.input_names, part.inputs, strict=True)}
    passes = ()
    if isinstance(part.module, GeneratorPart):
        passes = progress_of(part.module.iterations, least_passes(part.module.generator.config))
    found = evaluate(opened.run, entry["methods"], known, passes)
    opened.close()
    return agreement([found[name] for name in part.output_names], part.outputs(), f"outputs of part {part.name}")


def _origin(pipeline: IrisPipeline, part: ExportPart) -> str:
    """Digest of what a part computes with: its configuration and weights, and somebody's own mixer by its source."""
    module, facts = part.module, [pipeline.latent_name, pipeline.latent_options]
    if isinstance(module, TextPart):
        return module.encoder.fingerprint()
    if isinstance(module, GeneratorPart):
        config = module.generator.config
        facts = [config.to_dict(), source_digest(config.mixer) if ":" in config.mixer else ""]
    weights = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest([str(module), facts, weights.hexdigest()])


def _sampling(pipeline: IrisPipeline) -> dict[str, Any]:
    """How a model says that its images are made, where it does."""
    given = {} if pipeline.sampling is None else asdict(pipeline.sampling)
    return {name: value for name, value in given.items() if value is not None}


def _about(parts: Mapping[str, ExportPart]) -> dict[str, Any]:
    """What pipeline.json says of the model itself."""
    generator, decoder, encoder = parts["generator"].module, parts["decoder"], parts["text"].module.encoder
    text = encoder.to_dict() | {"length": encoder.length}
    if hasattr(encoder, "shape"):  # a CLIP with drawn weights, which brings no words
        text["vocab_size"] = encoder.shape["vocab_size"]
    return {
        "batch": len(decoder.inputs[0]),
        "latent": list(decoder.inputs[0].shape[1:]),
        "size": list(decoder.outputs()[0].shape[2:]),
        "iterations": generator.iterations,
        "least_passes": least_passes(generator.generator.config),
        "text": text,
    }


def _key(part: ExportPart, origin: str, about: Mapping[str, Any]) -> str:
    """Digest of all that a part's files depend on."""
    iterations = part.module.iterations if isinstance(part.module, GeneratorPart) else None
    made_for = [about["runtime"], about["dtype"], about["versions"], part.signature(), iterations]
    return digest([origin, made_for, _code()])


@cache
def _code() -> str:
    """Digest of the sources that decide what is written."""
    here, model = Path(__file__).parent, Path(iris.__file__).parent
    modules = [file for name in ("nn", "latents", "text") for file in (model / name).rglob("*.py")]
    return files_sha256([*here.glob("*.py"), *modules], here.parents[1])


def _write_words(encoder: TextEncoder, folder: Path) -> None:
    """A CLIP's words and how it cuts them, as a file of Hugging Face's tokenizers library."""
    if encoder.to_dict()["name"] == "clip":
        from tokenizers import Tokenizer

        words = Tokenizer.from_str(encoder.tokenizer.backend_tokenizer.to_str())  # settings of a copy
        pad = {"pad_id": encoder.tokenizer.pad_token_id, "pad_token": encoder.tokenizer.pad_token}
        words.enable_truncation(encoder.length)
        words.enable_padding(length=encoder.length, **pad)
        words.save(str(folder / TOKENIZER))


def _write(part: ExportPart, writer: ModuleType, folder: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write a part beside the others once it is whole and was checked; returns its entry."""
    scratch = folder / PARTIAL
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        entry = writer.write_part(part, about["dtype"], scratch)
        entry["agreement"] = check_part(scratch / entry["file"], entry, part, about["runtime"])
        files = sorted(scratch.iterdir())
        entry["files"] = {file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in files}
        for file in files:
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return entry | {"parameters": sum(parameter.numel() for parameter in part.module.parameters())}
