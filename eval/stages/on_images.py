"""The measures that are taken on images: quality, alignment, skills, duplicates of training images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from eval.metrics.attributes import wilson_interval
from eval.metrics.bootstrap import bootstrap_interval
from eval.metrics.duplicates import QUANTILE, Duplicates, find_duplicates
from eval.metrics.images import to_float
from eval.metrics.objects import count_objects
from eval.metrics.quality import Measure, measure_quality
from eval.metrics.skills import COUNT, Share, right_by_skill, summarise_skills
from eval.report.duplicates_page import expected_high, write_page
from eval.report.results import DUPLICATES, Number
from eval.stages.data import Rows, attributes_of, features_of, fresh_pictures
from eval.stages.evaluation import HELDOUT, MAIN, TRAINED, Evaluation
from eval.stages.samples import Samples

CHUNK = 256
REAL = 1024  # real images that a judge is tried on
LOWER = ("fid", "fid_infinity", "kid")
UNITS = {"kid": "x1000"}


def quality(run: Evaluation) -> None:
    """FID and its kin against the data's real images."""
    chosen, judge = run.settings.measure, run.judge.name
    reference = run.real(run.data.split, chosen.reference)
    run.progress.say(f"quality: {len(run.features):,} images against {len(reference):,} real ones")
    found = measure_quality(
        run.features,
        reference,
        metrics=chosen.quality.metrics,
        seed=run.settings.seed,
        blocks=chosen.quality.blocks,
        neighbours=chosen.quality.neighbours,
        density_neighbours=chosen.quality.density_neighbours,
        confidence=chosen.confidence,
    )
    facts = run.judged(data=run.data.name, data_fingerprint=run.data.fingerprint(run.data.split), split=run.data.split)
    for name, measure in found.measures.items():
        run.add(f"{name}/{judge}", _number(measure, chosen.confidence), **facts)
    run.results.details["quality"] = {"title": found.title, "made_with": found.made_with, "reference": found.reference}


def _number(measure: Measure, confidence: float) -> Number:
    better = "lower" if measure.name in LOWER else "higher"
    return Number(
        measure.value,
        UNITS.get(measure.name, ""),
        better,
        measure.low,
        measure.high,
        measure.standard_error,
        confidence,
        measure.method,
        measure.n,
        measure.reference_n,
        measure.seed,
        flags=measure.flags,
        replicates=measure.replicates,
    )


def alignment(run: Evaluation) -> None:
    """CLIP score: 100 times the cosine of each image with its caption, none below 0, averaged over prompts."""
    chosen = run.settings.measure
    cosines = _cosines(run, _rows(run.main))
    found = bootstrap_interval(
        100 * cosines.clamp_min(0), run.main.captions, confidence=chosen.confidence, seed=run.settings.seed
    )
    prompts = f"{found.n:,} prompts" if found.n < len(cosines) else "images"
    number = Number(
        found.value,
        "",
        "higher",
        found.low,
        found.high,
        found.standard_error,
        found.confidence,
        f"bootstrap over {prompts}, {found.method}, {found.resamples:,} resamples",
        len(cosines),
        seed=found.seed,
    )
    run.add(f"clip_score/{run.judge.name}", number, **run.judged(prefix=run.settings.judge.prefix))
    run.rows[MAIN]["cosine"] = cosines.tolist()
    real = _cosines(run, run.data.rows(run.data.split, min(REAL, len(cosines))))
    run.results.details["alignment"] = {
        "mean_cosine": float(cosines.mean()),
        "real_n": len(real),
        "real_clip_score": float(100 * real.clamp_min(0).mean()),
    }


def _cosines(run: Evaluation, parts: Iterator[Rows]) -> Tensor:
    """Cosine of each image with its caption: float64 [N]."""
    found, done = [], 0
    for part in parts:
        found.append(run.judge.similarity(to_float(torch.as_tensor(part.images)), part.captions).cpu().double())
        done += len(part.captions)
        run.progress.done(f"judge {run.judge.name}: images with captions", done)
    return torch.cat(found)


def _rows(made: Samples) -> Iterator[Rows]:
    for i in range(0, len(made.images), CHUNK):
        yield Rows(made.images[i : i + CHUNK], made.captions[i : i + CHUNK])


def skills(run: Evaluation) -> None:
    """Accuracy by skill, on captions of combinations that training showed and of those that it never did."""
    sets = {MAIN: run.main}
    count = run.settings.measure.heldout
    if run.subject.count is None and count:
        sets[HELDOUT] = run.make(HELDOUT, run.data.captions("heldout", count), count)
    read, wanted = zip(*(_read_skills(run, name, made) for name, made in sets.items()), strict=True)
    world, confidence = run.data.world, run.settings.measure.confidence
    found = summarise_skills(world, _joined(read), _joined(wanted), confidence)
    captions = [caption for made in sets.values() for caption in made.captions][:REAL]
    images = np.concatenate([*fresh_pictures(world, captions, len(captions), run.settings.seed, run.data.size)])
    real = summarise_skills(world, read_attributes(run, images), attributes_of(world, captions), confidence)
    facts = run.judged(data=run.data.name)
    for prefix, part in (("accuracy", found.seen), ("heldout_accuracy", found.heldout), ("accuracy_gap", found.gap)):
        for skill, share in part.items():
            if isinstance(share, Share):
                run.add(f"{prefix}_{skill}/{run.judge.name}", _share(share, prefix, confidence), **facts)
    run.results.details["skills"] = found.as_dict() | {"real": real.as_dict(), "real_n": len(captions)}


def _share(share: Share, prefix: str, confidence: float) -> Number:
    gap = prefix == "accuracy_gap"
    return Number(
        share.value,
        "",
        "lower" if gap else "higher",
        share.low,
        share.high,
        None,
        confidence,
        "Newcombe's interval of a difference" if gap else "Wilson's interval of a share",
        share.n,
    )


def _read_skills(run: Evaluation, name: str, made: Samples) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Classes read off the images and those that their captions name; which skills are right goes to the rows."""
    read = read_attributes(run, made.images)
    wanted = {k: torch.as_tensor(v) for k, v in attributes_of(run.data.world, made.captions).items()}
    objects = torch.full_like(read[COUNT], len(run.data.world.pairs))
    right = right_by_skill({k: read[k] == {**wanted, COUNT: objects}[k] for k in read})
    heldout = run.data.world.is_heldout({name: classes.numpy() for name, classes in wanted.items()})
    run.rows[name] |= {
        "heldout": heldout.astype(int).tolist(),
        **{f"right_{skill}": hits.int().tolist() for skill, hits in right.items()},
    }
    return read, wanted


def read_attributes(run: Evaluation, images: np.ndarray) -> dict[str, Tensor]:
    """Attribute -> class [N] read by the judge, and under "count" the number of objects."""
    parts = []
    for i in range(0, len(images), CHUNK):
        part = torch.as_tensor(images[i : i + CHUNK])
        read = run.judge.attributes(run.data.world.name, to_float(part))
        parts.append({**{name: classes.cpu() for name, classes in read.items()}, COUNT: count_objects(part)})
        run.progress.done(f"judge {run.judge.name}: attributes", min(i + CHUNK, len(images)), len(images))
    return _joined(parts)


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([torch.as_tensor(part[name]) for part in parts]) for name in parts[0]}


def duplicates(run: Evaluation) -> None:
    """Images closer to a training image than real unseen images are, and a page to look at them."""
    chosen = run.settings.measure.duplicates
    made, name = _searched(run)
    training = run.real("train", _training_count(run))
    parts = (
        fresh_pictures(run.data.world, made.captions, chosen.heldout, run.settings.seed, run.data.size)
        if run.data.world
        else (part.images for part in run.data.rows("validation", chosen.heldout))
    )
    heldout = features_of(run.judge, parts, run.ticks(f"judge {run.judge.name}: unseen real images"), chosen.heldout)
    quantile = chosen.quantile or max(QUANTILE, 1 / len(heldout))
    features = run.features if name == MAIN else run.features_of(made.images, "images of training captions")
    found = find_duplicates(features.values, training.values, heldout, quantile)
    flagged = int(found.flagged.sum())
    share = flagged / found.n
    low, high = wilson_interval(share, found.n, run.settings.measure.confidence)
    run.add(
        f"duplicate_share/{run.judge.name}",
        Number(
            share,
            "",
            "lower",
            low,
            high,
            None,
            run.settings.measure.confidence,
            "Wilson's interval of a share",
            found.n,
            found.training_n,
        ),
        **run.judged(data=run.data.name, quantile=quantile, heldout_n=found.heldout_n),
    )
    run.rows[name] |= {
        "nearest_cosine": found.cosine.distance.tolist(),
        "training_index": found.cosine.index.tolist(),
        "nearest_l2": found.euclidean.distance.tolist(),
        "flagged": found.flagged.int().tolist(),
    }
    run.results.details["duplicates"] = {
        "rule": found.rule,
        "flagged": flagged,
        "expected": found.expected,
        "expected_high": expected_high(found),
        "n": found.n,
        "training_n": found.training_n,
        "heldout_n": found.heldout_n,
        "quantile": quantile,
        "set": name,
    }
    write_page(
        found,
        made.images,
        _Neighbours(run, found, chosen.pairs),
        run.out / DUPLICATES,
        _judge_words(run),
        made.captions,
        min(chosen.pairs, found.n),
        f"Does {run.results.name} copy?",
        {"Model": run.subject.model, "Images": f"{found.n:,} of {_SETS[name]}"},
    )


_SETS = {MAIN: "the captions that quality is measured on", TRAINED: "training captions, with noise of their own"}


def _searched(run: Evaluation) -> tuple[Samples, str]:
    """The images to search, and the name of their set: a model copies, if it does, on captions it was trained on."""
    count = run.settings.measure.duplicates.samples
    if run.data.world is None or run.subject.count is not None:
        return run.main, MAIN
    captions = run.data.world.draw("train", count, run.data.seed + 1, size=run.data.size).captions
    return run.make(TRAINED, captions, count), TRAINED


def _training_count(run: Evaluation) -> int | None:
    wanted = run.settings.measure.duplicates.training
    if wanted is None and run.data.world is not None:
        return run.settings.data.train or run.data.training_count
    return wanted


def _judge_words(run: Evaluation) -> str:
    return f"{run.judge.name}, weights {run.judge.sha256[:16]}"


class _Neighbours:
    """Those training images that the page shows, read once; see ``eval.report.duplicates_page.Pictures``."""

    def __init__(self, run: Evaluation, found: Duplicates, pairs: int) -> None:
        self.length = found.training_n
        wanted = {found.neighbour(i) for i in found.closest(pairs)}
        self.images: dict[int, np.ndarray] = {}
        first = 0
        for part in run.data.rows("train", 1 + max(wanted)):
            last = first + len(part.images)
            self.images |= {i: np.array(part.images[i - first]) for i in wanted if first <= i < last}
            first = last

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> np.ndarray:
        return self.images[index]
