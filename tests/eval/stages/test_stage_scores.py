"""The measures on images as stages: what their keys hang on, what they find, and that it is read as it was written."""

import json
import warnings

import numpy as np
import pytest
import torch
from evaluations import captioned, evaluation
from judge_files import TINY, clip_folder, clip_network

from eval.metrics.duplicates import find_duplicates
from eval.metrics.fid import RankDeficientWarning, frechet_distance
from eval.results import DUPLICATES
from eval.stages.data import fresh_pictures
from eval.stages.features import extract_features
from eval.stages.images import HELDOUT, MAIN, TRAINED
from eval.stages.scores import SCORED
from iris.data import WORLDS

QUICK = ("measure=smoke", "measure.samples=24", "measure.reference=64")
ONE_STEP = ("sample.steps=1", "sample.guidance=1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where what was made is shared by the tests here."""
    return tmp_path_factory.mktemp("runs")


def score(name, runs, *words):
    stored = any(word.startswith("model=") for word in words)
    return SCORED[name](evaluation(runs, *QUICK, *(() if stored else ONE_STEP), *words))


def taken(name, runs, *words):
    """The same, made."""
    stage = score(name, runs, *words)
    stage.make()
    return stage


@pytest.fixture(scope="module")
def drawn(runs):
    """An array of real pictures of one world with their captions."""
    pictures = WORLDS["shapes"].draw("validation", 24, 3)
    np.savez(runs / "drawn.npz", images=pictures.images, captions=np.asarray(pictures.captions))
    return f"model={runs / 'drawn.npz'}"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    place = clip_folder(clip_network(TINY), TINY, tmp_path_factory.mktemp("clip") / "one")
    return "judge=clip", f"judge.weights={place}"


def test_a_score_is_read_as_it_was_written_and_needs_no_judge(tmp_path):
    for name in SCORED:
        stage, again = taken(name, tmp_path), taken(name, tmp_path)
        found = again.scores()
        assert again.key == stage.key and "judge" not in vars(again.run.judging)
        assert found.numbers == stage.found.numbers and found.rows == stage.found.rows
        assert found.details == json.loads(json.dumps(stage.found.details))
        for key, number in found.numbers.items():
            assert key.endswith("/shapes") and number.made_with["judge"] == "shapes"


@pytest.mark.parametrize(
    ("word", "changed"),
    [
        ("measure.confidence=0.9", {"quality", "alignment", "skills", "duplicates"}),
        ("seed=1", {"quality", "alignment", "skills", "duplicates"}),
        ("sample.steps=2", {"quality", "alignment", "skills", "duplicates"}),
        ("measure.quality.blocks=5", {"quality"}),
        ("measure.quality.metrics=fid", {"quality"}),
        ("measure.reference=65", {"quality"}),
        ("measure.heldout=17", {"skills"}),
        ("measure.duplicates.samples=17", {"duplicates"}),
        ("measure.duplicates.training=129", {"duplicates"}),
        ("measure.duplicates.heldout=65", {"duplicates"}),
        ("measure.duplicates.quantile=0.1", {"duplicates"}),
        ("measure.timeout=5", set()),
        ("measure.latency.rounds=9", set()),
        ("sample.batch=3", set()),
    ],
)
def test_a_score_hangs_on_what_it_is_made_of(word, changed, runs):
    assert {name for name in SCORED if score(name, runs, word).key != score(name, runs).key} == changed


@pytest.mark.parametrize("word", ["measure.split=train", "data.seed=1", "data.size=40"])
def test_scores_of_stored_images_hang_on_the_real_ones_beside_them(word, drawn, runs):
    """Of a model's images the captions are those of the data; of stored ones nothing but the data says so."""
    for name in ("alignment", "skills") if word.startswith("data") else ("alignment",):
        assert score(name, runs, drawn, word).key != score(name, runs, drawn).key


def test_another_judge_judges_the_same_images(runs, clip):
    ours, theirs = (score("alignment", runs, *judge) for judge in ((), clip))
    assert ours.key != theirs.key and ours.needs["images"].key == theirs.needs["images"].key
    assert [stage.kind for stage in theirs.chain()] == ["images", "alignment"]
    assert [stage.kind for stage in score("quality", runs).chain()] == ["images", "features", "reference", "quality"]


def test_quality_says_how_far_real_images_are_from_real_ones(runs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a number that should not be quoted has a flag
        stage = taken("quality", runs, "measure.reference=80")
    real = extract_features(stage.run.judging.judge, WORLDS["shapes"].draw("validation", 80, 0).images).values
    with pytest.warns(RankDeficientWarning):
        floor = frechet_distance(real[:40], real[40:])
    assert stage.scores().details["quality"]["real_against_real"] == pytest.approx(floor)
    fid = stage.scores().numbers["fid/shapes"]
    assert (fid.n, fid.reference_n, fid.made_with["split"]) == (24, 80, "validation")
    assert len(fid.replicates) == 12 and any("rank deficient" in flag for flag in fid.flags)


def test_a_score_of_captions_may_stand_beside_a_single_real_image(clip, tmp_path):
    """A split of one row; images enough are there."""
    place = captioned(tmp_path / "dogs", 6)
    real = captioned(tmp_path / "real", 2)
    words = (f"model={place}", *clip, "data=folder", f"data.path={real}", "measure.samples=null")
    stage = taken("alignment", tmp_path, *words)
    details = stage.scores().details["alignment"]
    assert details["real_n"] == 1 and stage.scores().numbers["clip_score/clip"].n == 6


def test_rows_say_which_set_an_image_is_of(runs):
    skills, copies = (taken(name, runs).scores().rows for name in ("skills", "duplicates"))
    assert {name: len(rows["caption"]) for name, rows in skills.items()} == {MAIN: 24, HELDOUT: 16}
    assert {name: len(rows["caption"]) for name, rows in copies.items()} == {TRAINED: 16}
    assert list(skills[MAIN])[:3] == ["caption", "heldout", "right_colour"] and "right_all" in skills[MAIN]
    assert set(skills[HELDOUT]["heldout"]) == {1} and set(skills[MAIN]["heldout"]) == {0}
    assert list(copies[TRAINED]) == ["caption", "nearest_cosine", "training_index", "nearest_l2", "flagged"]


def test_copies_are_looked_for_among_images_of_training_captions(runs):
    stage = taken("duplicates", runs)
    run, found = stage.run, stage.scores()
    judge, world = run.judging.judge, WORLDS["shapes"]
    made, training = stage.images.images(), world.draw("train", 128, 0).images
    unseen = np.concatenate([*fresh_pictures(world, stage.images.captions, 64, 0, 32)])
    wanted = find_duplicates(*(extract_features(judge, part).values for part in (made, training, unseen)), 1 / 64)
    assert found.numbers["duplicate_share/shapes"].value == float(wanted.flagged.double().mean())
    torch.testing.assert_close(
        torch.tensor(found.rows[TRAINED]["nearest_l2"]).double(), wanted.euclidean.distance.double()
    )
    details = found.details["duplicates"]
    assert (details["set"], details["n"], details["training_n"], details["heldout_n"]) == (TRAINED, 16, 128, 64)
    assert details["quantile"] == 1 / 64
    assert "<img" in (stage.folder / DUPLICATES).read_text()


def test_of_stored_images_copies_are_looked_for_among_themselves(drawn, runs):
    """And a copy of a training picture is one."""
    training = WORLDS["shapes"].draw("train", 24, 0)
    np.savez(runs / "copied.npz", images=training.images, captions=np.asarray(training.captions))
    shares = []
    for model in (drawn, f"model={runs / 'copied.npz'}"):
        stage = taken("duplicates", runs, model)
        shares.append(stage.scores().numbers["duplicate_share/shapes"].value)
        assert stage.scores().details["duplicates"]["set"] == MAIN
    assert shares[0] < 0.3 and shares[1] == 1
