"""Latents of a data source encoded once and kept on disk, with the captions, labels and scores of their rows.

A cache is a folder: latents.npy [N, C, h, w], rows.jsonl (key, caption, label, score of each row), and about.json,
written last, which says what the cache was made with and has each file's size and sha256. Rows that cannot be used are
left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iris.data.source import Source, collate
from iris.errors import SettingError, require_choice
from iris.io.arrays import SAVE_SECONDS, ArrayFolder, GrowingArray, GrowingLines, Growth
from iris.io.pixels import to_images
from iris.io.tensors import DTYPES
from iris.latents import Latent

LATENTS, ROWS = "latents.npy", "rows.jsonl"
FORMAT = 1


class CachedLatents:
    """A folder made by ``encode_source``: ``latents[rows]``, ``captions``, ``labels``, ``scores``.

    Args:
        folder: of the cache.
        verify: also read the latents through and compare their sha256, which takes about a second per gigabyte.

    Raises:
        SettingError: no whole cache in the folder, or a damaged one.
    """

    def __init__(self, folder: Path | str, verify: bool = False) -> None:
        self.folder, self._files = Path(folder), _folder(Path(folder))
        self.about = self._files.open(ROWS, verify)
        self.shape, self.dtype = tuple(self.about["shape"]), DTYPES[self.about["dtype"]]
        self._files.check_array(LATENTS, self.shape, self.about["dtype"])

    def __len__(self) -> int:
        return self.shape[0]

    def latents(self, rows: Sequence[int] | Tensor | slice = slice(None)) -> Tensor:
        """Standardised latents float32 [len(rows), C, h, w], read from disk; all of them if no rows are given."""
        if not isinstance(rows, slice):
            rows = np.asarray(rows, np.int64)
        stored = self._files.read(LATENTS, rows)
        return (stored.view(torch.bfloat16) if self.dtype == torch.bfloat16 else stored).float()

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """{"key", "caption", "label", "score"} of each row."""
        return [json.loads(line) for line in (self.folder / ROWS).read_text(encoding="utf-8").splitlines()]

    @property
    def captions(self) -> list[str]:
        return [row["caption"] for row in self.rows]

    @property
    def labels(self) -> list[int | None]:
        return [row["label"] for row in self.rows]

    @property
    def scores(self) -> list[float | None]:
        return [row["score"] for row in self.rows]


def encode_source(
    latent: Latent,
    source: Source,
    folder: Path | str,
    dtype: str = "float16",
    batch: int = 64,
    report: Callable[[int], None] = lambda done: None,
) -> Path:
    """Encode every usable row of ``source`` in its own order, of a stream the first data.train of them where that is
    given; returns the cache's folder, for ``CachedLatents``.

    That folder lies in ``folder`` under the hash of the source's fingerprint, the latent's weights and the dtype, so
    that caches live side by side and the same call finds the one it made before. Killed at any point, it goes on there;
    two processes that want the same cache make it once. One that was there is read through, and its sha256 compared.

    Args:
        latent: trained; runs where its weights lie.
        source: with data.crop=centre.
        dtype: float32, float16 or bfloat16, on disk.
        batch: pictures encoded at once.
        report: called with the rows done after each batch.

    Raises:
        SettingError: unknown dtype; batch < 1; random crops; a value that is not finite, or too large for the dtype;
            more damaged rows than data.max_bad allows, or no usable one; a cache that is damaged.
    """
    require_choice("latents: dtype", dtype, tuple(DTYPES))
    if batch < 1:
        raise SettingError(f"latents: batch={batch} must be at least 1")
    if source.settings.crop != "centre":
        raise SettingError(
            f"data.crop={source.settings.crop} draws another crop each epoch, of which latents on disk "
            "would hold one; use data.crop=centre, or encode while training"
        )
    key = {"data": source.fingerprint(), "latent": latent_digest(latent), "dtype": dtype}
    if source.limit is not None:  # there are caches whose fingerprint has data.train, and that went on behind it
        key["rows"] = str(source.limit)
    name = hashlib.sha256(f"{FORMAT} {sorted(key.items())}".encode()).hexdigest()[:16]
    files = _folder(Path(folder) / name)
    whole = files.make(lambda: _encode(latent, source, files, key, batch, report))
    CachedLatents(files.path, verify=whole)  # refuses a damaged one
    return files.path


def latent_digest(latent: Latent) -> str:
    """sha256 (16 hex digits) of what ``latent.encode`` depends on: its class, structure, weights and statistics."""
    kind = type(latent)
    name = f"{kind.__module__}.{kind.__qualname__}"
    digest = hashlib.sha256(f"{name} {latent.channels} {latent.factor} {latent}".encode())
    for name, value in sorted(latent.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _folder(path: Path) -> ArrayFolder:
    return ArrayFolder(path, "latents", "encode", "encode_source", FORMAT, frozenset({"shape"}))


@torch.no_grad()
def _encode(
    latent: Latent, source: Source, files: ArrayFolder, key: dict[str, str], batch: int, report: Callable[[int], None]
) -> None:
    """Write the cache, from where an earlier, killed call is known to have reached."""
    shape = (latent.channels, *latent.grid(source.settings.size, source.settings.size))
    growth = Growth(files, [GrowingArray(files, LATENTS, shape, key["dtype"]), GrowingLines(files, ROWS)])
    device = next((value.device for value in latent.state_dict().values()), torch.device("cpu"))
    stream = source.stream(position=growth.progress.get("position"), shuffle=False)
    wanted = islice(stream, None if source.limit is None else source.limit - growth.progress["rows"])
    trained = latent.training
    latent.eval()
    try:
        while examples := list(islice(wanted, batch)):
            values = latent.encode(to_images(torch.from_numpy(collate(examples).images)).to(device))
            growth.append(values, [_line(example) for example in examples], position=stream.position)
            report(growth.progress["rows"])
            growth.save(every=SAVE_SECONDS)
    finally:
        latent.train(trained)
    if not growth.progress["rows"]:
        raise SettingError("latents: the source has no usable row")
    growth.finish({**key, "shape": (growth.progress["rows"], *shape), "bad": stream.position["bad"]})


def _line(example: Any) -> str:
    row = {name: getattr(example, name) for name in ("key", "caption", "label", "score")}
    return json.dumps(row) + "\n"  # ASCII, so that no caption brings a line break of its own
