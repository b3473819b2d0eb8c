"""Are the class stage's samples recognisable? ``python -m benchmarks.cifar_classes MODEL --path … --classifier …``.

    python -m benchmarks.cifar_classes model --path ../shared/data/cifar10 --classifier classifier.safetensors \\
        --ran runs/stages/vae-… runs/stages/class-… --seen "Ships and cars are plain, cats are not."

MODEL is the folder of weights that ``python -m iris.training stage=class data=cifar10`` wrote; --ran names the folders
of the stages below runs_dir, whose settings and pace the report states. A classifier of real pictures (see
``benchmarks.cifar_classifier``) names the class of samples at several scales of guidance, of real test pictures, and of
these as the model's latent reconstructs them: the best that any sample could hope for. Writes Markdown to
reports/cifar10.md and a grid of samples beside it. Samples are kept in --samples and taken from there, so that a second
call, with what a person saw, takes a minute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.cifar_classifier import Classifier, Labelled, classified, load_classifier, load_labelled
from eval.metrics.attributes import wilson_interval
from eval.metrics.fid import frechet_jackknife
from iris.diffusion.sampling import SamplingSettings
from iris.io.pixels import to_images, to_pixels
from iris.io.progress import Progress
from iris.pipeline import IrisPipeline
from iris.stages.base import content_key

BLOCKS = 20  # of the jackknife
BATCH = 200  # pictures made at once


@dataclass(frozen=True)
class Judged:
    """What the classifier makes of pictures that ought to show the classes ``wanted``.

    Attributes:
        name: of the pictures.
        predicted, wanted: class numbers int64 [N].
        distance, error: Fréchet distance from other real pictures on the classifier's features, and its sampling error.
        guidance: None of real pictures.
    """

    name: str
    predicted: Tensor
    wanted: Tensor
    distance: float
    error: float
    guidance: float | None = None

    @property
    def accuracy(self) -> float:
        """Share of pictures whose class is recognised."""
        return (self.predicted == self.wanted).double().mean().item()

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        return wilson_interval(self.accuracy, len(self.wanted))

    def of_class(self, number: int) -> tuple[float, tuple[float, float]]:
        """Accuracy on one class, and its interval."""
        hits = (self.predicted == number)[self.wanted == number].double()
        return hits.mean().item(), wilson_interval(hits.mean().item(), len(hits))

    def when_named(self, number: int) -> float:
        """Share of the pictures taken for this class that ought to show it; 0 if there are none."""
        named = self.predicted == number
        return (self.wanted == number)[named].double().mean().item() if named.any() else 0.0

    def mistaken(self, number: int) -> tuple[int, float] | None:
        """The other class that pictures of this one are most often taken for, and the share of them; None: never."""
        counts = torch.bincount(self.predicted[self.wanted == number], minlength=number + 1)
        total = int(counts.sum())
        counts[number] = 0
        return (int(counts.argmax()), counts.max().item() / total) if counts.max() else None


def halves(labels: Tensor, each: int) -> tuple[Tensor, Tensor]:
    """Rows of the first ``each`` pictures of every class, class by class, and all other rows.

    Raises:
        ValueError: a class has fewer than ``each`` pictures, or nothing is left.
    """
    count = int(labels.max()) + 1
    rows = [(labels == number).nonzero().flatten() for number in range(count)]
    if min(map(len, rows)) <= each:
        raise ValueError(f"each={each} must be below {min(map(len, rows))}, the pictures of the rarest class")
    chosen = torch.cat([of[:each] for of in rows])
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[chosen] = False
    return chosen, rest.nonzero().flatten()


def judged(
    name: str, pixels: Tensor, wanted: Tensor, model: Classifier, reference: Tensor, guidance: float | None = None
) -> Judged:
    """``Judged`` of pixels uint8 [N, H, W, 3]; ``reference``: the classifier's features [M, D] of other real ones."""
    distance, error = frechet_jackknife(features(model, pixels), reference, blocks=min(BLOCKS, len(pixels) // 2))
    found = Judged(name, classified(model, pixels), wanted, distance, error, guidance)
    print(f"{name}: {found.accuracy:.1%}, distance {distance:.1f}", file=sys.stderr, flush=True)
    return found


def features(model: Classifier, pixels: Tensor) -> Tensor:
    """The classifier's features [N, D] of pixels uint8 [N, H, W, 3]."""
    return torch.cat([model.image_features(to_images(part)) for part in pixels.split(512)])


@torch.inference_mode()
def through(pipeline: IrisPipeline, pixels: Tensor) -> Tensor:
    """Pixels uint8 [N, H, W, 3] as the model's latent gives them back."""
    latent = pipeline.latent
    return torch.cat([to_pixels(latent.decode(latent.encode(to_images(part)))) for part in pixels.split(BATCH)])


def sampled(
    pipeline: IrisPipeline, captions: Sequence[str], settings: SamplingSettings, seed: int, file: Path
) -> Tensor:
    """Pixels uint8 [N, H, W, 3] of the captions, image i from noise (seed, i); kept in ``file``, or taken from it."""
    if file.exists():
        return torch.from_numpy(np.load(file, allow_pickle=False))
    parts = []
    with Progress() as progress:
        for start in range(0, len(captions), BATCH):
            parts.append(pipeline.generate(captions[start : start + BATCH], settings, seed, start))
            progress.done(f"samples, guidance {settings.guidance:g}", start + len(parts[-1]), len(captions))
    pixels = torch.cat(parts)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    np.save(temporary, pixels.numpy())
    temporary.replace(file)
    return pixels


def measure(given: argparse.Namespace, test: Labelled, model: Classifier) -> tuple[list[Judged], dict[float, Tensor]]:
    """The real pictures, these through the latent, and samples at each scale; and the samples' pixels by scale."""
    pipeline, key = IrisPipeline.from_pretrained(given.model), content_key("model", given.model)
    chosen, rest = halves(test.labels, given.each)
    reference, real, wanted = features(model, test.pixels[rest]), test.pixels[chosen], test.labels[chosen]
    captions = [test.classes[number] for number in wanted.tolist()]
    rows = [
        judged("real", real, wanted, model, reference),
        judged("real, through the latent", through(pipeline, real), wanted, model, reference),
    ]
    samples = {}
    for scale in given.guidance:
        settings = SamplingSettings(given.steps, guidance=scale)
        file = given.samples / f"{key}-{given.each}x{len(test.classes)}-{given.steps}-{scale:g}-{given.seed}.npy"
        samples[scale] = sampled(pipeline, captions, settings, given.seed, file)
        rows.append(judged(f"samples, guidance {scale:g}", samples[scale], wanted, model, reference, scale))
    return rows, samples


def main(arguments: Sequence[str] | None = None) -> None:
    """Sample, judge, write."""
    from benchmarks.cifar_report import write_report

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cifar_classes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--path", required=True, help="folder of train.parquet and test.parquet")
    parser.add_argument("--classifier", type=Path, required=True)
    parser.add_argument("--ran", type=Path, nargs="*", default=[], help="folders of the stages that made the model")
    parser.add_argument("--seen", help="a sentence on what a person sees in the grid")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.5, 4.0])
    parser.add_argument("--each", type=int, default=100, help="samples of each class")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=Path, default=Path("runs/cifar_classes"))
    parser.add_argument("--report", type=Path, default=Path("reports/cifar10.md"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    test, model = load_labelled(given.path, "validation"), load_classifier(given.classifier)
    rows, samples = measure(given, test, model)
    write_report(given, test, model, rows, samples)
    print(given.report.read_text())


if __name__ == "__main__":
    main()
