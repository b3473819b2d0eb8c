"""The measures that are taken on images, each a stage: quality, alignment, skills, copies of training images."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.judges.images import to_float
from eval.metrics.bootstrap import bootstrap_interval, wilson_interval
from eval.metrics.clip_score import clip_scores
from eval.metrics.duplicates import QUANTILE, Duplicates, find_duplicates
from eval.metrics.fid import RankDeficientWarning, frechet_distance
from eval.metrics.objects import count_objects
from eval.metrics.quality import Measure, measure_quality
from eval.metrics.skills import COUNT, Share, SkillSummary, right_by_skill, summarise_skills
from eval.results import DUPLICATES, Number
from eval.stages.data import CHUNK, Rows, attributes_of, fresh_pictures, in_parts
from eval.stages.evaluation import Evaluation
from eval.stages.features import features_of
from eval.stages.images import MAIN, TRAINED, Images, Stored
from iris.io.files import read_json, write_json
from iris.settings import facts
from iris.stages.engine import Stage

REAL = 1024  # real images that a judge is tried on
LOWER = ("fid", "fid_infinity", "kid")
UNITS = {"kid": "x1000"}
SCORES = "scores.json"
SETS = {MAIN: "the captions that quality is measured on", TRAINED: "training captions, with noise of their own"}


@dataclass
class Scores:
    """What a measure found.

    Attributes:
        numbers: by name; those of a judge end in its name ("fid/shapes").
        details: what is no number.
        rows: set -> column -> value an image.
    """

    numbers: dict[str, Number] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, dict[str, Sequence[Any]]] = field(default_factory=dict)


class Score(Stage):
    """A measure of an evaluation.

    Args:
        run: what it is taken on.
    """

    def __init__(self, run: Evaluation, **needs: Any) -> None:
        super().__init__(run.context, needs)
        self.run, self.found = run, Scores()

    @property
    def label(self) -> str:
        return self.kind

    @abstractmethod
    def measure(self) -> None:
        """Take it into ``found``."""

    def facts(self) -> dict[str, Any]:
        return {"judge": self.run.judging.facts(), "confidence": self.run.measure.confidence, "seed": self.run.seed}

    def work(self) -> dict[str, Any]:
        self.found = Scores()
        self.measure()
        write_json(self.folder / SCORES, asdict(self.found))
        return {}

    def scores(self) -> Scores:
        """As they are on disk."""
        known = read_json(self.folder / SCORES)
        return Scores({name: Number.of(one) for name, one in known["numbers"].items()}, known["details"], known["rows"])

    def add(self, name: str, number: Number, **made_with: Any) -> None:
        """Keep a number with all that it was made with."""
        self.found.numbers[f"{name}/{self.run.judging.name}"] = number.with_facts(self.run.judged(**made_with))

    def rows(self, name: str, images: Images | Stored, **columns: Sequence[Any]) -> None:
        """Keep a value an image."""
        captions = images.captions or [""] * len(images.images())
        self.found.rows.setdefault(name, {"caption": captions}).update(columns)


class Quality(Score):
    """FID and its kin against the data's real images."""

    kind = "quality"

    def __init__(self, run: Evaluation) -> None:
        self.real = run.reference(run.data.split, run.measure.reference)
        self.features = run.features(run.main)
        super().__init__(run, features=self.features, reference=self.real)

    def facts(self) -> dict[str, Any]:
        return super().facts() | facts(self.run.measure.quality)

    def measure(self) -> None:
        run, chosen = self.run, self.run.measure.quality
        made, real = self.features.features(), self.real.features()
        run.context.progress.say(f"quality: {len(made):,} images against {len(real):,} real ones")
        found = measure_quality(
            made,
            real,
            metrics=chosen.metrics,
            seed=run.seed,
            blocks=chosen.blocks,
            neighbours=chosen.neighbours,
            density_neighbours=chosen.density_neighbours,
            confidence=run.measure.confidence,
        )
        split = run.data.split
        known = {"data": run.data.name, "data_fingerprint": run.data.fingerprint(split), "split": split}
        for name, measure in found.measures.items():
            self.add(name, _number(measure, run.measure.confidence), **known)
        about = {"title": found.title, "made_with": found.made_with, "reference": found.reference}
        self.found.details["quality"] = about | {"real_against_real": _floor(real.values)}
        self.rows(MAIN, run.main)


def _floor(real: Tensor) -> float:
    """The Fréchet distance of one half of the real images' features from the other."""
    half = len(real) // 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankDeficientWarning)  # the numbers beside it have it as a flag
        return frechet_distance(real[:half], real[half:])


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


class Alignment(Score):
    """CLIP score: 100 times the cosine of each image with its caption, none below 0, averaged over prompts."""

    kind = "alignment"

    def __init__(self, run: Evaluation) -> None:
        super().__init__(run, images=run.main)

    def facts(self) -> dict[str, Any]:
        data = self.run.data
        return super().facts() | {"data": data.fingerprint(data.split), "split": data.split}

    def measure(self) -> None:
        run, images, captions = self.run, self.run.main.images(), self.run.main.captions
        cosines = self._cosines(in_parts(images, captions))
        found = bootstrap_interval(clip_scores(cosines), captions, confidence=run.measure.confidence, seed=run.seed)
        prompts = f"{found.n:,} prompts" if found.n < len(cosines) else "images"
        how = f"bootstrap over {prompts}, {found.method}, {found.resamples:,} resamples"
        number = Number(
            found.value, "", "higher", found.low, found.high, found.standard_error, found.confidence, how, len(cosines),
            seed=found.seed,
        )  # fmt: skip
        self.add("clip_score", number, prefix=run.judging.choice.prefix)
        self.rows(MAIN, run.main, cosine=cosines.tolist())
        real = self._cosines(run.data.rows(run.data.split, min(REAL, len(cosines))))
        self.found.details["alignment"] = {
            "mean_cosine": float(cosines.mean()),
            "real_n": len(real),
            "real_clip_score": float(clip_scores(real).mean()),
        }

    def _cosines(self, parts: Iterator[Rows]) -> Tensor:
        """Cosine of each image with its caption: float64 [N]."""
        found, done, report = [], 0, self.run.report("images with captions")
        for part in parts:
            images = to_float(torch.as_tensor(part.images))
            found.append(self.run.judging.judge.similarity(images, part.captions).cpu().double())
            done += len(part.captions)
            report(done)
        return torch.cat(found)


class Skills(Score):
    """Accuracy by skill, on captions of combinations that training showed and of those that it never did."""

    kind = "skills"

    def __init__(self, run: Evaluation) -> None:
        super().__init__(run, **run.named)

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"data": self.run.data.fingerprint(self.run.data.split)}

    def measure(self) -> None:
        run, sets = self.run, self.run.named
        read, wanted = zip(*(self._read(name, images) for name, images in sets.items()), strict=True)
        found = summarise_skills(run.data.world, _joined(read), _joined(wanted), run.measure.confidence)
        captions = [caption for images in sets.values() for caption in images.captions][:REAL]
        for prefix, part in (
            ("accuracy", found.seen),
            ("heldout_accuracy", found.heldout),
            ("accuracy_gap", found.gap),
        ):
            for skill, share in part.items():
                if isinstance(share, Share):
                    self.add(f"{prefix}_{skill}", _share(share, prefix, run.measure.confidence), data=run.data.name)
        real = self._real(captions)
        self.found.details["skills"] = found.as_dict() | {"real": real.as_dict(), "real_n": len(captions)}

    def _real(self, captions: list[str]) -> SkillSummary:
        """The same of new real pictures of these captions: what the judge itself gets wrong."""
        run, world = self.run, self.run.data.world
        images = np.concatenate([*fresh_pictures(world, captions, len(captions), run.seed, run.data.size)])
        return summarise_skills(world, self._attributes(images), attributes_of(world, captions), run.measure.confidence)

    def _read(self, name: str, images: Images | Stored) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Classes read off the images and those that their captions name; which skills are right goes to the rows."""
        world = self.run.data.world
        read = self._attributes(images.images())
        wanted = {k: torch.as_tensor(v) for k, v in attributes_of(world, images.captions).items()}
        objects = torch.full_like(read[COUNT], len(world.pairs))
        right = right_by_skill({k: read[k] == {**wanted, COUNT: objects}[k] for k in read})
        heldout = world.is_heldout({attribute: classes.numpy() for attribute, classes in wanted.items()})
        columns = {f"right_{skill}": hits.int().tolist() for skill, hits in right.items()}
        self.rows(name, images, heldout=heldout.astype(int).tolist(), **columns)
        return read, wanted

    def _attributes(self, images: np.ndarray) -> dict[str, Tensor]:
        """Attribute -> class [N] read by the judge, and under "count" the number of objects."""
        parts, report = [], self.run.report("attributes")
        for i in range(0, len(images), CHUNK):
            part = torch.as_tensor(np.ascontiguousarray(images[i : i + CHUNK]))
            read = self.run.judging.judge.attributes(self.run.data.world.name, to_float(part))
            parts.append({**{name: classes.cpu() for name, classes in read.items()}, COUNT: count_objects(part)})
            report(min(i + CHUNK, len(images)), len(images))
        return _joined(parts)


def _share(share: Share, prefix: str, confidence: float) -> Number:
    gap = prefix == "accuracy_gap"
    how = "Newcombe's interval of a difference" if gap else "Wilson's interval of a share"
    better = "lower" if gap else "higher"
    return Number(share.value, "", better, share.low, share.high, None, confidence, how, share.n)


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([torch.as_tensor(part[name]) for part in parts]) for name in parts[0]}


class Copies(Score):
    """Images closer to a training image than real unseen images are, and a page to look at them."""

    kind = "duplicates"

    def __init__(self, run: Evaluation) -> None:
        self.set, self.images = run.searched
        self.features = run.features(self.images)
        self.training = run.reference("train", run.measure.duplicates.training)
        super().__init__(run, features=self.features, training=self.training)

    def facts(self) -> dict[str, Any]:
        chosen = {k: v for k, v in facts(self.run.measure.duplicates).items() if k not in ("samples", "training")}
        return super().facts() | chosen | {"data": self.run.data.fingerprint("validation")}

    def measure(self) -> None:
        from eval.report.duplicates_page import expected_high, write_page  # 70 MB that planning does not need

        run, chosen, data = self.run, self.run.measure.duplicates, self.run.data
        parts = (
            fresh_pictures(data.world, self.images.captions, chosen.heldout, run.seed, data.size)
            if data.world
            else (part.images for part in data.rows("validation", chosen.heldout))
        )
        heldout = features_of(run.judging.judge, parts, run.report("unseen real images"), chosen.heldout)
        quantile = chosen.quantile or max(QUANTILE, 1 / len(heldout))
        found = find_duplicates(self.features.features().values, self.training.features().values, heldout, quantile)
        flagged, confidence = int(found.flagged.sum()), run.measure.confidence
        low, high = wilson_interval(flagged / found.n, found.n, confidence)
        how = "Wilson's interval of a share"
        share = Number(flagged / found.n, "", "lower", low, high, None, confidence, how, found.n, found.training_n)
        self.add("duplicate_share", share, data=data.name, quantile=quantile, heldout_n=found.heldout_n)
        self.rows(
            self.set,
            self.images,
            nearest_cosine=found.cosine.distance.tolist(),
            training_index=found.cosine.index.tolist(),
            nearest_l2=found.euclidean.distance.tolist(),
            flagged=found.flagged.int().tolist(),
        )
        self.found.details["duplicates"] = {
            "rule": found.rule,
            "flagged": flagged,
            "expected": found.expected,
            "expected_high": expected_high(found),
            "n": found.n,
            "training_n": found.training_n,
            "heldout_n": found.heldout_n,
            "quantile": quantile,
            "set": self.set,
        }
        write_page(
            found,
            self.images.images(),
            _Neighbours(self.run, found, chosen.pairs),
            self.folder / DUPLICATES,
            f"{run.judging.name}, weights {run.judging.about['sha256'][:16]}",
            self.images.captions,
            min(chosen.pairs, found.n),
            "Does this model copy?",
            {"Images": f"{found.n:,} of {SETS[self.set]}"},
        )


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


# Measure -> its stage.
SCORED: dict[str, type[Score]] = {one.kind: one for one in (Quality, Alignment, Skills, Copies)}
