"""Stages features and reference: computed once, never mistaken for others, refused where they have changed."""

import shutil
import threading

import numpy as np
import pytest
import torch
from evaluations import captioned, evaluation
from judge_files import TINY, clip_folder, clip_network

from eval.judges import load_judge
from eval.metrics.quality import measure_quality
from eval.stages.features import FEATURES, STATISTICS, Reference, extract_features
from iris.data import WORLDS
from iris.errors import SettingError

QUICK = ("measure=smoke", "measure.samples=16", "sample.steps=1", "sample.guidance=1")
METRICS = ("fid", "kid", "precision", "recall", "density", "coverage")


def reference(runs, *words, count=24):
    run = evaluation(runs, *QUICK, *words)
    return run.reference(run.data.split, count)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A judge that is quick to load, in two places."""
    place = clip_folder(clip_network(TINY), TINY, tmp_path_factory.mktemp("clip") / "one")
    shutil.copytree(place, place.with_name("other"))
    return place


def test_features_of_real_images_are_computed_once_and_read_as_they_were(tmp_path):
    stage, judge = reference(tmp_path), load_judge("shapes")
    stage.make()
    wanted = extract_features(judge, WORLDS["shapes"].draw("validation", 24, 0).images)
    again = reference(tmp_path)
    assert again.done and again.result["count"] == 24
    found = again.features()
    assert "judge" not in vars(again.judging)  # was not loaded for it
    assert torch.equal(found.values, stage.features().values)
    torch.testing.assert_close(found.values, wanted.values)
    assert found.metadata["judge_sha256"] == judge.sha256 and found.metadata["count"] == 24
    assert found.metadata["data"] == again.data.fingerprint("validation")
    other = extract_features(judge, WORLDS["shapes"].draw("validation", 40, 1).images)
    kept, made = (measure_quality(other, side, metrics=METRICS) for side in (found, wanted))
    assert kept["fid"].value == pytest.approx(made["fid"].value) and kept["kid"].low == pytest.approx(made["kid"].low)
    with pytest.raises(ValueError, match="image_size differs"):
        measure_quality(extract_features(judge, WORLDS["shapes2"].draw("train", 16, 0).images), found)


@pytest.mark.parametrize(
    "word", ["data.seed=1", "measure.split=heldout", "data.size=64", "data=shapes2", "judge=clip", "judge.prefix='a '"]
)
def test_every_part_of_the_key_counts(word, clip, tmp_path):
    judge = (f"judge.weights={clip}",) if word.startswith("judge") else ()
    judge += ("judge=clip",) if word.startswith("judge.") else ()
    usual = reference(tmp_path, *(judge if word.startswith("judge.") else ()))
    assert reference(tmp_path, *judge, word).key != usual.key


def test_the_number_counts_and_where_things_lie_does_not(clip, tmp_path):
    judge = ("judge=clip", f"judge.weights={clip}")
    usual = reference(tmp_path, *judge)
    assert reference(tmp_path, *judge, count=23).key != usual.key
    other = ("judge=clip", f"judge.weights={clip.with_name('other')}", "seed=4", "measure.confidence=0.9", "threads=1")
    assert reference(tmp_path, *other).key == usual.key
    one, two = captioned(tmp_path / "one", 12), tmp_path / "two"
    shutil.copytree(one, two)
    first, second = (reference(tmp_path, *judge, "data=folder", f"data.path={path}") for path in (one, two))
    assert first.key == second.key
    captioned(two, 13)
    assert reference(tmp_path, *judge, "data=folder", f"data.path={two}").key != first.key


def test_features_of_images_hang_on_the_images(tmp_path):
    run, other = (evaluation(tmp_path, *QUICK, f"seed={seed}") for seed in (0, 1))
    stage = run.features(run.main)
    stage.make()
    wanted = extract_features(load_judge("shapes"), run.main.images())
    torch.testing.assert_close(stage.features().values, wanted.values)
    assert stage.features().metadata == wanted.metadata
    assert other.features(other.main).key != stage.key
    assert [one.kind for one in stage.chain()] == ["images", "features"]


def test_all_rows_are_taken_where_no_number_is_given(clip, tmp_path):
    words = ("judge=clip", f"judge.weights={clip}", "data=folder", f"data.path={captioned(tmp_path / 'dogs', 20)}")
    run = evaluation(tmp_path, *QUICK, *words)
    stage = run.reference("train", None)
    stage.make()
    assert stage.result["count"] == 18 and stage.features().metadata["count"] == 18
    world = evaluation(tmp_path, *QUICK, "data.validation=40")
    assert (world.reference("validation", None).count, world.reference("train", None).count) == (40, 16384)


@pytest.mark.parametrize("name", [FEATURES, STATISTICS])
def test_what_has_changed_is_refused(name, clip, tmp_path):
    stage = reference(tmp_path, "judge=clip", f"judge.weights={clip}")
    stage.make()
    path = stage.folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(SettingError, match=f"{name} has changed since it was written.*delete the folder"):
        stage.features()
    path.unlink()
    with pytest.raises(SettingError, match=f"{name} is missing; delete the folder"):
        stage.features()
    shutil.rmtree(stage.folder)
    stage.make()
    assert len(stage.features()) == 24


def test_a_failure_leaves_nothing_that_is_taken(clip, tmp_path):
    words = ("judge=clip", f"judge.weights={clip}", "data=folder", f"data.path={captioned(tmp_path / 'dogs', 20)}")
    run = evaluation(tmp_path, *QUICK, *words)
    stage = run.reference("train", 19)
    with pytest.raises(SettingError, match="measure.reference=19: split train of data folder has only 18 usable rows"):
        stage.make()
    assert not stage.done and run.reference("train", 18).make()


def test_two_askers_make_it_once(clip, tmp_path):
    made, gate = [], threading.Barrier(2)

    class Counted(Reference):
        def work(self):
            made.append(1)
            return super().work()

    def ask():
        run = evaluation(tmp_path, *QUICK, "judge=clip", f"judge.weights={clip}")
        stage = Counted(run.context, run.judging, run.data, "validation", 24)
        gate.wait()
        stage.make()
        found.append(stage.features().values)

    found = []
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1] and len(found) == 2 and torch.equal(*found)


def test_extract_features_takes_every_kind_of_images():
    judge, pictures = load_judge("shapes"), WORLDS["shapes"].draw("train", 5, 0).images
    floats = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    whole = extract_features(judge, pictures, batch=2, seed=3)
    assert whole.values.shape == (5, judge.feature_width) and whole.metadata["seed"] == 3
    torch.testing.assert_close(extract_features(judge, floats).values, whole.values, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="pictures: at least 2 are needed, got 1"):
        extract_features(judge, pictures[:1], name="pictures")
    with pytest.raises(ValueError, match="not finite"):
        extract_features(judge, np.full((3, 3, 32, 32), np.nan, np.float32))
