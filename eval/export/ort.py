"""Text to image in ONNX Runtime and NumPy alone, as an app on a phone would do it. Never imports PyTorch.

python -m eval.export.ort FOLDER "a red circle" --out out.png
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnxruntime

from eval.export.tokenise import PIPELINE, load_tokeniser
from iris.errors import SettingError, require_choice

PARTS = ("text", "generator", "decoder")
TOLERANCE = 1e-6  # of guidance's interval, as in iris.diffusion.guidance

Condition = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens [N, L, W], mask [N, L], pooled [N, W]


class OrtPipeline:
    """A pipeline that ``eval.export.pipeline.export_pipeline`` wrote.

    Attributes:
        batch: images that the files make at a time; any number can be asked for.
        shape: of one latent, (C, h, w).
    """

    def __init__(
        self,
        folder: Path | str,
        dtype: str = "fp32",
        threads: int = 1,
        *,
        keep: Sequence[str] = PARTS,
        prepack: bool = True,
    ) -> None:
        """Open the folder.

        Args:
            folder: with pipeline.json and, for each part, <part>.<dtype>.onnx.
            dtype: fp32, fp16 or int8.
            threads: of ONNX Runtime.
            keep: parts to load now and to keep; of the others one at a time is in memory, loaded for its turn.
            prepack: let ONNX Runtime copy the weights into a layout that is faster; False leaves them pages of the file,
                which the system can take back.

        Raises:
            SettingError: a file is missing or not readable, an unknown part, or threads below 1.
        """
        self.folder, self.dtype, self.keep = Path(folder), dtype, tuple(keep)
        if threads < 1:
            raise SettingError(f"threads={threads} must be at least 1")
        for name in self.keep:
            require_choice("keep", name, PARTS)
        about = _read_json(self.folder / PIPELINE)
        for name in PARTS:
            self.file(name)
        self.batch, self.shape = about["batch"], tuple(about["latent"])
        self.tokenise = load_tokeniser(about["text"], self.folder)
        self._options = onnxruntime.SessionOptions()
        self._options.intra_op_num_threads = threads
        self._options.log_severity_level = 3  # errors; it warns of what it cannot fold in half precision
        self._options.add_session_config_entry("session.disable_prepacking", "0" if prepack else "1")
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        for name in self.keep:
            self.session(name)

    def file(self, part: str) -> Path:
        """The file of a part. Raises SettingError when there is none."""
        path = self.folder / f"{part}.{self.dtype}.onnx"
        if not path.is_file():
            raise SettingError(f"model={self.folder}: {path.name} is missing; export it with dtypes={self.dtype}")
        return path

    def weights_bytes(self, part: str) -> int:
        """Bytes of a part's graph and weights."""
        path = self.file(part)
        data = path.with_name(f"{path.name}.data")
        return path.stat().st_size + (data.stat().st_size if data.exists() else 0)

    def __call__(
        self,
        captions: Sequence[str],
        steps: int = 4,
        guidance: float = 3.0,
        *,
        negative: str = "",
        noise: np.ndarray | None = None,
        seed: int = 0,
        shift: float = 1.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
    ) -> np.ndarray:
        """Images uint8 [N, H, W, 3] of ``captions`` by Euler's method.

        Args:
            captions: N of them.
            steps, shift: of the time grid, see ``iris.diffusion.flow.time_grid``.
            guidance, guidance_start, guidance_end: scale and interval of guidance; 1 means none.
            negative: what guidance leads away from.
            noise: unit noise [N, C, h, w] to start from; None: ``unit_noise`` of the seed.

        Raises:
            SettingError: no captions, numbers outside their range, or noise of another shape.
        """
        noise = unit_noise(seed, 0, len(captions), self.shape) if noise is None else np.asarray(noise, np.float32)
        _check(captions, noise, self.shape, steps, guidance, shift)
        text = self.encode(captions)
        null = tuple(np.repeat(part, len(captions), 0) for part in self.encode([negative])) if guidance != 1 else None
        times = time_grid(steps, shift)
        z = noise
        for t, following in itertools.pairwise(times):
            active = null is not None and guidance_start - TOLERANCE <= t <= guidance_end + TOLERANCE
            z = z + (following - t) * self.velocity(z, t, text, null if active else None, guidance)
        return to_pixels(self.run("decoder", z)[0])

    def generate(self, captions: Sequence[str], seed: int = 0, first: int = 0, **sampling: Any) -> np.ndarray:
        """Images uint8 [N, H, W, 3]; image i starts from the noise of (seed, first + i).

        Made ``batch`` at a time, so that any number fits into memory: what quality is measured on. ``sampling``: other
        arguments of a call.
        """
        parts = []
        for start in range(0, len(captions), self.batch):
            chosen = captions[start : start + self.batch]
            noise = unit_noise(seed, first + start, len(chosen), self.shape)
            parts.append(self(chosen, noise=noise, **sampling))
        return np.concatenate(parts)

    def encode(self, captions: Sequence[str]) -> Condition:
        """The captions as the generator reads them."""
        return tuple(self.run("text", self.tokenise(captions)))

    def velocity(
        self, z: np.ndarray, t: float, text: Condition, null: Condition | None = None, scale: float = 1.0
    ) -> np.ndarray:
        """Velocity [N, C, h, w] of latents at time t, guided away from ``null`` if there is one."""
        if null is not None:
            z, text = np.concatenate([z, z]), tuple(np.concatenate(both) for both in zip(text, null, strict=True))
        velocity = self.run("generator", z, np.full(len(z), t, np.float32), *text)[0]
        if null is None:
            return velocity
        conditional, unconditional = np.split(velocity, 2)
        return unconditional + np.float32(scale) * (conditional - unconditional)

    def run(self, part: str, *inputs: np.ndarray) -> list[np.ndarray]:
        """Outputs of a part for any number of rows, in runs of the file's batch, the last of them filled up."""
        session = self.session(part)
        names = [given.name for given in session.get_inputs()]
        count, batch = len(inputs[0]), session.get_inputs()[0].shape[0]
        answers = []
        for start in range(0, count, batch):
            rows = np.minimum(np.arange(start, start + batch), count - 1)
            answers.append(session.run(None, {name: x[rows] for name, x in zip(names, inputs, strict=True)}))
        return [np.concatenate(outputs)[:count] for outputs in zip(*answers, strict=True)]

    def session(self, part: str) -> onnxruntime.InferenceSession:
        """A part ready to run; one that is not kept takes the place of the last such."""
        if part not in self._sessions:
            path = self.file(part)
            if part not in self.keep:
                self._sessions = {name: session for name, session in self._sessions.items() if name in self.keep}
            try:
                self._sessions[part] = onnxruntime.InferenceSession(
                    path, self._options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # ONNX Runtime's own classes share no other base
                raise SettingError(f"model={self.folder}: {path.name} cannot be loaded ({error})") from error
        return self._sessions[part]


def unit_noise(seed: int, first: int, count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Unit Gaussian noise float32 [count, *shape]; row i depends on (seed, first + i) alone. Not PyTorch's numbers."""
    draws = [np.random.default_rng([seed, first + i]).standard_normal(shape, np.float32) for i in range(count)]
    return np.stack(draws) if draws else np.empty((0, *shape), np.float32)


def time_grid(steps: int, shift: float = 1.0) -> np.ndarray:
    """Times float32 [steps + 1] from 1 to 0, as ``iris.diffusion.flow.time_grid``."""
    even = np.linspace(1, 0, steps + 1, dtype=np.float32)
    return (shift * even / (1 + (shift - 1) * even)).astype(np.float32)


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Float images [N, 3, H, W] in [-1, 1] -> uint8 [N, H, W, 3]."""
    return np.rint((images + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


def _check(
    captions: Sequence[str], noise: np.ndarray, shape: tuple[int, ...], steps: int, guidance: float, shift: float
) -> None:
    if isinstance(captions, str) or not len(captions):
        raise SettingError(f"captions must be a list of at least one text, got {captions!r}")
    if noise.shape != (len(captions), *shape):
        raise SettingError(f"noise must be {[len(captions), *shape]}, got {list(noise.shape)}")
    if steps < 1 or not shift > 0 or not 0 <= guidance < float("inf"):
        raise SettingError(f"steps={steps} must be at least 1, shift={shift} positive, guidance={guidance} at least 0")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SettingError(f"model={path.parent}: {path.name} is not what export_pipeline writes ({error})") from error


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m eval.export.ort", description="Make an image with an exported pipeline.")
    add = parser.add_argument
    add("folder", type=Path, help="what export_pipeline wrote")
    add("prompt", help="what to show")
    add("--out", type=Path, default=Path("out.png"), help="the file to write (default: %(default)s)")
    add("--dtype", default="fp32", help="fp32, fp16 or int8 (default: %(default)s)")
    add("--steps", type=int, default=4, help="sampling steps (default: %(default)s)")
    add("--guidance", type=float, default=3.0, help="1 means none (default: %(default)s)")
    add("--negative", default="", metavar="PROMPT", help="what guidance leads away from")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--threads", type=int, default=1, help="of ONNX Runtime (default: %(default)s)")
    return parser


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def main(arguments: list[str] | None = None) -> None:
    """Run the command; bad input ends it with status 2 and one line."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    if given.seed < 0:
        parser.error(f"argument --seed: {given.seed} must be at least 0")
    try:
        pipeline = OrtPipeline(given.folder, given.dtype, given.threads)
        pixels = pipeline([given.prompt], given.steps, given.guidance, negative=given.negative, seed=given.seed)[0]
    except SettingError as error:
        parser.error(str(error))
    from PIL import Image

    try:
        Image.fromarray(pixels).save(given.out)
    except (OSError, ValueError) as error:
        parser.error(f"argument --out: {given.out} cannot be written: {error}")
    print(
        f"{given.out}: {pixels.shape[1]}x{pixels.shape[0]} pixels, {given.dtype}, {given.steps} steps, "
        f"guidance {given.guidance:g}, seed {given.seed}"
    )


if __name__ == "__main__":
    main()
