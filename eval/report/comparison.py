"""Differences of two models' results: paired where they were made from the same prompts, refused where they cannot be.

A difference is B - A. Per-image values (CLIP cosines, skills, flags) are paired over prompts and bootstrapped. FID and
KID are paired over the blocks of their jackknives: leaving out the same prompts on both sides, the part of the error
that both share cancels. What has no replicates adds its errors in quadrature, as if the two were independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from eval.metrics.bootstrap import RESAMPLES, Interval, jackknife_interval, paired_difference
from eval.metrics.fid import jackknife_error
from eval.results import Results
from iris.errors import SettingError

# What must agree in how two numbers were made.
JUDGED = (
    "judge",
    "judge_sha256",
    "resize",
    "image_size",
    "prefix",
    "data",
    "data_fingerprint",
    "split",
    "quantile",
    "heldout_n",
)
RUN = ("threads", "batch", "device", "hardware")
NOISE, A_BETTER, B_BETTER, EQUAL, UNKNOWN = "within noise", "A better", "B better", "equal", "no interval"
SETS = {"accuracy": "0", "heldout_accuracy": "1"}  # values of the column heldout


@dataclass(frozen=True)
class Difference:
    """B - A of one metric.

    Attributes:
        first, second: values of A and of B.
        value: second - first.
        low, high: of the interval; None where there is none.
        method: how the interval was made.
        pairing: in short, what was paired.
        n: independent pairs, or images where nothing is paired.
        verdict: A better, B better, within noise, equal (in every pair), or no interval.
    """

    metric: str
    first: float
    second: float
    value: float
    low: float | None
    high: float | None
    standard_error: float | None
    confidence: float
    method: str
    pairing: str
    n: int
    better: str
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """All differences, and metrics that cannot be compared with the reasons.

    ``same_noise``: image i of both sides was made from the same seed, not only from the same prompt.
    """

    differences: list[Difference]
    refused: dict[str, str]
    confidence: float
    same_noise: bool


def compare_results(
    a: Results, b: Results, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """Differences B - A of every metric that both results have.

    Raises:
        SettingError: none can be compared; says why for each.
    """
    found, refused = [], {}
    for name in a.numbers.keys() & b.numbers.keys():
        why = why_not(a, b, name)
        if why:
            refused[name] = why
        else:
            found.append(_difference(a, b, name, confidence, resamples, seed))
    for name in a.numbers.keys() ^ b.numbers.keys():
        refused[name] = f"only {'A' if name in a.numbers else 'B'} has it"
    order = list(dict.fromkeys([*a.numbers, *b.numbers]))
    if not found:
        reasons = "; ".join(f"{name}: {refused[name]}" for name in order) or "no numbers in either"
        raise SettingError(f"nothing of A and B can be compared: {reasons}")
    found.sort(key=lambda one: order.index(one.metric))
    return Comparison(found, {name: refused[name] for name in order if name in refused}, confidence, _same_noise(a, b))


def why_not(a: Results, b: Results, name: str) -> str | None:
    """Why a metric of two results cannot be compared; None if it can."""
    first, second = a.numbers[name], b.numbers[name]
    keys = JUDGED if "judge" in first.made_with or "judge" in second.made_with else RUN
    for key in keys:
        one, other = first.made_with.get(key), second.made_with.get(key)
        if one != other:
            return f"{key} differs: {_words(one)} and {_words(other)}"
    if "judge" in first.made_with:
        for key in ("n", "reference_n"):
            one, other = getattr(first, key), getattr(second, key)
            if one != other:
                return f"{key} differs: {one} and {other} images; the value depends on it"
    column = column_of(name)
    if column is None or _base(name) in ("fid", "kid"):
        return None
    return None if pairs(a, b, name) is not None else "the captions of A and B are not the same, image by image"


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(str(part) for part in value.values())
    return str(value)[:32] if value is not None else "none"


def _base(name: str) -> str:
    return name.partition("/")[0]


def column_of(name: str) -> str | None:
    """The column of per_image.csv that a metric is the mean of; None for the others."""
    base = _base(name)
    if base == "clip_score":
        return "cosine"
    if base == "duplicate_share":
        return "flagged"
    for prefix in ("heldout_accuracy_", "accuracy_gap_", "accuracy_"):
        if base.startswith(prefix):
            return f"right_{base.removeprefix(prefix)}"
    return None


def rows_of(results: Results, name: str) -> list[dict[str, Any]]:
    """Rows that a metric is the mean over."""
    column, base = column_of(name), _base(name)
    rows = [row for row in results.per_image if row.get(column) not in (None, "")]
    for prefix, heldout in SETS.items():
        if base.startswith(f"{prefix}_") and not base.startswith("accuracy_gap_"):
            return [row for row in rows if str(row["heldout"]) == heldout]
    return rows


def pairs(a: Results, b: Results, name: str) -> tuple[np.ndarray, np.ndarray, list[str]] | None:
    """Values [N] of A and of B and their captions, image by image; None where the images do not pair up."""
    first, second = rows_of(a, name), rows_of(b, name)
    column = column_of(name)
    addresses = [[(row["set"], str(row["index"]), row["caption"]) for row in rows] for rows in (first, second)]
    if len(first) < 2 or addresses[0] != addresses[1] or not all(address[2] for address in addresses[0]):
        return None
    values = [np.asarray([float(row[column]) for row in rows]) for rows in (first, second)]
    if column == "cosine":
        values = [100 * part.clip(min=0) for part in values]
    return values[0], values[1], [row["caption"] for row in first]


def _difference(a: Results, b: Results, name: str, confidence: float, resamples: int, seed: int) -> Difference:
    first, second = a.numbers[name], b.numbers[name]
    if name.startswith("accuracy_gap_"):
        low, high, error, method, pairing, n = _gap(a, b, name, confidence, resamples, seed)
    elif column_of(name) is not None:
        found = _paired(pairs(a, b, name), name, confidence, resamples, seed)
        low, high, error, n = found.low, found.high, found.standard_error, found.n
        method = f"paired bootstrap over prompts, {found.method}, {found.resamples:,} resamples"
        pairing = f"{n:,} prompts"
    else:
        low, high, error, method, pairing, n = _distance(a, b, name, confidence)
    value = second.value - first.value
    return Difference(
        name,
        first.value,
        second.value,
        value,
        low,
        high,
        error,
        confidence,
        method,
        pairing,
        n,
        first.better,
        verdict(low, high, first.better),
    )


def _paired(
    values: tuple[np.ndarray, np.ndarray, list[str]], name: str, confidence: float, resamples: int, seed: int
) -> Interval:
    """Paired bootstrap over prompts: of a CLIP score, the mean over prompts; of shares, the mean over images."""
    first, second, captions = values
    if column_of(name) == "cosine":
        return paired_difference(first, second, captions, confidence=confidence, resamples=resamples, seed=seed)
    return paired_difference(
        _by_prompt(first, captions), _by_prompt(second, captions), confidence=confidence, resamples=resamples, seed=seed
    )


def _by_prompt(values: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """One value a prompt, the sum over its images, scaled so that their mean is the mean over all images."""
    number = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    sums = np.bincount([number[caption] for caption in captions], weights=values)
    return sums * len(sums) / len(values)


def _same_noise(a: Results, b: Results) -> bool:
    """Whether both sides started from the same seeds."""
    seeds = [next((number.made_with.get("images_seed") for number in one.numbers.values()), None) for one in (a, b)]
    return seeds[0] is not None and seeds[0] == seeds[1]


Parts = tuple[float | None, float | None, float | None, str, str, int]


def _distance(a: Results, b: Results, name: str, confidence: float) -> Parts:
    """Interval of a metric of whole sets; none for one without an error, such as bytes."""
    first, second = a.numbers[name], b.numbers[name]
    value, n = second.value - first.value, min(first.n, second.n)
    if first.standard_error is None or second.standard_error is None:
        how = "two runs, not interleaved" if _base(name) == "latency_ms" else "no random error"
        return None, None, None, how, "", n
    blocks = len(first.replicates)
    if blocks >= 2 and blocks == len(second.replicates) and _same_captions(a, b):
        error = jackknife_error(list(np.subtract(second.replicates, first.replicates)))
        low, high = jackknife_interval(value, error, blocks, confidence)
        return low, high, error, "paired delete-a-block jackknife, Student's t", f"{blocks} blocks", n
    error = math.hypot(first.standard_error, second.standard_error)
    if error == 0:  # all images inside, or none, on both sides
        return None, None, None, "no error can be seen in these samples", "", n
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * error
    return value - half, value + half, error, "errors added in quadrature, as if independent", "", n


def _same_captions(a: Results, b: Results) -> bool:
    captions = [[row["caption"] for row in one.per_image if row["set"] == "main"] for one in (a, b)]
    return bool(captions[0]) and captions[0] == captions[1] and all(captions[0])


def _gap(a: Results, b: Results, name: str, confidence: float, resamples: int, seed: int) -> Parts:
    """Seen and held-out captions are different ones: their paired errors add in quadrature."""
    skill = name.removeprefix("accuracy_gap_")
    found = []
    for prefix in SETS:
        values = pairs(a, b, f"{prefix}_{skill}")
        if values is None:
            return None, None, None, "the images of one part do not pair up", "", 0
        found.append(_paired(values, name, confidence, resamples, seed))
    error = math.hypot(*(one.standard_error for one in found))
    value = b.numbers[name].value - a.numbers[name].value
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * error
    n = min(one.n for one in found)
    return (
        value - half,
        value + half,
        error,
        "paired over prompts in each part, errors added in quadrature",
        f"{n:,} prompts",
        n,
    )


def verdict(low: float | None, high: float | None, better: str) -> str:
    """Which side an interval of B - A speaks for."""
    if low is None or high is None:
        return UNKNOWN
    if low == high == 0:
        return EQUAL
    if low <= 0 <= high or better not in ("lower", "higher"):
        return NOISE
    return B_BETTER if (high < 0) == (better == "lower") else A_BETTER


def by_chance(differences: Sequence[Difference], confidence: float) -> float:
    """How many of the intervals would leave out 0 if A and B were the same model."""
    return (1 - confidence) * sum(one.verdict not in (EQUAL, UNKNOWN) for one in differences)
