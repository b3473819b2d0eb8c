"""A whole pipeline as a folder that ``eval.export.ort.OrtPipeline`` makes images from, without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.export.onnx import export_onnx
from eval.export.parts import parts_of
from eval.export.tokenise import PIPELINE, TOKENIZER
from iris.io.files import write_json
from iris.pipeline import IrisPipeline
from iris.text import TextEncoder


def export_pipeline(
    pipeline: IrisPipeline,
    folder: Path | str,
    dtypes: str | Sequence[str] = "fp32",
    *,
    batch: int = 1,
    size: int | tuple[int, int] | None = None,
    iterations: int | None = None,
    scan: str = "doubling",
    loop: bool = True,
) -> dict[str, Any]:
    """Write the parts (``export_onnx``), pipeline.json with what the host needs to know, and a CLIP's tokenizer.json.

    Args:
        pipeline: with float32 weights.
        folder: made if it is missing.
        dtypes: fp32, fp16 or int8, one or several; each is a whole pipeline.
        batch, size, iterations: what is fixed in the files, see ``parts_of``.
        scan, loop: see ``export_onnx``.

    Returns:
        the manifest of ``export_onnx``.

    Raises:
        SettingError, ValueError: as ``parts_of`` and ``export_onnx``.
    """
    folder = Path(folder)
    parts = parts_of(pipeline, batch, size, iterations)
    manifest = export_onnx(parts, folder, dtypes, scan=scan, loop=loop)
    encoder = parts["text"].module.encoder
    about = {
        "text": _text(encoder, folder),
        "latent": list(parts["decoder"].inputs[0].shape[1:]),
        "batch": batch,
        "iterations": parts["generator"].module.iterations,
    }
    write_json(folder / PIPELINE, about)
    return manifest


def _text(encoder: TextEncoder, folder: Path) -> dict[str, Any]:
    """What ``eval.export.tokenise`` needs; a CLIP's words go to a file of their own."""
    values = encoder.to_dict() | {"length": encoder.length}
    if values["name"] == "clip":
        from tokenizers import Tokenizer

        words = Tokenizer.from_str(encoder.tokenizer.backend_tokenizer.to_str())  # settings of a copy
        words.enable_truncation(encoder.length)
        words.enable_padding(
            length=encoder.length, pad_id=encoder.tokenizer.pad_token_id, pad_token=encoder.tokenizer.pad_token
        )
        words.save(str(folder / TOKENIZER))
    if hasattr(encoder, "shape"):  # a CLIP with drawn weights, which brings no words
        values["vocab_size"] = encoder.shape["vocab_size"]
    return values
