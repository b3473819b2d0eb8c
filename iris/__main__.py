"""``python -m iris "a red circle" --out out.png``: images from the command line."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    from PIL.Image import Image

    from iris.pipeline import IrisPipeline

SHIPPED = "weights/shapes"  # in this package: a small model of captioned shapes
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SAMPLERS = ("euler", "heun", "midpoint", "stochastic")  # iris.diffusion.flow's; to read them there would import torch
GAP = 2  # pixels between the images of a grid

Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def at_least(kind: Callable[[str], Number], least: Number, most: Number | None = None) -> Callable[[str], Number]:
    """A converter that argparse calls: a number in [least, most]."""
    allowed = f"at least {least}" if most is None else f"in [{least}, {most}]"

    def convert(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value < float("inf") or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text!r} must be a number {allowed}")
        return value

    return convert


def size(text: str) -> tuple[int, int]:
    """``64`` or ``96x64`` (width x height) -> (height, width)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of pixels, or WIDTHxHEIGHT")
    return int(parts[-1]), int(parts[0])


def out_file(text: str) -> Path:
    """A picture's path in a folder that exists."""
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} must end in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"folder {path.parent} does not exist")
    return path


def picture(text: str) -> Image:
    """The picture in a file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(text) as image:
            image.load()
            return image
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "it is not a picture that Pillow can read"
        raise argparse.ArgumentTypeError(f"cannot read {text!r}: {reason}") from error


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m iris",
        description="Make images of captions. Several images become one grid; with --count, a row a prompt.",
    )
    add = parser.add_argument
    add("prompt", nargs="+", help="what to show")
    add("--out", type=out_file, default=Path("out.png"), help="the file to write (default: %(default)s)")
    add("--model", help="folder or Hugging Face hub name (default: the small model in this package)")
    add("--steps", type=at_least(int, 1), help="sampling steps (default: the model's own, else 4)")
    add("--iterations", type=at_least(int, 1), help="passes through the core (default: as trained)")
    add("--guidance", type=at_least(float, 0.0), help="1 means none (default: the model's own, else 3)")
    add("--negative", default="", metavar="PROMPT", help="what guidance leads away from")
    add("--sampler", choices=SAMPLERS, help="(default: the model's own, else euler)")
    add("--seed", type=at_least(int, 0), default=0, help="of the noise (default: %(default)s)")
    add("--count", type=at_least(int, 1), default=1, help="images of each prompt (default: %(default)s)")
    add("--size", type=size, help="pixels, or WIDTHxHEIGHT (default: as trained)")
    add("--image", type=picture, metavar="FILE", help="a picture to change")
    add("--mask", type=picture, metavar="FILE", help="with --image: white where to repaint")
    add(
        "--strength",
        type=at_least(float, 0.0, 1.0),
        help="with --image: 0 keeps it, 1 ignores it (default: 0.6; 1 with --mask)",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command; bad input ends it with status 2 and one line that names the option."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    for name in ("mask", "strength"):
        if getattr(given, name) is not None and given.image is None:
            parser.error(f"argument --{name}: needs --image")

    from iris.errors import SettingError

    try:
        pipeline = load(parser, given.model)
        height, width = sides(parser, pipeline, given.size)
        settings = pipeline.sampling_settings(
            steps=given.steps, sampler=given.sampler, guidance=given.guidance, iterations=given.iterations
        )
        started = time.perf_counter()
        images = pipeline(
            given.prompt,
            settings.steps,
            settings.iterations,
            settings.guidance,
            negative_prompt=given.negative,
            sampler=settings.sampler,
            seed=given.seed,
            num_images_per_prompt=given.count,
            height=height,
            width=width,
            image=given.image,
            mask_image=given.mask,
            strength=given.strength,
        ).images
        seconds = time.perf_counter() - started
    except SettingError as error:
        parser.error(str(error))
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        parser.error(
            f"argument --size or --count: {len(given.prompt) * given.count} images of {width}x{height} pixels "
            "at once need more memory than there is"
        )
    try:
        grid(images, given.count).save(given.out)
    except OSError as error:
        parser.error(f"argument --out: {given.out} cannot be written: {error.strerror or error}")
    iterations = settings.iterations or pipeline.model.generator.config.iterations
    print(
        f"{given.out}: {len(images)} image{'s' if len(images) > 1 else ''} of {width}x{height} pixels, {settings.steps} "
        f"steps of {iterations} iterations, guidance {settings.guidance:g}, seed {given.seed}, in {seconds:.2f} s"
    )


def load(parser: Parser, name: str | None) -> IrisPipeline:
    """The pipeline called ``name``, or the one shipped."""
    if name is None:
        shipped = Path(str(files("iris").joinpath(SHIPPED)))
        if not (shipped / "config.json").exists():
            parser.error(f"argument --model: no model is shipped in {shipped}; give a folder or a hub name")
        name = str(shipped)
    from iris.errors import SettingError
    from iris.pipeline import IrisPipeline

    try:
        return IrisPipeline.from_pretrained(name)
    except SettingError as error:
        parser.error(f"argument --model: {error}")


def sides(parser: Parser, pipeline: IrisPipeline, wanted: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width in pixels."""
    height, width = wanted or (pipeline.size, pipeline.size)
    factor = pipeline.latent.factor
    if height % factor or width % factor:
        parser.error(f"argument --size: {width}x{height} must be multiples of {factor}, the model's pixels per latent")
    return height, width


def grid(images: list[Image], columns: int) -> Image:
    """One picture of all ``images``, which have one size."""
    from PIL import Image

    if len(images) == 1:
        return images[0]
    width, height = images[0].size
    if columns == 1:
        columns = min(len(images), 8)
    rows = -(-len(images) // columns)
    whole = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for i, image in enumerate(images):
        whole.paste(image, (i % columns * (width + GAP), i // columns * (height + GAP)))
    return whole


if __name__ == "__main__":
    main(sys.argv[1:])
