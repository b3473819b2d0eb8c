"""Stage images: made once, from addressed noise, by any batch size; a stopped one goes on."""

import hashlib
import shutil
from dataclasses import replace

import numpy as np
import pytest
from evaluations import SHIPPED, captioned, evaluation
from PIL import Image

from eval.stages.images import PARTS, TRAINED, CaptionSet, Images, Stored
from eval.subjects import Sample, open_subject
from eval.subjects.iris_model import IrisModel
from iris.data import WORLDS
from iris.errors import SettingError
from iris.pipeline import IrisPipeline

SAMPLING = ("sample.steps=1", "sample.guidance=1")


class Stopped(IrisModel):
    """The shipped model, killed when it is to make image ``stop``, or when all are made and it is asked what it is."""

    stop: int | str | None = None

    def generate(self, captions, seed, first):
        self.calls.append(first)
        if first == self.stop:
            raise KeyboardInterrupt
        return super().generate(captions, seed, first)

    def facts(self):
        if self.stop == "facts":
            raise KeyboardInterrupt
        return super().facts()


def stopped(runs, stop=None, batch=4):
    """A stage of 10 images by such a model."""
    subject = Stopped(str(SHIPPED), Sample(steps=1, guidance=1, batch=batch), "float32", "cpu")
    subject.calls, subject.stop = [], stop
    run = evaluation(runs, *SAMPLING, "measure.samples=10")
    return Images(run.context, replace(run.maker, opened=subject), run.main.set, run.seed), subject.calls


def close(one, other):
    """Batch sizes round differently."""
    return one.shape == other.shape and np.abs(one.astype(int) - other).max() <= 1


def test_images_are_made_once(tmp_path):
    first, calls = stopped(tmp_path)
    first.make()
    again, later = stopped(tmp_path)
    again.make()
    assert (calls, later) == ([0, 4, 8], []) and first.key == again.key
    assert first.images().shape == (10, 32, 32, 3) and first.images().dtype == np.uint8
    assert again.result["sha256"] == hashlib.sha256(first.images().tobytes()).hexdigest()
    assert again.result["model"]["nfe"] == 1 and again.result["model"]["parameters"]["generator"] > 0


@pytest.mark.parametrize(("stop", "later"), [(8, [8]), ("facts", [])])
def test_a_stopped_stage_goes_on(stop, later, tmp_path):
    """Also where all images were made and only the result was not written."""
    stage, calls = stopped(tmp_path, stop)
    with pytest.raises(KeyboardInterrupt):
        stage.make()
    assert calls == [0, 4, 8] and not stage.done and stage.begun == (stop == 8)
    stage, calls = stopped(tmp_path)
    stage.make()
    whole, _ = stopped(tmp_path / "whole")
    whole.make()
    assert calls == later and stage.result["sha256"] == whole.result["sha256"]
    assert not (stage.folder / PARTS).exists()


def test_the_size_of_a_batch_changes_no_key_and_only_rounding(tmp_path):
    alone = evaluation(tmp_path / "a", *SAMPLING, "measure.samples=10").main
    three = evaluation(tmp_path / "b", *SAMPLING, "measure.samples=10", "sample.batch=3").main
    assert alone.maker.opened.batch == 256 and three.maker.opened.batch == 3 and alone.key == three.key
    for stage in (alone, three):
        stage.make()
    assert close(alone.images(), three.images())
    stage, calls = stopped(tmp_path / "c", 8)
    with pytest.raises(KeyboardInterrupt):
        stage.make()
    stage, calls = stopped(tmp_path / "c", batch=1)  # and goes on in other batches
    stage.make()
    assert calls == [8, 9] and close(stage.images(), alone.images())


def test_images_of_large_pictures_are_made_few_at_once():
    subject = open_subject(str(SHIPPED), None, Sample(), "float32", "cpu")
    for size, batch in (((32, 32), 256), ((64, 64), 64), ((512, 512), 1), ((2048, 1024), 1)):
        subject.size = size
        subject.take(None)
        assert subject.batch == batch
    subject.take(7)
    assert subject.batch == 7


def test_image_i_starts_from_the_noise_of_seed_and_i(tmp_path):
    few, more, other = (
        evaluation(tmp_path, *SAMPLING, f"measure.samples={count}", f"seed={seed}").main
        for count, seed in ((4, 0), (8, 0), (8, 1))
    )
    for stage in (few, more, other):
        stage.make()
    assert close(few.images(), more.images()[:4])
    assert np.abs(more.images().astype(int) - other.images()).mean() > 1
    pipeline = IrisPipeline.from_pretrained(SHIPPED)
    made = pipeline.generate(more.captions[5:], more.maker.opened.settings, seed=0, first=5)
    assert close(made.numpy(), more.images()[5:])


@pytest.mark.parametrize(
    "word",
    [
        "sample.steps=2",
        "sample.guidance=2",
        "sample.shift=2",
        "dtype=bfloat16",
        "seed=1",
        "data.seed=1",
        "data=shapes2",
        "measure.split=heldout",
        "measure.samples=9",
    ],
)
def test_what_determines_the_images_is_in_their_key(word, tmp_path):
    usual = (*SAMPLING, "measure.samples=10")
    assert evaluation(tmp_path, *usual, word).main.key != evaluation(tmp_path, *usual).main.key


def test_where_the_model_lies_and_how_it_is_run_is_not(tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "moved")
    usual = (*SAMPLING, "measure.samples=10")
    other = ("threads=1", "measure.timeout=5", "judge=inception", "measure.what=latency", "measure.confidence=0.9")
    moved = evaluation(tmp_path, *usual, f"model={tmp_path / 'moved'}", *other).main
    assert moved.key == evaluation(tmp_path, *usual).main.key


def test_sets_have_captions_of_their_own(tmp_path):
    run = evaluation(tmp_path, "measure=smoke", "data.seed=4")
    world = WORLDS["shapes"]
    name, searched = run.searched
    assert run.main.captions == world.draw("validation", 32, 4).captions
    assert run.heldout.captions == world.draw("heldout", 16, 4).captions
    assert name == TRAINED and searched.captions == world.draw("train", 16, 5).captions  # of pictures it never saw
    assert len({stage.key for stage in (run.main, run.heldout, searched)}) == 3
    assert evaluation(tmp_path, "measure.heldout=0").heldout is None


def test_a_set_has_at_most_the_captions_that_there_are(tmp_path):
    path = captioned(tmp_path / "dogs", 20)
    data = evaluation(tmp_path, "data=folder", f"data.path={path}", "measure.split=train").data
    found = CaptionSet("main", data, "train", 100).read()
    assert len(found) == 18 and set(found) < {f"a dog {i}" for i in range(20)}  # a tenth of the rows is held out
    assert CaptionSet("main", data, "train", 2).read() == found[:2]


# -- stored images ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "pictures"
    place.mkdir()
    for i in range(5):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(place / f"{i}.png")
    (place / "captions.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    return place


def stored(folder, count=None):
    return Stored(open_subject(str(folder), None, Sample(), "float32", "cpu"), count)


def test_stored_images_are_the_first_ones(folder):
    first = stored(folder, 3)
    assert first.images()[:, 0, 0, 0].tolist() == [0, 1, 2] and first.captions == ["one", "two", "three"]
    assert first.done and list(first.chain()) == [] and stored(folder).count == 5
    with pytest.raises(SettingError, match=r"measure\.samples=6: .*pictures holds 5 images"):
        stored(folder, 6)


def test_stored_images_are_known_by_pixels_captions_and_number(folder):
    keys = [stored(folder).key, stored(folder, 3).key]
    (folder / "captions.txt").write_text("one\ntwo\nthree\nfour\nsix\n")
    keys.append(stored(folder).key)
    Image.new("RGB", (32, 32), (9, 0, 0)).save(folder / "0.png")
    keys.append(stored(folder).key)
    assert len(set(keys)) == 4
    shutil.copytree(folder, folder.with_name("moved"))
    assert stored(folder.with_name("moved")).key == keys[-1]
