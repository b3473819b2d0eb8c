"""The report of ``benchmarks.latents``: tables with intervals over seeds, and a figure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from ablations.answer.stats import Analysis, ArmSummary, Comparison, analyse
from ablations.report.charts import STYLE, new_figure
from ablations.report.palette import HUES, INK, MARKERS, MUTED
from benchmarks.cifar_classifier import load_classifier
from benchmarks.latents import ARMS, Plan, Row, pictures_of, reconstructed
from iris.io.pixels import to_pixels
from iris.latents.losses import BANDS
from iris.stages.settings import settings_of

BASELINE, *RIVALS = ARMS
TITLES = {"wavelet": "wavelet_vae", "conv": "conv_vae", "unshuffle": "conv_vae, front=unshuffle"}
PSNR = ("psnr", *(f"psnr {band}" for band in BANDS))
SHOWN = 6  # pictures of the figure
GAP, DPI = 1, 110  # pixels between them; of the figure
FILLS = ("full", "none", "left", "bottom")
ABOUT = {
    "FD (judge shapes)": "The judge shapes was trained on the drawn world alone: on other pictures, FD (judge shapes) "
    "is a trend figure and no more.",
    "FD (CIFAR-10 classifier)": "FD (CIFAR-10 classifier) is taken on the numbers before the last layer of a small "
    "ResNet that gets {accuracy:.1%} of CIFAR-10's test pictures right; it is no FID, and "
    "compares only with itself.",
    "rFID": "rFID is on Inception's features.",
}

Group = tuple[str, int, int]  # data set, channels, steps


def write_report(path: Path, plan: Plan, rows: list[Row]) -> None:
    """Write Markdown to ``path`` and the figure beside it, as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    groups = grouped(rows)
    found = {group: analyses(of) for group, of in groups.items()}
    picture = path.with_suffix(".png")
    draw(plan, groups, found, picture)
    lines = [
        "# The wavelet VAE against a convolutional one",
        "",
        *(f"- {verdict(group, analysed)}" for group, analysed in found.items()),
        "",
        f"![reconstructions, and the gap in PSNR by band]({picture.name})",
        "",
        *(line for group in groups for line in [*table(group, groups[group], found[group]), ""]),
        f"{intervals(len(plan.seeds))} PSNR is that of the "
        "mean squared error over all pictures; cA, cH, cV and cD are the average and the details of one Haar level, "
        "against the pixels' peak. Fréchet distances are between the reconstructions, in 8 bits, and their originals. "
        + notes(plan, rows),
        "",
        "conv_vae has a learned linear convolution where wavelet_vae has the Haar transform; front=unshuffle has the "
        "pixels of each patch side by side, of which that transform is a fixed orthonormal mix. The convolutions next "
        "to it could learn the mix, so that wavelet_vae and unshuffle can come to the same functions: a gap between "
        "them is one of training, at this number of steps and this learning rate, not of what the latent can hold. All "
        "else is the same: the network behind, the loss, which has a Haar term, the learning rate, which was not tuned "
        "for any of them, and the order of the pictures.",
        "",
        "## What ran",
        "",
        *settings_table(groups),
        "",
    ]
    path.write_text("\n".join(lines))


def intervals(seeds: int) -> str:
    """What the intervals mean, or why there are none."""
    if seeds == 1:
        return "One seed: there is no interval, and how far another seed would lie from these figures is not known."
    return (
        f"± and [ ] are 95 % intervals over {seeds} seeds, which change the initial weights, the order of the "
        "pictures and the posterior's noise; those of the two gaps of a column hold together."
    )


def notes(plan: Plan, rows: list[Row]) -> str:
    """What the distances are worth."""
    names = dict.fromkeys(name for row in rows for name in row.measures if name in ABOUT)
    accuracy = load_classifier(Path(plan.classifier)).about["accuracy"] if plan.classifier else 0.0
    return " ".join(ABOUT[name].format(accuracy=accuracy) for name in names)


def grouped(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    """Rows by data set, number of channels and steps, in their order."""
    groups: dict[Group, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.data, row.channels, row.steps), []).append(row)
    return groups


def analyses(rows: list[Row]) -> dict[str, Analysis]:
    """Each measure of one group's arms, compared with the wavelet VAE."""

    def values(name: str) -> dict[str, dict[int, float]]:
        return {arm: {row.seed: row.measures[name] for row in rows if row.arm == arm} for arm in ARMS}

    return {
        name: analyse(
            values(name),
            BASELINE,
            metric=name,
            better="higher" if name in PSNR else "lower",
            practical=0.0,
            scale="linear" if name in PSNR else "log",
        )
        for name in rows[0].measures
    }


def title_of(group: Group) -> str:
    """A comparison's name."""
    return f"{group[0]}, {group[1]} channels, {group[2]:,} steps"


def verdict(group: Group, analysed: dict[str, Analysis]) -> str:
    """A sentence on wavelet_vae against conv_vae."""
    said = []
    for name, one in analysed.items():
        if name == "psnr" or name not in PSNR:
            log, unit = one.scale == "log", "" if one.scale == "log" else " dB"
            ours, other = (plus_minus(one.arms[arm], log) for arm in (BASELINE, "conv"))
            title = "PSNR" if name == "psnr" else name
            said.append(f"{title} {ours} against {other}{unit} ({WORDS[one.comparisons['conv'].verdict]})")
    return f"{title_of(group)}, wavelet_vae against conv_vae: {', '.join(said)}."


# The verdict is conv_vae's, the sentence the wavelet VAE's.
WORDS = {
    "better": "worse",
    "worse": "better",
    "within noise": "within noise",
    "equivalent": "equal",
    "not enough seeds": "one seed says nothing of its spread",
}


def table(group: Group, rows: list[Row], analysed: dict[str, Analysis]) -> list[str]:
    """A row an arm, then a row a gap to the wavelet VAE."""
    heads = {"psnr": "PSNR, dB ↑"} | {f"psnr {band}": f"{band}, dB ↑" for band in BANDS}
    lines = [
        f"## {title_of(group)}",
        "",
        f"| | parameters | {' | '.join(heads.get(name, f'{name} ↓') for name in analysed)} |",
        f"|---|---|{'---|' * len(analysed)}",
    ]
    counts = {row.arm: row.parameters for row in rows}
    for arm in ARMS:
        cells = [plus_minus(one.arms[arm], one.scale == "log") for one in analysed.values()]
        lines.append(f"| {TITLES[arm]} | {counts[arm]:,} | {' | '.join(cells)} |")
    for arm in RIVALS:
        cells = [gap(one.comparisons[arm], one.scale == "log") for one in analysed.values()]
        share = counts[arm] / counts[BASELINE] - 1
        lines.append(f"| {TITLES[arm]} − wavelet_vae | {share:+.2%} | {' | '.join(cells)} |")
    return lines


def plus_minus(arm: ArmSummary, distance: bool) -> str:
    """A mean and half its interval: dB to two places, distances to three digits."""
    mean, half = arm.mean, arm.half_width
    if not distance:
        return f"{mean:.2f}" if half is None else f"{mean:.2f} ± {half:.2f}"
    places = max(0, 2 - math.floor(math.log10(mean))) if mean > 0 else 2
    return f"{mean:.{places}f}" if half is None else f"{mean:.{places}f} ± {half:.{places}f}"


def gap(comparison: Comparison, share: bool) -> str:
    """A difference and its interval; ``share``: of the baseline, in per cent."""
    unit, scale = ("%", 100) if share else ("", 1)
    texts = [
        f"{scale * value:+.{1 if share else 2}f}"
        for value in (comparison.difference, comparison.low, comparison.high)
        if value is not None
    ]
    return texts[0] + unit + (f" [{texts[1]}, {texts[2]}]" if len(texts) == 3 else "")


def settings_table(groups: dict[Group, list[Row]]) -> list[str]:
    """What was trained, and how long it took."""
    lines = [
        "| data | pictures, held-out | channels | grid | width | steps | batch | optimiser | seeds | "
        "seconds to train, median |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (data, channels, steps), rows in groups.items():
        row, seeds = rows[0], dict.fromkeys(row.seed for row in rows)
        lines.append(
            " | ".join(
                [
                    f"| {data}",
                    f"{row.pictures:,}",
                    f"{channels}",
                    f"{row.grid} x {row.grid}",
                    f"{row.width}",
                    f"{steps:,}",
                    f"{row.batch}",
                    row.optimiser,
                    ", ".join(map(str, seeds)),
                    f"{np.median([row.seconds for row in rows]):.0f} |",
                ]
            )
        )
    return lines


def draw(plan: Plan, groups: dict[Group, list[Row]], found: dict[Group, dict[str, Analysis]], path: Path) -> None:
    """Reconstructions of each data set's first comparison, beside the gaps in PSNR by band; a row a data set."""
    names = list(dict.fromkeys(group[0] for group in groups))
    with matplotlib.rc_context(STYLE):
        figure = new_figure(2.6 * len(names) + 0.3, 10.5)
        axes = figure.subplots(len(names), 2, squeeze=False, width_ratios=(1.1, 1))
        for (left, right), data in zip(axes, names, strict=True):
            mine = [group for group in groups if group[0] == data]
            pixels = pictures_of(settings_of(plan.stages(data)[0]), SHOWN)
            _draw_pictures(left, mine[0], pixels, groups[mine[0]])
            _draw_gaps(right, {group: found[group] for group in mine})
        figure.savefig(path, dpi=DPI)


def _draw_pictures(axes: Axes, group: Group, pixels: Tensor, rows: list[Row]) -> None:
    """Originals above what each arm's first seed makes of them."""
    seed, side = rows[0].seed, pixels.shape[1]
    folders = [Path(next(row.weights for row in rows if (row.arm, row.seed) == (arm, seed))) for arm in ARMS]
    lines = [pixels, *(to_pixels(reconstructed(folder, pixels)) for folder in folders)]
    sheet = np.full((len(lines) * (side + GAP) - GAP, len(pixels) * (side + GAP) - GAP, 3), 255, np.uint8)
    for i, line in enumerate(lines):
        for j, image in enumerate(line.numpy()):
            top, start = i * (side + GAP), j * (side + GAP)
            sheet[top : top + side, start : start + side] = image
    axes.imshow(sheet, interpolation="nearest")
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks(
        [i * (side + GAP) + side / 2 for i in range(len(lines))],
        ["original", *(TITLES[arm].replace(", ", "\n") for arm in ARMS)],
    )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title(f"{title_of(group)}, seed {seed}")


def _draw_gaps(axes: Axes, found: dict[Group, dict[str, Analysis]]) -> None:
    """PSNR of the other arms less the wavelet VAE's, of pixels and of bands, with intervals."""
    series = [(group, arm) for arm in RIVALS for group in found]
    axes.axhline(0, color=INK, linewidth=1)
    for place, (group, arm) in enumerate(series):
        compared = [found[group][name].comparisons[arm] for name in PSNR]
        gaps = np.array([one.difference for one in compared])
        x = np.arange(len(PSNR)) + (place - (len(series) - 1) / 2) * 0.8 / max(len(series), 4)
        errors = None
        if all(one.low is not None for one in compared):
            errors = [gaps - [one.low for one in compared], [one.high for one in compared] - gaps]
        axes.errorbar(
            x,
            gaps,
            errors,
            fmt=MARKERS[1 + RIVALS.index(arm)],
            color=HUES[1 + RIVALS.index(arm)],
            markersize=5.5,
            linewidth=1.2,
            fillstyle=FILLS[list(found).index(group) % len(FILLS)],
            label=f"{TITLES[arm]}, {group[1]} channels, {group[2]:,} steps",
        )
    axes.set_xticks(range(len(PSNR)), ["pixels", *BANDS])
    axes.margins(y=0.15)
    axes.set_ylabel("PSNR less wavelet_vae's, dB")
    axes.set_title(f"{next(iter(found))[0]}: below 0, wavelet_vae is better")
    axes.legend(fontsize=7, labelcolor=MUTED, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
