"""Which measures are possible for a model or images, data and a judge, and why others are not."""

import numpy as np
import pytest
from evaluations import captioned, evaluation
from judge_files import TINY, clip_folder, clip_network, inception_archive

from eval.settings import IMAGES, WHAT
from eval.stages.possible import possible
from iris.data import WORLDS
from iris.errors import SettingError


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the words of a test name: data, images and judges."""
    root = tmp_path_factory.mktemp("places")
    world, draws = WORLDS["shapes"].draw("validation", 12, 0), np.random.default_rng(0)
    np.savez(root / "drawn.npz", images=world.images, captions=np.asarray(world.captions))
    np.save(root / "bare.npy", world.images)
    np.save(root / "one.npy", world.images[:1])
    np.savez(root / "dogs.npz", images=world.images, captions=np.asarray([f"a dog {i}" for i in range(12)]))
    np.save(root / "wide.npy", draws.integers(0, 256, (12, 32, 48, 3), np.uint8))
    captioned(root / "dogs", 20)
    clip_folder(clip_network(TINY), TINY, root / "clip")
    inception_archive(root / "inception.pt")
    return root


def told(places, tmp_path, words):
    run = evaluation(tmp_path, "measure=smoke", "measure.samples=null", *(word.format(at=places) for word in words))
    return possible(run, IMAGES, WHAT)


DOGS = ("data=folder", "data.path={at}/dogs")
CLIP = ("judge=clip", "judge.weights={at}/clip")
INCEPTION = ("judge=inception", "judge.weights={at}/inception.pt")


@pytest.mark.parametrize(
    ("words", "wanted", "refused"),
    [
        ((), IMAGES, {}),
        (("measure=full",), WHAT, {}),
        (("model={at}/drawn.npz",), IMAGES, {}),
        (("measure.what=caps,skills",), ("skills", "caps"), {}),
        (
            ("model={at}/bare.npy",),
            ("quality",),
            {
                "alignment": "bare.npy have no captions",
                "skills": "have no captions",
                "duplicates": "no captions of the drawn world shapes",
            },
        ),
        (
            ("model={at}/dogs.npz",),
            ("quality",),
            dict.fromkeys(("alignment", "skills", "duplicates"), "no captions of the drawn world shapes"),
        ),
        (
            ("model={at}/dogs.npz", *CLIP),
            ("quality", "alignment"),
            {"skills": "judge clip reads the attributes of no drawn world", "duplicates": "no captions of the drawn"},
        ),
        (
            INCEPTION,
            ("quality", "duplicates"),
            {"alignment": "judge inception reads no captions", "skills": "no drawn"},
        ),
        (
            (*DOGS, "measure.split=train"),
            ("quality", "duplicates"),
            {
                "alignment": "judge shapes reads captions of shapes, shapes2, not of data folder",
                "skills": "judge shapes reads the attributes of shapes, shapes2, not of data folder",
            },
        ),
        (("data.size=64",), ("alignment", "skills"), dict.fromkeys(("quality", "duplicates"), "are 32x32 pixels")),
    ],
)
def test_what_is_possible_is_taken_and_the_rest_told(words, wanted, refused, places, tmp_path):
    found, why = told(places, tmp_path, words)
    assert found == [*wanted] and set(why) == set(refused)
    for name, reason in refused.items():
        assert reason in why[name], why[name]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("measure.what=quality", "model={at}/wide.npy"), r"48x32 pixels and the real ones 32x32 .data.size."),
        (
            ("measure.what=quality", "measure.samples=4"),
            "at least 8 images are needed, measure.samples=4 with .* gives 4",
        ),
        (("measure.what=alignment", "measure.samples=1"), "at least 2 images are needed, measure.samples=1"),
        (("measure.what=quality", "model={at}/one.npy"), "at least 8 images are needed, model=.*one.npy .* gives 1"),
        (("measure.what=quality", "measure.reference=4"), "reference: at least 8 .*, got 4 .*measure.reference=4"),
        (("measure.what=quality", "measure.quality.neighbours=40", "measure.samples=32"), "too few for neighbours=40"),
        (
            ("measure.what=quality", "measure.quality.density_neighbours=64", "measure.reference=64"),
            "density_neighbours=64 needs at least 65 samples, got 64",
        ),
        # of a model there are no more images than captions, however many are asked for
        (
            ("measure.what=quality", *DOGS, "measure.samples=2000"),
            "at least 8 images are needed, measure.samples=2000 with split validation of data folder gives 2",
        ),
        (
            ("measure.what=quality", "model={at}/dogs.npz", *DOGS, "data.validation=4"),
            "reference: at least 8 images are needed .*, got 4 .*split validation of data folder",
        ),
        (("measure.what=alignment", *DOGS, *CLIP, "data.validation=1"), "at least 2 images .* data folder gives 1"),
        (
            ("measure.what=duplicates", *DOGS, "data.validation=1", "measure.split=train"),
            "at least 2 unseen real images are needed, .* of split validation of data folder gives 1",
        ),
        (
            ("measure.what=duplicates", "measure.duplicates.quantile=0.01", "measure.duplicates.heldout=64"),
            "at least 100 unseen real images are needed, measure.duplicates.heldout=64 .* gives 64",
        ),
        (("measure.what=latency", "model={at}/drawn.npz"), "stored images are no model that runs"),
        (("measure.what=latency", "measure.latency.rounds=0"), "measure.latency.rounds=0 times nothing"),
        (("measure.what=skills", "model={at}/drawn.npz", "data=shapes2"), "no captions of the drawn world shapes2"),
    ],
)
def test_what_was_asked_for_by_name_and_is_not_possible_is_an_error(words, reason, places, tmp_path):
    name = words[0].partition("=")[2]
    with pytest.raises(SettingError, match=f"measure.what: {name} is not possible: .*{reason}"):
        told(places, tmp_path, words)


def test_nothing_possible_is_an_error(places, tmp_path):
    with pytest.raises(SettingError, match="measure.what: quality is not possible: .*48x32 pixels"):
        told(places, tmp_path, ["model={at}/wide.npy"])


def test_a_command_takes_its_own_measures_alone(places, tmp_path):
    run = evaluation(tmp_path, "measure.what=quality,latency")
    with pytest.raises(
        SettingError, match="latency is not taken here; allowed: quality, alignment, skills, duplicates"
    ):
        possible(run, IMAGES, IMAGES)
