"""The pictures of a data set as stages know them: stored once, identified, held out, and named by their class."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from said import Said

from iris.data import SourceSettings
from iris.data.settings import Data
from iris.data.source import Source
from iris.errors import SettingError
from iris.stages import Context
from iris.stages.data import Pictures, class_names, fingerprint, held_out, opened, with_classes

BARE = SourceSettings("parquet", "x", size=32, label_column="label")


@pytest.fixture
def context(tmp_path) -> Context:
    return Context(tmp_path / "runs", Said())


def source(split: str = "train", **data) -> SourceSettings:
    """Of a split of the drawn shapes."""
    return Data(**data).source(split)


def test_pictures_are_stored_once_and_read_by_the_row(context, monkeypatch):
    stage = Pictures(context, source(train=20))
    stage.make()
    pixels, wanted = stage.pixels(), opened(stage.source).batch(range(20)).images
    assert pixels.shape == (20, 32, 32, 3) and len(pixels) == stage.result["pictures"] == 20
    assert "storing train pictures 20/20" in context.progress
    assert np.array_equal(pixels[:].numpy(), wanted)
    assert np.array_equal(pixels[torch.tensor([7, 3, 7])].numpy(), wanted[[7, 3, 7]])
    monkeypatch.setattr(Source, "stream", lambda *a, **k: pytest.fail("stored again"))
    Pictures(context, source(train=20)).make()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda data: data[:-1], "61439 bytes long instead of 61440"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "changed since it was written"),
        (None, "missing"),
    ],
)
def test_stored_pictures_are_read_through_when_they_are_found(damage, told, context):
    stage = Pictures(context, source(train=20))
    path = stage.make() / "pixels.bin"
    data = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(data))
    with pytest.raises(SettingError, match=f"pixels.bin is {told}.*delete the folder to store them anew"):
        stage.pixels()
    path.write_bytes(data)
    assert len(stage.pixels()) == 20


def test_a_kill_while_pictures_are_stored_leaves_nothing_that_counts(context, monkeypatch):
    def stop(self, position=None, shuffle=True):
        yield from ()
        raise KeyboardInterrupt

    stage = Pictures(context, source(train=300))
    with monkeypatch.context() as patch:
        patch.setattr(Source, "stream", stop)
        with pytest.raises(KeyboardInterrupt):
            stage.make()
    (stage.folder / "pixels.bin").write_bytes(b"half of it")
    assert not stage.done
    stage.make()
    assert len(stage.pixels()) == 300


def test_a_stream_must_say_how_many_rows_to_store(context, tmp_path):
    (tmp_path / "0.tar").write_bytes(b"\0" * 1024)
    stage = Pictures(context, source(name="tar", path=str(tmp_path)))
    with pytest.raises(SettingError, match=r"data\.train is needed with data=tar.* 3 kB each"):
        stage.make()


def test_fingerprints_of_a_world_need_no_drawing(context):
    def known(**data) -> str:
        return fingerprint(source(**data), context)

    before = known(train=1_000_000)
    assert before == known(train=1_000_000) == known(train=1_000_000, validation=7)  # another split's business
    others = [
        known(train=999_999),
        known(train=1_000_000, seed=1),
        known(train=1_000_000, size=64),
        known(train=1_000_000, label_column="colour"),
        known(train=1_000_000, split="validation"),
    ]
    assert len({before, *others}) == 6
    assert Pictures(context, source(train=1_000_000)).key == Pictures(context, source(train=1_000_000, seed=0)).key


def test_which_data_are_held_out():
    assert held_out(Data()).split == "validation"
    assert held_out(Data(validation=0)) is None
    assert held_out(Data(name="tar", path="x")) is None
    assert held_out(Data(name="cc3m")) is None  # streamed


def rows(*pairs):
    return [{"caption": caption, "label": label} for caption, label in pairs]


def test_names_of_classes():
    world = with_classes(Data()).source("train")
    assert world.label_column == "shape"
    names = class_names(rows(("a red circle", 0), ("x", 1)), world)
    assert len(set(names)) == 2 and "circle" in names
    assert class_names(rows(("cat", 3), ("dog", 5), ("cat", 3)), BARE) == ["cat", "dog", "cat"]
    assert class_names(rows(("one cat", 3), ("two cats", 3)), BARE) == ["3", "3"]
    assert class_names(rows(("cat", None), ("dog", None)), BARE) == ["cat", "dog"]
    named = replace(BARE, labels=("bird", "fish"))
    assert class_names(rows(("a", 1), ("b", 0)), named) == ["fish", "bird"]
    with pytest.raises(SettingError, match=r"data\.labels has 2 names, but column 'label' holds 2"):
        class_names(rows(("a", 2)), named)
