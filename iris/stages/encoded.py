"""Stages encoded and captions: what the flow is trained on, made once: latents of pictures, embeddings of captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from iris.data import SourceSettings
from iris.io.hashing import digest
from iris.stages.data import fingerprint, opened, size_of, streamed
from iris.stages.engine import Context, Stage, Work
from iris.stages.latent import at_once, load_latent
from iris.stages.latent_cache import CachedLatents, encode_source
from iris.stages.parts import require_side
from iris.text import CLIPText, EmbeddedText, TextEncoder, embed_captions
from iris.training.safety import explained_memory


class Encoded(Stage):
    """The latents of one split, with the captions, labels and scores of their rows.

    Args:
        latent: a stage vae, or weights that hold a latent.
        store: dtype on disk.
    """

    kind = "encoded"

    def __init__(self, context: Context, source: SourceSettings, latent: Work, store: str) -> None:
        super().__init__(context, {"latent": latent})
        self.source, self.store = source, store

    @property
    def label(self) -> str:
        return f"encoded {self.source.split}"

    def facts(self) -> dict[str, Any]:
        rows = {"rows": self.source.train} if streamed(self.source) else {}
        return {"data": fingerprint(self.source, self.context), "store": self.store} | rows

    def settings(self) -> dict[str, Any]:
        return vars(self.source) | {"store": self.store}

    def work(self) -> dict[str, Any]:
        latent = load_latent(self.needs["latent"].place).latent.to(self.context.processes.device)
        source, size = opened(self.source), size_of(self.source)
        require_side(latent, size)
        total = len(source) if hasattr(source, "__len__") else source.limit

        def report(done: int) -> None:
            self.context.progress.done(f"encoding {self.source.split} pictures", done, total)

        with explained_memory(
            lambda: f"while {at_once(size)} pictures were encoded at once with data.size={size}: lower data.size"
        ):
            place = encode_source(latent, source, self.folder, self.store, at_once(size), report)
        return {"latents": place.relative_to(self.folder).as_posix(), "bad": CachedLatents(place).about["bad"]}

    def cache(self) -> CachedLatents:
        """What was made, its small files read through and compared with their sha256."""
        return CachedLatents(self.folder / self.result["latents"])


class Latents:
    """Cached latents as a task reads them: ``latents[rows]`` float32 [len(rows), C, h, w]."""

    def __init__(self, cache: CachedLatents) -> None:
        self._cache, self.shape = cache, cache.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        return self._cache.latents(rows)

    def keys(self, rows: Sequence[int]) -> list[str]:
        """Where the rows came from, for messages."""
        return [self._cache.rows[row]["key"] for row in rows]


class Captions(Stage):
    """Embeddings of all captions that a training sees, by a frozen text encoder.

    Args:
        encoded: the splits whose captions they are.
        encoder: makes the text encoder.
        fingerprint: of its weights.
        prompts: further ones.
    """

    kind = "captions"

    def __init__(
        self, context: Context, encoded: Sequence[Encoded], encoder: Any, fingerprint: str, prompts: Sequence[str]
    ) -> None:
        super().__init__(context, {f"captions {number}": one for number, one in enumerate(encoded)})
        self.encoded, self.encoder, self.fingerprint, self.prompts = encoded, encoder, fingerprint, list(prompts)

    def facts(self) -> dict[str, Any]:
        return {"encoder": self.fingerprint, "prompts": digest(self.prompts)}

    def work(self) -> dict[str, Any]:
        captions = [caption for one in self.encoded for caption in one.cache().captions] + self.prompts
        encoder: CLIPText = self.encoder().to(self.context.processes.device)
        place = embed_captions(
            encoder,
            captions,
            self.folder,
            report=lambda done, total: self.context.progress.done("embedding captions", done, total),
        )
        return {"embedded": place.relative_to(self.folder).as_posix(), "captions": len(set(captions))}

    def text(self) -> TextEncoder:
        """The embeddings, as a text encoder."""
        return EmbeddedText(self.folder / self.result["embedded"])
