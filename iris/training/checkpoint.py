"""Checkpoints: everything the next step depends on, in safetensors files replaced atomically and checked when read."""

from __future__ import annotations

import os
import random
import shutil
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iris.io.tensors import load_tensors, save_tensors

CHECKPOINT, BEST = "checkpoint.safetensors", "best.safetensors"


class Checkpoints:
    """The last ``keep`` checkpoints of a folder, and the best.

    The newest is checkpoint.safetensors, those before it checkpoint.1.safetensors and so on; best.safetensors is a copy
    of the one that ``keep_best`` was called after.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._unreadable: list[Path] = []
        self._cleared, self._newest = False, self._path(0)

    def save(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Write the newest and let the oldest go. Nothing moves before the new file is whole on the disk.

        Raises:
            OSError: it could not be written; those on the disk stay as they are.
        """
        if not self._cleared:  # what processes that were killed while they wrote have left
            for path in self.folder.glob(".*.safetensors.[0-9]*"):
                path.unlink(missing_ok=True)
            self._cleared = True
        fresh = self._path("new")
        save_tensors(fresh, tensors, about)
        for path in self._unreadable:  # they must not push a readable one out
            path.unlink(missing_ok=True)
        self._unreadable = []
        for older, newer in pairwise(reversed([self._path(k) for k in range(self.keep)])):
            if newer.exists():
                os.replace(newer, older)
        os.replace(fresh, self._path(0))
        self._newest = self._path(0)

    def keep_best(self) -> None:
        """Make the checkpoint that was saved or loaded last the best one; ``save`` leaves it alone."""
        temporary = self.folder / f".{BEST}.{os.getpid()}"
        temporary.unlink(missing_ok=True)
        try:
            os.link(self._newest, temporary)
        except OSError:  # no hard links on this file system
            shutil.copyfile(self._newest, temporary)
        os.replace(temporary, self.folder / BEST)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint that can be read, None if there is none at all; those that cannot be are warned of.

        Raises:
            ValueError: there are checkpoints, and none can be read.
        """
        numbered = self.folder.glob(self._path("[0-9]*").name)
        present = [self._path(0), *sorted(numbered, key=lambda path: int(path.name.split(".")[1]))]
        for path in [path for path in present if path.exists()]:
            try:
                loaded, self._newest = load_tensors(path), path
                return loaded
            except ValueError as error:
                self._unreadable.append(path)
                warnings.warn(f"{error}; the checkpoint before it is used", RuntimeWarning, stacklevel=2)
        if self._unreadable:
            raise ValueError(
                f"{self.folder}: no readable checkpoint among "
                f"{', '.join(path.name for path in self._unreadable)}; remove them to start anew"
            )
        return None

    def _path(self, number: int | str) -> Path:
        return self.folder / (CHECKPOINT if number == 0 else CHECKPOINT.replace(".", f".{number}.", 1))


def averaged_weights(path: Path) -> dict[str, Tensor]:
    """The averaged weights that a checkpoint of ``fit`` holds, with the buffers and frozen weights beside them.

    Raises:
        ValueError: as ``load_tensors``.
    """
    tensors, _ = load_tensors(path)
    parts = {
        prefix: {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in ("model.", "average.")
    }
    return parts["model."] | parts["average."]


def random_state() -> dict[str, Tensor]:
    """The states of the global generators of torch, CUDA, numpy and Python, as tensors.

    Tasks draw from addressed generators and need none of them; a mixer with dropout, or a task from elsewhere, may.
    """
    _version, words, gauss = random.getstate()
    _name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words),
        "python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def restore_random_state(state: dict[str, Tensor]) -> None:
    """What ``random_state`` gave; the CUDA state is left alone where there is no such device."""
    torch.set_rng_state(state["torch"])
    has_gauss, gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss if has_gauss else None))
    position, has_gauss, cached = state["numpy_rest"].tolist()
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
