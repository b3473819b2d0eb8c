import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_shards import jpeg, numbers

from iris.data import load, open_source, pixels, shapes
from iris.data.decode import decode_image
from iris.data.settings import source_settings
from iris.errors import SettingError


def write_parquet(path, count=20, bad=(), scores=None):
    pq.write_table(
        pa.table(
            {
                "image": [{"bytes": b"?" if i in bad else jpeg(i), "path": None} for i in range(count)],
                "text": [f"row {i}" for i in range(count)],
                "kind": [i % 4 for i in range(count)],
                "beauty": [i / 2 for i in range(count)] if scores is None else scores,
            }
        ),
        path,
    )
    return path


def opened(path, **settings):
    return open_source("parquet", path=path, **{"size": 16, "validation": 0} | settings)


def test_batches_by_number(tmp_path):
    source = opened(write_parquet(tmp_path / "a.parquet"), label_column="kind", score_column="beauty")
    batch = source.batch(np.asarray([3, 0, 19]))
    assert len(source) == 20 and batch.captions == ["row 3", "row 0", "row 19"] and batch.keys[0] == "row 3"
    assert batch.labels.tolist() == [3, 0, 3] and batch.scores.tolist() == [1.5, 0, 9.5]
    assert (batch.images == [decode_image({"bytes": jpeg(i)}, 16) for i in (3, 0, 19)]).all()
    plain = opened(tmp_path / "a.parquet").batch([1])
    assert plain.labels is None and plain.scores is None
    with pytest.raises(SettingError, match=r"rows are numbered 0\.\.19"):
        source.batch([20])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_splits_are_those_of_load(tmp_path, split):
    write_parquet(tmp_path / "a.parquet", 40)
    source = opened(tmp_path / "a.parquet", split=split, validation=None)
    expected = pixels(load("parquet", path=tmp_path / "a.parquet")[split], 16)
    batch = source.batch(range(len(source)))
    assert (batch.images == expected.images).all() and batch.captions == expected.captions == source.captions
    with pytest.raises(SettingError, match=r"data\.split must be one of train, validation .*'test'"):
        opened(tmp_path / "a.parquet", split="test")


def test_a_world_gives_its_pictures_and_an_attribute_as_label():
    source = open_source("shapes", train=12, seed=3, label_column="shape")
    drawn = shapes.draw("train", 12, 3)
    batch = source.batch(range(12))
    assert (batch.images == drawn.images).all() and batch.captions == drawn.captions
    assert (batch.labels == drawn.attributes["shape"]).all()
    assert len(open_source("shapes", split="heldout", heldout=5)) == 5
    with pytest.raises(SettingError, match=r"data\.label_column.*'weight'.*colour, shape"):
        open_source("shapes", train=2, label_column="weight")


def test_min_score_selects_rows(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", 5, scores=[0.1, None, 0.9, float("nan"), 0.5])
    source = opened(path, score_column="beauty", min_score=0.5)
    assert source.batch(range(len(source))).captions == ["row 2", "row 4"]
    assert sorted(numbers(source.stream(1))) == [2, 4]
    with pytest.raises(SettingError, match=r"data\.min_score=2: no row .* 'beauty' goes up to 0\.9"):
        opened(path, score_column="beauty", min_score=2)


def test_label_and_score_columns_are_checked(tmp_path):
    path = write_parquet(tmp_path / "a.parquet")
    with pytest.raises(SettingError, match=r"data\.score_column.*'ugliness'.*beauty"):
        opened(path, score_column="ugliness", min_score=1)
    with pytest.raises(SettingError, match=r"data\.label_column: column 'text'.*not numbers"):
        opened(path, label_column="text")
    with pytest.raises(SettingError, match=r"data\.min_score needs data\.score_column"):
        opened(path, min_score=1)


def test_a_damaged_row_is_replaced_by_the_next_usable_one(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", bad=(4, 5, 19))
    source = opened(path, max_bad=0.2)
    assert source.batch([3, 4, 19, 4]).captions == ["row 3", "row 6", "row 0", "row 6"]
    assert sorted(source.bad) == [4, 5, 19] and "row 4 (unreadable" in source.bad[4]
    with pytest.raises(SettingError, match=r"data\.max_bad allows 10\.00%.* 3 of 20 are: row 4 \(unreadable"):
        opened(path, max_bad=0.1).batch(range(20))
    stream = source.stream()
    assert sorted(numbers(stream)) == [i for i in range(20) if i not in (4, 5, 19)] and stream.bad == 3


def test_streaming_a_table_shuffles_shares_and_resumes(tmp_path):
    source = opened(write_parquet(tmp_path / "a.parquet"), crop="random")
    assert sorted(numbers(source.stream(0)) + numbers(source.stream(0, 1))) == sorted([*range(20)] * 2)
    assert numbers(source.stream(0)) != numbers(source.stream(0, 1)) != list(range(20))
    shares = [numbers(source.stream(0, 0, rank, 3)) for rank in range(3)]
    assert sorted(sum(shares, [])) == list(range(20)) and {len(share) for share in shares} == {6, 7}
    stream = source.stream(0, 0, 1, 3)
    first = [next(stream) for _ in range(4)]
    assert numbers(first) + numbers(source.stream(0, 0, 1, 3, json.loads(json.dumps(stream.position)))) == shares[1]


def write_sidecars(root, count=6):
    root.mkdir(parents=True)
    for i in range(count):
        (root / f"{i:03d}.jpg").write_bytes(jpeg(i))
        (root / f"{i:03d}.txt").write_text(f"row {i}\n")


def test_a_folder_with_a_text_beside_each_image(tmp_path):
    write_sidecars(tmp_path / "set" / "train")
    write_sidecars(tmp_path / "set" / "validation", 2)
    (tmp_path / "set" / "train" / "004.txt").unlink()
    opened = lambda **settings: open_source("folder", path=tmp_path / "set", size=16, **settings)  # noqa: E731
    source = opened(max_bad=0.2)
    assert len(source) == 6 and len(opened(split="validation")) == 2
    assert numbers(source.stream(shuffle=False)) == [0, 1, 2, 3, 5]
    assert source.batch([4]).captions == ["row 5"] and source.bad == {4: "row 4 004.jpg (empty caption)"}
    assert (source.batch([2]).images[0] == decode_image({"bytes": jpeg(2)}, 16)).all()


@pytest.mark.parametrize("style", ["csv", "jsonl"])
def test_a_folder_with_metadata_and_more_columns(tmp_path, style):
    root, rows = tmp_path / "set", [(f"{i}.png", f"row {i}", i % 2, i / 10) for i in range(6)]
    root.mkdir()
    for name, *_ in rows:
        Image.new("RGB", (16, 16), (int(name[0]), 0, 0)).save(root / name)
    names = ("file_name", "text", "class", "score")
    if style == "csv":
        (root / "metadata.csv").write_text("\n".join(",".join(map(str, row)) for row in [names, *rows]) + "\n")
    else:
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
        (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    source = open_source(
        "folder", path=root, size=16, validation=0, label_column="class", score_column="score", min_score=0.2
    )
    batch = source.batch(range(len(source)))
    assert batch.captions == ["row 2", "row 3", "row 4", "row 5"] and batch.labels.tolist() == [0, 1, 0, 1]
    assert batch.images[:, 0, 0, 0].tolist() == [2, 3, 4, 5]


def test_a_folder_without_captions_says_what_is_missing(tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    with pytest.raises(SettingError, match=r"data\.path: .* has no metadata\.csv or metadata\.jsonl"):
        open_source("folder", path=tmp_path, size=16)


def test_where_a_folder_lies_decides_nothing(tmp_path):
    for place in ("one", "two"):
        write_sidecars(tmp_path / place)
    settings = {"size": 8, "crop": "random", "validation": 0}
    opened = lambda place: open_source("folder", path=tmp_path / place, **settings)  # noqa: E731
    assert opened("one").fingerprint() == opened("two").fingerprint()
    assert (opened("one").batch(range(6), 1).images == opened("two").batch(range(6), 1).images).all()
    (tmp_path / "two" / "003.txt").write_text("other words")
    assert opened("one").fingerprint() != opened("two").fingerprint()


def test_settings_are_checked(tmp_path):
    for name, settings, message in [
        ("nowhere", {}, r"data must be one of shapes, .*cifar10.*not 'nowhere'"),
        ("tar", {"path": tmp_path}, r"data\.path has no tar shards"),
        ("tar", {"size": 16}, r"data\.path is needed with data=tar"),
        ("shapes", {"crop": "left"}, r"data\.crop='left' is unknown; allowed: centre, random"),
        ("shapes", {"buffer": 0}, r"data\.buffer"),
        ("shapes", {"max_bad": 1.0}, r"data\.max_bad"),
        ("shapes", {"size": 4}, r"data\.size"),
        ("shapes", {"colour": 1}, r"data\.colour is no setting; there are path"),
    ]:
        with pytest.raises(SettingError, match=message):
            open_source(name, **settings)


def test_pictures_from_files_have_the_default_worlds_size_unless_told():
    assert source_settings("tar", path="x").size == open_source("shapes", train=1).batch([0]).images.shape[1] == 32
    assert source_settings("cifar10").size == 32 and source_settings("folder", path="x", size=48).size == 48
