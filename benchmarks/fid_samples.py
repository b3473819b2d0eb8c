"""How FID and its extrapolation depend on the number of images: ``python -m benchmarks.fid_samples``.

Blurred pictures of the world ``shapes`` stand for a model's, judge ``shapes`` gives the features. Each repeat draws
pictures of its own. Writes reports/fid_samples.md, .svg and .png.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.ticker import NullFormatter
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from ablations.report.charts import STYLE, new_figure
from ablations.report.palette import HUES, INK, MUTED
from eval.judges import Judge, load_judge
from eval.stages.features import extract_features
from eval.metrics.fid import DistanceTo, FeatureStatistics, RankDeficientWarning, check_features, frechet_jackknife
from eval.metrics.fid_infinity import ENOUGH, ExtrapolationWarning, fid_infinity
from eval.judges.images import to_float
from iris.data import WORLDS

COUNTS = (128, 256, 512, 1024, 2048, 4096)
SIGMA = 1.5  # pixels of the blur: about the FID of a good model of this world
PART = 2048  # pictures drawn at a time
NAMES = ("FID", "FID extrapolated")


@dataclass(frozen=True)
class Row:
    """One metric at one number of images, over the repeats."""

    count: int
    name: str
    mean: float
    sd: float  # over repeats
    error: float  # mean of the standard errors that the metric gave itself


def main() -> None:
    """Measure, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=8, help="independent draws at each number of images")
    parser.add_argument("--reference", type=int, default=32768, help="real pictures")
    parser.add_argument("--out", type=Path, default=Path("reports"))
    given = parser.parse_args()
    if given.repeats < 2 or given.reference < 2:
        parser.error("--repeats and --reference must be at least 2")
    torch.set_num_threads(1)
    judge = load_judge("shapes")
    reference = FeatureStatistics.of(features(judge, given.reference, seed=0, sigma=0.0))
    repeats = [features(judge, COUNTS[-1], seed=1 + i, sigma=SIGMA) for i in range(given.repeats)]
    limit = DistanceTo(reference)(check_features(torch.cat(repeats)))
    rows = [row for count in COUNTS for row in measured([part[:count] for part in repeats], reference)]
    given.out.mkdir(parents=True, exist_ok=True)
    draw(rows, limit, given.repeats, reference.width, given.out / "fid_samples")
    text = report(rows, limit, given.repeats, reference)
    (given.out / "fid_samples.md").write_text(text)
    print(text)


def features(judge: Judge, count: int, seed: int, sigma: float) -> Tensor:
    """Judge features [count, D] of pictures of training captions, blurred to ``sigma`` pixels."""
    parts = []
    for first in range(0, count, PART):
        drawn = WORLDS["shapes"].draw("train", min(PART, count - first), seed, first)
        images = to_float(torch.from_numpy(drawn.images))
        images = gaussian_blur(images, [11, 11], [sigma, sigma]) if sigma else images
        parts.append(extract_features(judge, images).values)
    return torch.cat(parts)


def measured(parts: list[Tensor], reference: FeatureStatistics) -> list[Row]:
    """Both metrics of each repeat's features."""
    with warnings.catch_warnings():  # that small numbers are unreliable is what is shown here
        warnings.simplefilter("ignore", RankDeficientWarning)
        warnings.simplefilter("ignore", ExtrapolationWarning)
        plain = [frechet_jackknife(part, reference) for part in parts]
        limits = [
            fid_infinity(part, reference, sampling_error=error) for part, (_, error) in zip(parts, plain, strict=True)
        ]
    rows = []
    for name, found in zip(NAMES, (plain, [(each.value, each.standard_error) for each in limits]), strict=True):
        values, errors = np.asarray(found).T
        rows.append(Row(len(parts[0]), name, float(values.mean()), float(values.std(ddof=1)), float(errors.mean())))
    return rows


def spread(rows: list[Row], name: str, least: int) -> float:
    """Largest minus smallest mean of a metric over the numbers of images from ``least`` on."""
    means = [row.mean for row in rows if row.name == name and row.count >= least]
    return max(means) - min(means)


def draw(rows: list[Row], limit: float, repeats: int, width: int, path: Path) -> None:
    """The figure, as SVG and PNG."""
    figure = new_figure(height=3.6, width=6.4)
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": path.name}):
        axes = figure.subplots()
        axes.axhline(limit, color=MUTED, linewidth=1, dashes=(4, 3))
        axes.annotate(
            f"FID of all {repeats * COUNTS[-1]:,} pictures",
            (COUNTS[-1], limit),
            xytext=(0, -24),
            ha="right",
            fontsize=8.5,
            textcoords="offset points",
            color=MUTED,
        )
        for name, colour, marker in zip(NAMES, (INK, HUES[2]), "os", strict=True):
            mine = [row for row in rows if row.name == name]
            axes.errorbar(
                [row.count for row in mine],
                [row.mean for row in mine],
                [row.sd for row in mine],
                label=name,
                color=colour,
                marker=marker,
                markersize=4.5,
                capsize=2.5,
            )
        axes.axvline(ENOUGH * width, color=MUTED, linewidth=0.8, dashes=(1, 2))
        axes.annotate(
            "8 pictures a feature",
            (ENOUGH * width, 0.97),
            xytext=(4, 0),
            textcoords="offset points",
            xycoords=("data", "axes fraction"),
            va="top",
            fontsize=8.5,
            color=MUTED,
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(COUNTS, [f"{count:,}" for count in COUNTS])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(bottom=0)
        axes.set_xlabel("pictures")
        axes.set_title("FID, judge shapes")
        axes.legend()
        figure.savefig(path.with_suffix(".png"), dpi=200)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def report(rows: list[Row], limit: float, repeats: int, reference: FeatureStatistics) -> str:
    """The Markdown."""
    enough, table = ENOUGH * reference.width, []
    for count in COUNTS:
        cells = [f"{row.mean:.2f} ± {row.sd:.2f} | {row.error:.2f}" for row in rows if row.count == count]
        table.append(f"| {count:,} | {' | '.join(cells)} |")
    apart = [
        f"{name} changes by {spread(rows, name, COUNTS[0]):.2f} from {COUNTS[0]} to {COUNTS[-1]:,} pictures and "
        f"by {spread(rows, name, enough):.2f} from {enough:,} on"
        for name in NAMES
    ]
    return "\n".join(
        [
            "# FID against the number of images",
            "",
            f"Blurred pictures (Gaussian, sigma {SIGMA} pixels) of the world `shapes` against {reference.count:,} sharp "
            f"ones, judge `shapes` ({reference.width} features). Mean ± standard deviation over {repeats} independent "
            'draws; "error" is the mean of the standard errors that the metric gave itself: for FID the delete-a-block '
            "jackknife (20 blocks), for the extrapolation that and the error of the linear fit.",
            "",
            "![FID and extrapolated FID against the number of pictures](fid_samples.svg)",
            "",
            "| pictures | FID | error | FID extrapolated | error |",
            "|---|---|---|---|---|",
            *table,
            "",
            f"FID of all {repeats * COUNTS[-1]:,} blurred pictures is {limit:.2f}. {'; '.join(apart)}. Below {enough:,} "
            "pictures (8 a feature) the extrapolation is flagged, as it comes out too low there.",
            "",
            "Made by `python -m benchmarks.fid_samples`.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
