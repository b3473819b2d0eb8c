"""python -m eval.export.host FOLDER "a red circle" --out out.png"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from eval.export.host.pipeline import ExportedPipeline, unit_noise
from eval.export.host.sampling import SAMPLERS
from iris.errors import SettingError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m eval.export.host", description="Make an image with an exported model.")
    add = parser.add_argument
    add("folder", type=Path, help="what export_model wrote")
    add("prompt", help="what to show")
    add("--out", type=Path, default=Path("out.png"), help="the file to write (default: %(default)s)")
    add("--steps", type=int, help="sampling steps (default: as the model was saved with, as what follows)")
    add("--sampler", help=", ".join(SAMPLERS))
    add("--guidance", type=float, help="1 means none")
    add("--iterations", type=int, help="passes through the core, where the file leaves them open")
    add("--negative", default="", metavar="PROMPT", help="what guidance leads away from")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--threads", type=int, default=1, help="of the runtime (default: %(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command; bad input ends it with status 2 and one line."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    if given.seed < 0:
        parser.error(f"argument --seed: {given.seed} must be at least 0")
    named = {name: getattr(given, name) for name in ("steps", "sampler", "guidance", "iterations")}
    try:
        pipeline = ExportedPipeline(given.folder, given.threads)
        sampling = pipeline.sampling(**{name: value for name, value in named.items() if value is not None})
        noise = unit_noise(pipeline.shape, given.seed)
        pixels = pipeline([given.prompt], sampling, negative=given.negative, noise=noise)[0]
    except SettingError as error:
        parser.error(str(error))
    from PIL import Image

    try:
        Image.fromarray(pixels).save(given.out)
    except (OSError, ValueError) as error:
        parser.error(f"argument --out: {given.out} cannot be written: {error}")
    print(
        f"{given.out}: {pixels.shape[1]}x{pixels.shape[0]} pixels, {pipeline.about['dtype']}, {sampling.steps} steps, "
        f"guidance {sampling.guidance:g}, seed {given.seed}"
    )


if __name__ == "__main__":
    main()
