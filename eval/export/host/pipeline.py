"""Captions to images with an exported model, in whichever runtime its parts are for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from eval.export import PARTS, PIPELINE, module_of
from eval.export.host.sampling import Sampling
from eval.export.host.tokenise import load_tokeniser
from iris.errors import SettingError, require_choice

RESIDENT = ("all", "one part")
# Of images numbered by a range: unit noise float32 [n, C, h, w] for the start (None) or for a step of a sampler.
Noise = Callable[[range, int | None], np.ndarray]


class OpenPart(Protocol):
    """A part's file, open in its runtime. What a runtime has to offer, and all in which runtimes differ."""

    def __init__(self, path: Path, entry: Mapping[str, Any], threads: int = 1, lean: bool = False) -> None:
        """``entry``: of the part in pipeline.json. ``lean``: take less memory and more time, where the runtime can."""

    def run(self, method: str, known: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of a method by name, from inputs by name, of which it takes those that it needs."""

    def close(self) -> None:
        """Give its memory back."""


OPENERS = {"onnx": "eval.export.host.onnx:OnnxPart", "executorch": "eval.export.host.executorch:ExecutorchPart"}


def opener(runtime: str) -> type[OpenPart]:
    """The class that opens a runtime's files.

    Raises:
        SettingError: its optional packages are not installed.
    """
    module, _, name = OPENERS[runtime].partition(":")
    return getattr(module_of(runtime, module), name)


class ExportedPipeline:
    """A folder that ``eval.export.model.export_model`` wrote.

    Attributes:
        about: pipeline.json.
        batch: images that the files make at a time; any number can be asked for.
        shape: of one latent, (C, h, w).
        looped: whether the passes through the core are this host's loop, so that their number is free.
    """

    def __init__(self, folder: Path | str, threads: int = 1, resident: str = "all") -> None:
        """Open the folder; parts are loaded when they are first needed, or by ``load``.

        Args:
            folder: with pipeline.json and the files that it names.
            threads: of the runtime.
            resident: "all" keeps every part that is loaded; "one part" loads each for its turn, in the leanest form that
                the runtime has, and lets go of it for the next.

        Raises:
            SettingError: no whole exported model, a runtime that is not installed, or threads below 1.
        """
        require_choice("resident", resident, RESIDENT)
        if threads < 1:
            raise SettingError(f"threads={threads} must be at least 1")
        self.folder, self.threads, self.resident = Path(folder), threads, resident
        self.about = read_folder(self.folder)
        self.batch, self.shape = self.about["batch"], tuple(self.about["latent"])
        self.looped = "pass" in self.about["parts"]["generator"]["methods"]
        self.tokenise = load_tokeniser(self.about["text"], self.folder)
        self._opener = opener(self.about["runtime"])
        self._open: dict[str, OpenPart] = {}

    def load(self, *parts: str) -> None:
        """Load parts now, all of them where none is named."""
        for name in parts or PARTS:
            self._part(name)

    def sampling(self, **given: Any) -> Sampling:
        """``given`` fields of ``Sampling``, the others as the model was saved with; iterations resolved.

        Raises:
            SettingError: a field that cannot be used, or iterations that the files have not.
        """
        return self._checked(Sampling(**self.about["sampling"] | given))

    def _checked(self, sampling: Sampling) -> Sampling:
        made = self.about["iterations"]
        if sampling.iterations not in (None, made) and not self.looped:
            raise SettingError(
                f"sample.iterations={sampling.iterations}: model={self.folder} was exported with {made}, which its "
                f"{self.about['runtime']} file fixes; allowed: {made}; other numbers need another export"
            )
        return replace(sampling, iterations=sampling.iterations or made)

    def __call__(self, captions: Sequence[str], sampling: Sampling | None = None, **options: Any) -> np.ndarray:
        """Images uint8 [N, H, W, 3] of N captions; ``options`` as of ``images``."""
        return to_pixels(self.images(captions, sampling, **options))

    def images(
        self,
        captions: Sequence[str],
        sampling: Sampling | None = None,
        *,
        negative: str = "",
        noise: Noise | None = None,
        first: int = 0,
    ) -> np.ndarray:
        """Images float32 [N, 3, H, W] in [-1, 1], made ``batch`` at a time.

        Args:
            captions: N of them.
            sampling: None: as the model was saved with.
            negative: what guidance leads away from.
            noise: what image i starts from, called with numbers from ``first`` on; None: ``unit_noise()``.

        Raises:
            SettingError: no captions, iterations that the files have not, or noise of another shape.
            ValueError: a part gave values that are not finite.
        """
        if isinstance(captions, str) or not len(captions):
            raise SettingError(f"captions must be a list of at least one text, got {captions!r}")
        sampling = self.sampling() if sampling is None else self._checked(sampling)
        noise = unit_noise(self.shape) if noise is None else noise
        null = self.encode([negative]) if sampling.guided else None
        made = []
        for start in range(0, len(captions), self.batch):
            chosen = captions[start : start + self.batch]
            rows = range(first + start, first + start + len(chosen))
            made.append(self._make(chosen, rows, sampling, null, noise)[: len(chosen)])
        return np.concatenate(made)

    def _make(
        self,
        captions: Sequence[str],
        rows: range,
        sampling: Sampling,
        null: Mapping[str, np.ndarray] | None,
        noise: Noise,
    ) -> np.ndarray:
        """Images of at most one batch, filled up to it."""
        text = self.encode(captions)

        def velocity(z: np.ndarray, t: np.float32) -> np.ndarray:
            conditional = self.velocity(z, t, text, sampling.iterations)
            if not sampling.active(t):
                return conditional
            return sampling.guide(conditional, self.velocity(z, t, null, sampling.iterations), z, t)

        def drawn(step: int | None) -> np.ndarray:
            made = np.asarray(noise(rows, step), np.float32)
            if made.shape != (len(rows), *self.shape):
                raise SettingError(f"noise must be {[len(rows), *self.shape]}, got {list(made.shape)}")
            return self._filled(made)

        return self.decode(sampling.follow(velocity, drawn(None), drawn))

    def encode(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """At most ``batch`` captions as the generator reads them: tokens [B, L, W], mask [B, L], pooled [B, W]."""
        return self._part("text").run("forward", {"numbers": self._filled(self.tokenise(captions))})

    def velocity(
        self, z: np.ndarray, t: float, text: Mapping[str, np.ndarray], iterations: int | None = None
    ) -> np.ndarray:
        """One evaluation of the generator on latents [B, C, h, w] at time t: velocity, of their shape."""
        known = {"z": z, "t": np.full(len(z), t, np.float32), **text}
        passes = progress_of(iterations or self.about["iterations"], self.about["least_passes"])
        methods = self.about["parts"]["generator"]["methods"]
        made = evaluate(self._part("generator").run, methods, known, passes)["velocity"]
        return self._finite("generator", made)

    def decode(self, z: np.ndarray) -> np.ndarray:
        """Latents [B, C, h, w] -> images float32 [B, 3, H, W] in [-1, 1]."""
        return self._finite("decoder", self._part("decoder").run("forward", {"latents": z})["images"])

    def _filled(self, rows: np.ndarray) -> np.ndarray:
        """Rows repeated up to the batch that the files take."""
        return rows[np.minimum(np.arange(self.batch), len(rows) - 1)]

    def _finite(self, part: str, output: np.ndarray) -> np.ndarray:
        if not np.isfinite(output).all():  # pixels of such values would be black, and measured
            raise ValueError(
                f"model={self.folder}: the {part} gave values that are not finite in {self.about['dtype']}"
            )
        return output

    def _part(self, name: str) -> OpenPart:
        """A part ready to run."""
        if name not in self._open:
            lean, entry = self.resident != "all", self.about["parts"][name]
            for other in list(self._open) if lean else ():
                self._open.pop(other).close()
            self._open[name] = self._opener(self.folder / entry["file"], entry, self.threads, lean)
        return self._open[name]


def evaluate(
    run: Callable[[str, Mapping[str, np.ndarray]], dict[str, np.ndarray]],
    methods: Mapping[str, Any],
    known: Mapping[str, np.ndarray],
    passes: Sequence[float] = (),
) -> dict[str, np.ndarray]:
    """Outputs of a part by name: of its one method, or of a generator in passes (``eval.export.passes``).

    Args:
        run: of ``OpenPart``.
        methods: of the part in pipeline.json.
        known: inputs by name.
        passes: of ``progress_of``.
    """
    if "pass" not in methods:
        return run("forward", known)
    known = {**known, **run("start", known)}
    known.setdefault("state", known["given"])
    for done in passes:
        known |= run("pass", known | {"progress": np.array([done], np.float32)})
    return run("read", known)


def progress_of(iterations: int, least_passes: int = 1) -> list[float]:
    """What the passes of a loop are told: how far it is after each, as a fraction of its passes or of ``least_passes``."""
    return [(k + 1) / max(iterations, least_passes) for k in range(iterations)]


def read_folder(folder: Path) -> dict[str, Any]:
    """pipeline.json of a whole exported model.

    Raises:
        SettingError: there is none, its export was not finished, or a file of it is missing.
    """
    try:
        about = json.loads((folder / PIPELINE).read_text(encoding="utf-8"))
        parts = about["parts"]
        wrong = [file for entry in parts.values() for file in damaged(folder, entry)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingError(f"model={folder}: {PIPELINE} is not what export_model writes ({error!r})") from error
    if lacking := [name for name in PARTS if name not in parts]:
        raise SettingError(f"model={folder}: its export was not finished ({', '.join(lacking)}); export it again")
    if wrong:
        raise SettingError(f"model={folder}: {', '.join(wrong)} missing, or of another size; export it again")
    return about


def damaged(folder: Path, entry: Mapping[str, Any]) -> list[str]:
    """Files of a part that are missing or have another size than its entry in pipeline.json says."""
    sizes = {name: facts["bytes"] for name, facts in entry["files"].items()}
    return [
        name for name, size in sizes.items() if not (folder / name).is_file() or (folder / name).stat().st_size != size
    ]


def size_of(entry: Mapping[str, Any]) -> int:
    """Bytes of a part's files, graph and weights, from its entry in pipeline.json."""
    return sum(facts["bytes"] for facts in entry["files"].values())


def unit_noise(shape: tuple[int, ...], seed: int = 0) -> Noise:
    """Unit Gaussian noise whose row depends on (seed, image, step) alone. Not PyTorch's numbers."""

    def noise(rows: range, step: int | None) -> np.ndarray:
        addresses = [[seed, row] if step is None else [seed, row, step] for row in rows]
        return np.stack([np.random.default_rng(one).standard_normal(shape, np.float32) for one in addresses])

    return noise


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Float images [N, 3, H, W] in [-1, 1] -> uint8 [N, H, W, 3]."""
    return np.rint((images + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
