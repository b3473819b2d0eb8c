"""Captions encoded once and kept on disk, so that training needs no text encoder in memory.

A cache is a folder: captions.json (row 0 is the null prompt ""), tokens.npy [N, L, W], mask.npy [N, L],
pooled.npy [N, W], and about.json, written last, which says what the cache was made with and how large each file is.
ViT-L/14 takes 120 kB a caption in float16.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iris.errors import SettingError, require_choice
from iris.io.arrays import SAVE_SECONDS, ArrayFolder, GrowingArray, Growth
from iris.io.files import write_atomically
from iris.nn.condition import TextCondition
from iris.text.base import TextEncoder

CAPTIONS = "captions.json"
FORMAT = 1
PRECISIONS = ("float16", "float32")


class EmbeddedText(TextEncoder):
    """A frozen encoder that looks captions up in a folder made by ``embed_captions``: numbers are rows [B, 1].

    Rows are read from disk as they are asked for. ``to_dict`` describes the encoder that made them, which is the one
    that a saved model needs for other captions.

    Args:
        folder: of the cache.
        verify: also read every file through and compare its sha256, which takes about a second per gigabyte.

    Raises:
        SettingError: no whole cache in the folder, or a damaged one.
    """

    frozen = True

    def __init__(self, folder: Path | str, verify: bool = False) -> None:
        super().__init__()
        self.folder, self._files = Path(folder), _folder(Path(folder))
        self._about = self._files.open(CAPTIONS, verify)
        self.length, self.width = self._about["length"], self._about["width"]
        rows, dtype = self._about["rows"], self._about["dtype"]
        self._files.check_array("tokens.npy", (rows, self.length, self.width), dtype)
        self._files.check_array("mask.npy", (rows, self.length), "bool")
        self._files.check_array("pooled.npy", (rows, self.width), dtype)
        captions = json.loads((self.folder / CAPTIONS).read_text())
        self._rows = {caption: row for row, caption in enumerate(captions)}

    def tokenise(self, captions: Sequence[str]) -> Tensor:
        """Rows int64 [len(captions), 1].

        Raises:
            SettingError: a caption that was not embedded.
        """
        for caption in captions:
            if caption not in self._rows:
                raise SettingError(
                    f"caption {caption!r} is not among the {len(self._rows)} text embeddings of "
                    f"{self.folder}; embed it, or use the text encoder itself"
                )
        return torch.tensor([self._rows[caption] for caption in captions], dtype=torch.int64).unsqueeze(1)

    @torch.no_grad()
    def forward(self, numbers: Tensor) -> TextCondition:
        rows = numbers[:, 0].cpu().numpy()
        read = (self._files.read(f"{name}.npy", rows).to(numbers.device) for name in TextCondition._fields)
        tokens, mask, pooled = read
        return TextCondition(tokens.float(), mask, pooled.float())

    def to_dict(self) -> dict[str, Any]:
        return dict(self._about["encoder"])

    def fingerprint(self) -> str:
        return self._about["fingerprint"]


def embed_captions(
    encoder: TextEncoder,
    captions: Sequence[str],
    folder: Path | str,
    dtype: str = "float16",
    batch: int = 64,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Encode the different ones of ``captions`` and the null prompt; returns the cache's folder, for ``EmbeddedText``.

    That folder lies in ``folder`` under the hash of the captions, dtype and encoder (its weights included), so that
    several caches live side by side, and the same call finds the one it made before, reads it through and compares its
    sha256. Killed at any point, it goes on there; two processes that want the same cache make it once.

    Args:
        dtype: float16 or float32, on disk.
        batch: captions encoded at once.
        report: called with (captions done, captions in all) after each batch.

    Raises:
        SettingError: unknown dtype; batch < 1; a value too large for float16, or not finite; a cache that is damaged.
    """
    require_choice("text embeddings: dtype", dtype, PRECISIONS)
    if batch < 1:
        raise SettingError(f"text embeddings: batch={batch} must be at least 1")
    unique = ["", *sorted(set(captions) - {""})]
    fingerprint = encoder.fingerprint()
    files = _folder(Path(folder) / _key(fingerprint, dtype, unique))
    whole = files.make(lambda: _embed(encoder, fingerprint, unique, files, dtype, batch, report))
    EmbeddedText(files.path, verify=whole)  # refuses a damaged one
    return files.path


def _folder(path: Path) -> ArrayFolder:
    keys = frozenset({"encoder", "fingerprint", "rows", "length", "width"})
    return ArrayFolder(path, "text embeddings", "embed", "embed_captions", FORMAT, keys)


def _key(fingerprint: str, dtype: str, captions: list[str]) -> str:
    digest = hashlib.sha256(f"{FORMAT} {fingerprint} {dtype}".encode())
    for caption in captions:
        digest.update(json.dumps(caption).encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def _embed(
    encoder: TextEncoder,
    fingerprint: str,
    captions: list[str],
    files: ArrayFolder,
    dtype: str,
    batch: int,
    report: Callable[[int, int], None],
) -> None:
    """Write the cache, from the row on that an earlier, killed call had reached."""
    write_atomically(files.path / CAPTIONS, json.dumps(captions).encode())
    device = next((weight.device for weight in encoder.parameters()), torch.device("cpu"))
    trained = encoder.training
    encoder.eval()
    try:
        one = encoder(encoder.tokenise([""]).to(device))
        arrays = [
            GrowingArray(files, f"{name}.npy", value.shape[1:], "bool" if name == "mask" else dtype)
            for name, value in zip(TextCondition._fields, one, strict=True)
        ]
        growth = Growth(files, arrays)
        for start in range(growth.progress["rows"], len(captions), batch):
            growth.append(*encoder(encoder.tokenise(captions[start : start + batch]).to(device)))
            report(growth.progress["rows"], len(captions))
            growth.save(every=SAVE_SECONDS)
    finally:
        encoder.train(trained)
    length, width = one.tokens.shape[1:]
    made_with = {"encoder": encoder.to_dict(), "fingerprint": fingerprint, "dtype": dtype}
    growth.finish(made_with | {"rows": len(captions), "length": length, "width": width}, CAPTIONS)
