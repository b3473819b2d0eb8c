"""Checkpoints: everything the next step depends on, in one safetensors file, replaced atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Write ``tensors`` and the JSON-able ``about`` to a safetensors file, atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, temporary, metadata={"about": json.dumps(about)})
    os.replace(temporary, path)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and ``about`` of a file written by ``save_tensors``.

    Raises:
        ValueError: the file is truncated, corrupt, or was not written by ``save_tensors``.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["about"])
        return load_file(path), about
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable checkpoint ({error})") from error
