"""Tensors in safetensors files, replaced atomically and checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write ``tensors`` and the JSON-able ``about`` to a safetensors file, atomically, with a checksum of both.

    Raises:
        OSError: the file cannot be written; the one before it stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(about)
    try:
        # One entry: safetensors writes several in any order, and equal contents must give equal files.
        save_file(plain, temporary, metadata={"about": f"{text}\n{_checksum(plain, text)}"})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except safetensors.SafetensorError as error:
        temporary.unlink(missing_ok=True)
        raise _as_os_error(error, path) from error
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and ``about`` of a file written by ``save_tensors``.

    Raises:
        ValueError: the file is truncated, corrupt, or was not written by ``save_tensors``.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
        text, checked, checksum = metadata["about"].partition("\n")
        about = json.loads(text)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a readable checkpoint ({error})") from error
    # Files of earlier versions have no checksum.
    if len(metadata) > 1 or (checked and checksum != _checksum(tensors, text)):
        raise ValueError(f"{path}: not a readable checkpoint (its checksum is not its content's)")
    return tensors, about


def _checksum(tensors: dict[str, Tensor], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _as_os_error(error: Exception, path: Path) -> OSError:
    """safetensors reports a failed write as text that ends in "(os error 28)"."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else OSError(f"{path}: {error}")
