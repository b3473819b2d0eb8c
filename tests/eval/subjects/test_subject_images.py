"""Images that are there: their order and captions, and what is wrong with a folder or file, by name."""

import json

import numpy as np
import pytest
from evaluations import captioned
from PIL import Image

from eval.subjects import Sample, open_subject
from iris.errors import SettingError


def opened(place, kind=None):
    return open_subject(str(place), kind, Sample(), "float32", "cpu")


def test_captions_go_to_images_in_natural_order(tmp_path):
    for i in (1, 2, 10):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "captions.txt").write_text("one\ntwo\nten\n")
    subject = opened(tmp_path)
    assert subject.captions == ["one", "two", "ten"] and subject.size == (16, 16)
    assert subject.generate([None] * 3, 0, 0)[:, 0, 0, 0].tolist() == [1, 2, 10]
    (tmp_path / "captions.txt").unlink()
    (tmp_path / "metadata.csv").write_text('file_name,text\n10.png,"ten, at last"\n1.png,one\n2.png,two\n')
    assert opened(tmp_path).captions == ["one", "two", "ten, at last"]


def test_images_stored_with_loss_are_noted(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    assert opened(tmp_path).notes == ()
    Image.new("RGB", (16, 16)).save(tmp_path / "1.jpg")
    assert "1 of 2 images are stored with loss" in opened(tmp_path).notes[0]


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """Folders and files with one thing wrong each."""
    root = tmp_path_factory.mktemp("bad")

    def folder(name, count=10, mode="RGB", **files):
        (root / name).mkdir()
        for i in range(count):
            Image.new(mode, (32, 32)).save(root / name / f"{i}.png")
        for file, text in files.items():
            (root / name / file.replace("_", ".")).write_text(text)

    rows = [json.dumps({"file_name": f"{i}.png", "text": "a"}) for i in range(10)]
    folder("empty", 0)
    folder("none", 0, metadata_csv="file_name,text\n")
    folder("sizes")
    Image.new("RGB", (32, 40)).save(root / "sizes" / "9.png")
    folder("grey", mode="L")
    folder("few", captions_txt="a\n" * 9)
    folder("blank", captions_txt="a\n" * 9 + " \n")
    folder("lacking", metadata_jsonl="\n".join(rows[:8]))
    folder("missing", metadata_jsonl="\n".join([*rows, '{"file_name": "99.png", "text": "a"}']))
    folder("twice", metadata_jsonl="\n".join([*rows, rows[3]]))
    folder("columns", metadata_csv="name,caption\n0.png,a\n")
    folder("json", metadata_jsonl="{")
    folder("broken")
    (root / "broken" / "3.png").write_bytes(b"no picture")
    pixels = np.zeros((10, 3, 32, 32), np.float32)
    np.save(root / "range.npy", pixels + 2)
    pixels[4, 0, 5, 5] = np.nan
    np.save(root / "nan.npy", pixels)
    np.savez(root / "pickled.npz", images=np.asarray([None], object))
    np.savez(root / "other.npz", pictures=np.zeros((2, 8, 8, 3), np.uint8))
    np.savez(root / "uncaptioned.npz", images=np.zeros((2, 8, 8, 3), np.uint8), captions=np.asarray(["a"]))
    (root / "half.npy").write_bytes((root / "range.npy").read_bytes()[:200])
    return root


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nowhere", ": no such folder or array file"),
        (
            "empty",
            "expected a saved model .config.json.,.* a diffusers pipeline .model_index.json. or a folder of images",
        ),
        ("none", "no images in the folder"),
        ("sizes", "the images differ in size: 9 of 32x32, 1 of 32x40"),
        ("grey", "0.png has the colour mode L; convert it to RGB"),
        ("few", "captions.txt has 9 lines for 10 images"),
        ("blank", "captions.txt has an empty one for 9.png"),
        ("lacking", "captions: metadata.jsonl has none for 2 of 10 images: 8.png, 9.png"),
        ("missing", "names 1 images that are not there: 99.png"),
        ("twice", "metadata.jsonl names 3.png twice"),
        ("columns", "row 1: file_name and text are needed as strings, it has name, caption"),
        ("json", "metadata.jsonl cannot be read"),
        ("broken", "3.png: it is not a picture"),
        ("nan.npy", "1 of 10 hold pixels that are not finite, the first is number 4"),
        ("range.npy", r"must lie in \[-1, 1\]"),
        ("pickled.npz", "cannot be read as an array"),
        ("half.npy", "cannot be read as an array"),
        ("other.npz", "it has no array 'images'"),
        ("uncaptioned.npz", "one for each of the 2 images is needed, got 1"),
    ],
)
def test_what_cannot_be_measured_is_named(name, expected, bad):
    with pytest.raises(SettingError, match=f"model={bad / name}.*{expected}"):
        opened(bad / name)


def test_a_damaged_picture_is_found_when_it_is_read(tmp_path):
    place = captioned(tmp_path / "dogs", 3)
    (place / "1.png").write_bytes((place / "1.png").read_bytes()[:-800])
    with pytest.raises(SettingError, match="1.png: the picture is damaged"):
        opened(place).generate([None] * 3, 0, 0)
