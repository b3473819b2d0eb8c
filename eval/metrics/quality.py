"""All quality metrics of one set of generated images, each with its error and with how it was made.

A value belongs to its judge: keys end in the judge's name ("fid/shapes"), and only what Inception's published weights
give is called FID in words (``Quality.title``).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.metrics.bootstrap import jackknife_interval, wilson_interval
from eval.metrics.features import Features
from eval.metrics.fid import RankDeficientWarning, check_comparable, frechet_replicates, jackknife_error
from eval.metrics.fid_infinity import ENOUGH, ExtrapolationWarning, fid_infinity
from eval.metrics.kid import kid_interval, kid_replicates
from eval.metrics.manifold import DENSITY_NEIGHBOURS, NEIGHBOURS, ManifoldMetrics, check_neighbours, manifold_metrics
from iris.errors import require_choice

METRICS = ("fid", "fid_infinity", "kid", "precision", "recall", "density", "coverage")
OF_NEIGHBOURS = {"precision", "recall", "density", "coverage"}
FEWEST = 8  # images from which all seven can be computed


@dataclass(frozen=True)
class Measure:
    """One number with its uncertainty and its making."""

    name: str  # of METRICS
    value: float
    standard_error: float  # of drawing other images of the same number against the same reference
    low: float  # of the interval with the confidence that was asked for
    high: float
    n: int
    reference_n: int
    seed: int | None  # of random choices, None where there are none
    method: str
    flags: tuple[str, ...] = ()  # why the number should not be quoted as it stands
    replicates: tuple[float, ...] = ()  # of fid and kid without each block, for paired differences


@dataclass(frozen=True)
class Quality:
    """The measures of one set of images, by name, and what their features were made with."""

    measures: dict[str, Measure]
    made_with: dict[str, Any]  # the features' metadata: judge, judge_sha256, resize, image_size, ...
    reference: dict[str, Any]  # the reference's

    def __getitem__(self, name: str) -> Measure:
        return self.measures[name]

    @property
    def title(self) -> str:
        """What the Fréchet distance is called: "FID" for Inception's published weights alone."""
        return str(self.made_with.get("metric_name", f"FD ({self.made_with['judge']})"))


def measure_quality(
    features: Features,
    reference: Features,
    *,
    metrics: Sequence[str] = METRICS,
    seed: int = 0,
    blocks: int = 20,
    neighbours: int = NEIGHBOURS,
    density_neighbours: int = DENSITY_NEIGHBOURS,
    confidence: float = 0.95,
) -> Quality:
    """FID, FID extrapolated, KID, precision, recall, density and coverage of generated images.

    Args:
        features: of N generated images (``eval.stages.features.extract_features``).
        reference: of M real ones, by the same judge from images of the same size.
        metrics: which of ``METRICS``; the extrapolation takes about 25 times an FID's time.
        seed: of the extrapolation's subsets.
        blocks: of the jackknives, 2 <= blocks; lowered to half of N or M where there are fewer.
        neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.
        confidence: of all intervals.

    Returns:
        A number that should not be quoted is flagged in ``Measure.flags``; no warning is given besides.

    Raises:
        ValueError: fewer than 8 images on a side; another judge, weights, resizing or image size than the reference's;
            an argument out of range.
        SettingError: an unknown metric.
    """
    for name in metrics:
        require_choice("metrics", name, METRICS)
    check_comparable(features.statistics, reference.statistics)
    blocks = usable_blocks(len(features), len(reference), metrics, blocks, neighbours, density_neighbours)
    found: list[Measure] = []
    if {"fid", "fid_infinity"} & set(metrics):
        found += _frechet(features, reference, seed if "fid_infinity" in metrics else None, blocks, confidence)
    if "kid" in metrics:
        found.append(_kernel(features, reference, blocks, confidence))
    if OF_NEIGHBOURS & set(metrics):
        found += _manifold(
            manifold_metrics(features.values, reference.values, neighbours, density_neighbours, blocks), confidence
        )
    return Quality(
        {measure.name: measure for measure in found if measure.name in metrics},
        dict(features.metadata),
        dict(reference.metadata),
    )


def usable_blocks(
    n: int, reference_n: int, metrics: Sequence[str], blocks: int, neighbours: int, density_neighbours: int
) -> int:
    """Blocks of the jackknives, at most half of either number of images; can be asked before any image is made.

    Raises:
        ValueError: too few images for the metrics.
    """
    for name, count in (("features", n), ("reference", reference_n)):
        if count < FEWEST:
            raise ValueError(f"{name}: at least {FEWEST} images are needed for all metrics, got {count}")
    blocks = min(blocks, n // 2, reference_n // 2)
    if OF_NEIGHBOURS & set(metrics):
        check_neighbours(n, reference_n, neighbours, density_neighbours, blocks)
    return blocks


def _frechet(
    features: Features, reference: Features, seed: int | None, blocks: int, confidence: float
) -> list[Measure]:
    """FID, and with a seed its extrapolation. What would be a warning is a flag."""
    width, sizes = features.values.shape[1], (len(features), len(reference))
    generated, real = (_rank_flag(count, width, name) for count, name in zip(sizes, ("generated", "real"), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankDeficientWarning)
        value, replicates = frechet_replicates(features.values, reference.statistics, blocks)
    error = jackknife_error(replicates)
    low, high = jackknife_interval(value, error, blocks, confidence, low=0.0)
    fid = Measure(
        "fid",
        value,
        error,
        low,
        high,
        *sizes,
        None,
        f"float64; delete-a-block jackknife, {blocks} blocks",
        generated + real,
        tuple(replicates),
    )
    if seed is None:
        return [fid]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExtrapolationWarning)
        limit = fid_infinity(features.values, reference.statistics, seed=seed, sampling_error=error)
    low, high = jackknife_interval(limit.value, limit.standard_error, blocks, confidence)
    few = (
        ()
        if limit.reliable
        else (f"{limit.n} images of {width} features: below {ENOUGH * width} the extrapolation under-estimates",)
    )
    line = (
        f"FID at 1/N = 0 of a line through {len(limit.counts)} sizes from {limit.counts[0]} to {limit.counts[-1]}; "
        f"error of the fit {limit.fit_error:.3g}, of sampling {limit.sampling_error:.3g}, residual "
        f"{limit.residual:.3g}"
    )
    return [fid, Measure("fid_infinity", limit.value, limit.standard_error, low, high, *sizes, seed, line, real + few)]


def _rank_flag(count: int, width: int, name: str) -> tuple[str, ...]:
    full = count > width
    return () if full else (f"{count} {name} images of {width} features: the covariance is rank deficient",)


def _kernel(features: Features, reference: Features, blocks: int, confidence: float) -> Measure:
    value, replicates = kid_replicates(features.values, reference.values, blocks)
    low, high = kid_interval(features.values, reference.values, blocks, confidence)
    return Measure(
        "kid",
        value,
        jackknife_error(replicates),
        low,
        high,
        len(features),
        len(reference),
        None,
        f"x1000, cubic kernel, unbiased, all pairs; delete-a-block jackknife, {blocks} blocks; the interval "
        "also counts the reference's sampling error",
        (),
        tuple(replicates),
    )


def _manifold(found: ManifoldMetrics, confidence: float) -> list[Measure]:
    k, wide = found.neighbours, found.density_neighbours
    jackknife = f"delete-a-block jackknife, {found.blocks} blocks"

    def interval(name: str) -> tuple[float, float]:
        value, error = getattr(found, name), getattr(found, f"{name}_se")
        if name == "precision":
            return wilson_interval(value, found.n, confidence)
        blocks = found.n if name == "density" else found.blocks
        return jackknife_interval(value, error, blocks, confidence, 0.0, math.inf if name == "density" else 1.0)

    rows = (
        ("precision", f"k = {k}; binomial error, Wilson interval"),
        ("recall", f"k = {k}; {jackknife}"),
        ("density", f"k = {wide}; error of the mean"),
        ("coverage", f"k = {wide}; {jackknife}"),
    )
    return [
        Measure(
            name,
            getattr(found, name),
            getattr(found, f"{name}_se"),
            *interval(name),
            found.n,
            found.reference_n,
            None,
            method,
        )
        for name, method in rows
    ]
