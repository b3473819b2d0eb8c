"""How often the verdicts are wrong, on simulated grids: ``uv run python -m benchmarks.error_rates``.

Log-normal noise through the project's own functions: intervals, choice of pairing, words. Writes benchmarks/error_rates.md.
A rate of 5 % from 4,000 grids is known to 0.34 points (one standard error).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats as distributions

from ablations.answer.intervals import LEVEL, Design, level_of, widths
from ablations.answer.stats import BLOCK_LEVEL, OWN_MEAN, seed_blocks

OUT = Path("benchmarks/error_rates.md")
SEEDS, ARMS = (2, 3, 5, 10), (2, 5, 40)
LOOKS = (3, 5, 10)
Grids = np.ndarray  # [R, A, S]


def _noise(shape: tuple[int, ...], draws: np.random.Generator) -> Grids:
    return draws.standard_normal(shape)


def _louder(arm: int, factor: float) -> Callable[[tuple[int, ...], np.random.Generator], Grids]:
    def made(shape: tuple[int, ...], draws: np.random.Generator) -> Grids:
        found = _noise(shape, draws)
        found[:, arm] *= factor
        return found

    return made


def _shared(*without: int, factor: float = 1.0) -> Callable[[tuple[int, ...], np.random.Generator], Grids]:
    """An effect of the seed, twice the noise; ``without`` are arms that it leaves alone, ``factor`` is the baseline's."""

    def made(shape: tuple[int, ...], draws: np.random.Generator) -> Grids:
        found = _noise(shape, draws)
        found[:, 0] *= factor
        effect = 2 * draws.standard_normal((shape[0], 1, shape[2]))
        for arm in range(shape[1]):
            found[:, arm] += 0 if arm in without else effect[:, 0]
        return found

    return made


def _ladder(shape: tuple[int, ...], draws: np.random.Generator) -> Grids:
    return _noise(shape, draws) * np.linspace(1, 4, shape[1])[:, None]


def _heavy(shape: tuple[int, ...], draws: np.random.Generator) -> Grids:
    return draws.standard_t(3, shape)


def _missing(shape: tuple[int, ...], draws: np.random.Generator) -> Grids:
    """One arm has lost all seeds but two."""
    found = _noise(shape, draws)
    found[:, 1, 2:] = np.nan
    return found


CASES = {
    "equal noise": _noise,
    "a seed effect, shared by all": _shared(),
    "baseline 4 times noisier": _louder(0, 4),
    "baseline 4 times quieter": _louder(0, 0.25),
    "one arm 4 times noisier": _louder(1, 4),
    "noise from 1 to 4": _ladder,
    "a seed effect, not in one arm": _shared(1),
    "a seed effect, not in the baseline": _shared(0),
    "a seed effect and a baseline 4 times noisier": _shared(factor=4),
    "heavy tails (t with 3 df)": _heavy,
    "one arm with two seeds only": _missing,
}
ASSUMED = tuple(CASES)[:2]  # where what the intervals assume holds


@dataclass(frozen=True)
class Rates:
    """In per cent."""

    alarms: float  # grids with an interval that does not hold the truth, here no difference
    means: float  # of the arms' own intervals that hold the arm's mean


def decided(tables: Grids, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Differences, half widths [R, A - 1], and the estimated noise [R], as ``ablations.answer.stats`` finds them."""
    counts = tuple(int(n) for n in np.isfinite(tables[0]).sum(1))
    shapes = (counts[0], *sorted(counts[1:]))
    plain = widths(tables, False, level)
    half, noise = plain.half(Design(shapes, False, level).critical), plain.noise
    if len(set(counts)) == 1:
        paired = widths(tables, True, level)
        use = seed_blocks(tables)[1] < BLOCK_LEVEL
        half = np.where(use[:, None], paired.half(Design(shapes, True, level).critical), half)
        noise = np.where(use, paired.noise, noise)
    return plain.difference, half, noise


def _means_held(tables: Grids) -> float:
    """Of arms without a shared seed effect, how many intervals of an arm's own mean hold it."""
    there = np.isfinite(tables[0])
    count = there.sum(1)
    mean = np.nanmean(tables, 2)
    squares = np.nansum((tables - mean[..., None]) ** 2, 2)
    df = int((count - 1).sum())
    pooled = np.sqrt(squares.sum(1) / df)[:, None] * distributions.t.ppf(1 - LEVEL / 2, df)
    own = np.sqrt(squares / (count - 1)) * distributions.t.ppf(1 - OWN_MEAN / 2, count - 1)
    return 100 * float((np.abs(mean) <= np.maximum(pooled, own) / np.sqrt(count)).mean())


def rates(case: str, arms: int, seeds: int, grids: int) -> Rates:
    """Of ``grids`` simulated grids."""
    tables = CASES[case]((grids, arms, seeds), np.random.default_rng([arms, seeds, len(case)]))
    difference, half, _ = decided(tables)
    held = _means_held(tables) if "seed effect" not in case else float("nan")
    return Rates(100 * float((np.abs(difference) > half).any(1).mean()), held)


def three_looks(arms: int, grids: int) -> float:
    """False alarms when 3 seeds are looked at, then 5, then 10, until one look shows a difference; per cent."""
    tables = _noise((grids, arms, max(LOOKS)), np.random.default_rng([arms, 7]))
    alarm = np.zeros(grids, bool)
    for look, seeds in enumerate(LOOKS, 1):
        difference, half, _ = decided(tables[:, :, :seeds], level_of(look))
        alarm |= (np.abs(difference) > half).any(1)
    return 100 * float(alarm.mean())


def power_at_the_gap(arms: int, seeds: int, grids: int) -> float:
    """How often a true gap is decided that another grid of this design has printed as the one it decides, in per cent."""
    draws = np.random.default_rng([arms, seeds])
    printed = decided(draws.standard_normal((grids, arms, seeds)))[2] * Design((seeds,) * arms).gap
    difference, half, _ = decided(draws.standard_normal((grids, arms, seeds)))
    return 100 * float((difference[:, 0] + printed > half[:, 0]).mean())


def cost(arms: int, seeds: int, grids: int) -> float:
    """Median half width where noise is equal, over that of Dunnett's test."""
    tables = _noise((grids, arms, seeds), np.random.default_rng([arms, seeds, 1]))
    half = decided(tables)[1]
    plain = widths(tables, False)
    dunnett = np.quantile(np.abs(plain.difference / plain.error).max(1), 1 - LEVEL)
    return float(np.median(half) / np.median(dunnett * plain.error))


def table(grids: int) -> list[str]:
    """The page's lines."""
    sizes = [(arms, seeds) for arms in ARMS for seeds in SEEDS]
    head = "| " + " | ".join(["", *(f"{arms} arms, {seeds} seeds" for arms, seeds in sizes)]) + " |"
    rule = "|---" * (len(sizes) + 1) + "|"
    lines, held = [head, rule], [head, rule]
    for case in CASES:
        found = [rates(case, arms, seeds, grids) for arms, seeds in sizes]
        lines.append(f"| {case} | " + " | ".join(f"{one.alarms:.1f}" for one in found) + " |")
        if found[0].means == found[0].means:
            held.append(f"| {case} | " + " | ".join(f"{one.means:.1f}" for one in found) + " |")
    power = [f"{power_at_the_gap(arms, seeds, grids):.0f}" for arms, seeds in sizes]
    looked = [f"{three_looks(arms, grids):.1f} of {arms} arms" for arms in ARMS]
    price = [f"{cost(arms, seeds, grids):.2f}" for arms, seeds in sizes]
    gaps = [f"{Design((seeds,) * arms).gap:.1f}" for arms, seeds in sizes]
    return [
        "## False alarms: grids of equal arms in which an interval leaves out zero, per cent",
        *lines,
        "",
        f"Looks at 3, 5 and 10 seeds, each at its own level: {', '.join(looked)}.",
        "## An arm's own interval holds its mean, per cent",
        *held,
        "## What it costs",
        head,
        rule,
        f"| gap that is seen with 80 % power, in standard deviations of a trial | {' | '.join(gaps)} |",
        f"| power at the gap that another grid has printed, per cent | {' | '.join(power)} |",
        f"| median width over that of Dunnett's test | {' | '.join(price)} |",
    ]


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grids", type=int, default=4000, help="simulated grids a case (default: 4000)")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    text = [
        "# How often the verdicts are wrong",
        "",
        f"Simulated by `uv run python -m benchmarks.error_rates --grids {given.grids}`. A rate of "
        "5 is known to 0.34 (one standard error). All arms have the same mean; an interval holds the truth when no false alarm is given, so that the intervals of a "
        "grid hold together in 100 less these per cent.",
        "",
    ]
    for line in table(given.grids):
        text += ["", line, ""] if line.startswith("## ") else [line]
    given.out.write_text("\n".join(text) + "\n", encoding="utf-8")
    print(given.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
