import csv
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from iris.data import SOURCES, WORLDS, fingerprint, load, pixels, shapes
from iris.data.sources import _png
from iris.errors import SettingError


def write_parquet(path, count=20, first=0, image="image", text="text", texts=None):
    images = shapes.draw("train", count, 0, first).images
    captions = [f"caption {first + i}" for i in range(count)] if texts is None else texts
    pq.write_table(pa.table({image: [{"bytes": _png(x), "path": None} for x in images], text: captions}), path)
    return images


def write_folder(root, count=12, style="csv", captions=None):
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, image in enumerate(shapes.draw("train", count, 0).images):
        Image.fromarray(image).save(root / f"{i:03d}.png")
        rows.append({"file_name": f"{i:03d}.png", "text": f"caption {i}" if captions is None else captions[i]})
    if style == "csv":
        with (root / "metadata.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", WORLDS)
def test_a_world_survives_its_dataset_exactly(name):
    splits = load(name, train=40, validation=8, heldout=8, seed=3)
    assert {split: len(part) for split, part in splits.items()} == {"train": 40, "validation": 8, "heldout": 8}
    assert not any(splits.cache_files.values())  # nothing is written anywhere
    decoded, drawn = pixels(splits["train"], WORLDS[name].size), WORLDS[name].draw("train", 40, 3)
    assert (decoded.images == drawn.images).all() and decoded.captions == drawn.captions and not decoded.bad
    assert list(decoded.attributes) == list(WORLDS[name].attributes)
    for attribute, values in decoded.attributes.items():
        assert (values == drawn.attributes[attribute]).all()
        assert tuple(splits["train"].features[attribute].names) == WORLDS[name].attributes[attribute]


def test_a_world_can_be_drawn_at_another_size():
    train = load("shapes2", size=32, train=4, validation=1, heldout=1)["train"]
    assert pixels(train, 32).images.shape == (4, 32, 32, 3)


def test_parquet_file_is_split_by_a_fixed_hash(tmp_path):
    images = write_parquet(tmp_path / "a.parquet", 40)
    splits = load("parquet", path=tmp_path / "a.parquet")
    assert set(splits) == {"train", "validation"} and len(splits["validation"]) == 4 and len(splits["train"]) == 36
    assert sorted([*splits["train"]["row"], *splits["validation"]["row"]]) == list(range(40))
    assert splits["validation"]["row"] == load("parquet", path=tmp_path / "a.parquet", seed=7)["validation"]["row"]
    decoded = pixels(splits["train"], 32)
    assert decoded.captions == [f"caption {i}" for i in splits["train"]["row"]] and decoded.attributes == {}
    assert (decoded.images == images[splits["train"]["row"]]).all()


def test_parquet_counts_and_shares(tmp_path):
    write_parquet(tmp_path / "a.parquet", 40)
    splits = load("parquet", path=tmp_path / "a.parquet", validation=0.25, train=5)
    assert len(splits["validation"]) == 10 and len(splits["train"]) == 5
    assert len(load("parquet", path=tmp_path / "a.parquet", validation=7)["validation"]) == 7
    with pytest.raises(SettingError, match=r"data\.validation takes 40 of the 40 rows"):
        load("parquet", path=tmp_path / "a.parquet", validation=40)


@pytest.mark.parametrize("where", ["folder", "glob"])
def test_parquet_files_named_test_become_validation(tmp_path, where):
    write_parquet(tmp_path / "train-0.parquet", 10)
    write_parquet(tmp_path / "train-1.parquet", 10, first=10)
    write_parquet(tmp_path / "test-0.parquet", 6, first=20)
    splits = load("parquet", path=tmp_path if where == "folder" else tmp_path / "*.parquet")
    assert list(splits["train"]["caption"]) == [f"caption {i}" for i in range(20)]
    assert list(splits["validation"]["caption"]) == [f"caption {i}" for i in range(20, 26)]


def test_parquet_other_column_names_and_plain_bytes(tmp_path):
    images = shapes.draw("train", 12, 0).images
    table = pa.table({"jpg": [_png(x) for x in images], "said": [f"c {i}" for i in range(12)], "extra": range(12)})
    pq.write_table(table, tmp_path / "a.parquet")
    splits = load("parquet", path=tmp_path / "a.parquet", image_column="jpg", text_column="said")
    assert splits["train"].column_names == ["image", "caption", "row"]
    assert (pixels(splits["train"], 32).images == images[splits["train"]["row"]]).all()


def test_class_numbers_become_names(tmp_path):
    write_parquet(tmp_path / "a.parquet", 10, text="label", texts=[i % 2 for i in range(10)])
    settings = {"path": tmp_path / "a.parquet", "text_column": "label"}
    train = load("parquet", labels=["cat", "dog"], **settings)["train"]
    assert list(train["caption"]) == [("cat", "dog")[row % 2] for row in train["row"]]
    with pytest.raises(SettingError, match=r"data\.labels is needed"):
        load("parquet", **settings)
    with pytest.raises(SettingError, match=r"data\.labels has 1 names"):
        load("parquet", labels=["cat"], **settings)


def test_class_label_features_bring_their_names(tmp_path):
    import datasets as hf

    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=["cat", "dog"])})
    rows = {
        "image": [{"bytes": _png(x), "path": None} for x in shapes.draw("train", 10, 0).images],
        "label": [i % 2 for i in range(10)],
    }
    hf.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    train = load("parquet", path=tmp_path / "a.parquet", text_column="label")["train"]
    assert list(train["caption"]) == [("cat", "dog")[row % 2] for row in train["row"]]


@pytest.mark.parametrize("style", ["csv", "jsonl"])
def test_folder(tmp_path, style):
    write_folder(tmp_path / "set", style=style)
    splits = load("folder", path=tmp_path / "set", validation=2)
    assert len(splits["train"]) == 10 and len(splits["validation"]) == 2
    decoded = pixels(splits["train"], 32)
    assert decoded.captions == [f"caption {i}" for i in splits["train"]["row"]]
    assert (decoded.images == shapes.draw("train", 12, 0).images[splits["train"]["row"]]).all()


def test_folder_with_its_own_validation(tmp_path):
    write_folder(tmp_path / "set" / "train", 6)
    write_folder(tmp_path / "set" / "validation", 3)
    splits = load("folder", path=tmp_path / "set")
    assert len(splits["train"]) == 6 and len(splits["validation"]) == 3


def test_folder_names_the_damaged_and_the_missing_file(tmp_path):
    write_folder(tmp_path / "set")
    (tmp_path / "set" / "004.png").write_bytes(b"damaged")
    train = load("folder", path=tmp_path / "set", validation=1)["train"]
    decoded = pixels(train, 32, max_bad=0.2)
    assert len(decoded.bad) == 1 and "004.png (unreadable" in decoded.bad[0] and len(decoded.images) == 10
    (tmp_path / "set" / "005.png").unlink()
    assert any("005.png (no such file)" in name for name in pixels(train, 32, max_bad=0.3).bad)


def test_folder_captions_that_are_empty(tmp_path):
    write_folder(tmp_path / "set", captions=["", *[f"c {i}" for i in range(11)]], style="jsonl")
    parts = load("folder", path=tmp_path / "set", validation=1)
    assert sum(len(pixels(part, 32, max_bad=0.5).bad) for part in parts.values() if len(part) > 1) == 1
    write_folder(tmp_path / "none", captions=[""] * 12, style="jsonl")
    with pytest.raises(SettingError, match=r"data\.text_column"):
        pixels(load("folder", path=tmp_path / "none")["train"], 32)


@pytest.mark.parametrize("name", ["parquet", "folder"])
def test_missing_path(tmp_path, name):
    with pytest.raises(SettingError, match=r"data\.path is needed"):
        load(name)
    with pytest.raises(SettingError, match=r"data\.path does not exist: .*nowhere"):
        load(name, path=tmp_path / "nowhere")
    with pytest.raises(SettingError, match=r"data\.path"):
        load(name, path=tmp_path)  # there, but empty


def test_missing_columns_list_those_there_are(tmp_path):
    write_parquet(tmp_path / "a.parquet")
    with pytest.raises(SettingError, match=r"data\.image_column.*'jpg'.*image, text"):
        load("parquet", path=tmp_path / "a.parquet", image_column="jpg")
    with pytest.raises(SettingError, match=r"data\.text_column.*'words'.*image, text"):
        load("parquet", path=tmp_path / "a.parquet", text_column="words")
    with pytest.raises(SettingError, match=r"data\.image_column.*not images"):
        load("parquet", path=tmp_path / "a.parquet", image_column="text")
    write_folder(tmp_path / "set")
    with pytest.raises(SettingError, match=r"data\.text_column.*'words'"):
        load("folder", path=tmp_path / "set", text_column="words")


def test_a_file_that_is_not_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(SettingError, match=r"data\.path.*cannot be read as parquet"):
        load("parquet", path=tmp_path / "a.parquet")


def test_settings_are_checked():
    with pytest.raises(SettingError, match="shapes, shapes2, parquet, folder, not 'cifar'"):
        load("cifar")
    with pytest.raises(SettingError, match=r"data\.train"):
        load("shapes", train=-1)
    with pytest.raises(SettingError, match=r"data\.validation.*share"):
        load("shapes", validation=0.1)
    with pytest.raises(SettingError, match=r"data\.size"):
        load("shapes", size=4)
    with pytest.raises(SettingError, match=r"data\.colour"):
        fingerprint("shapes", colour="red")
    assert set(SOURCES) == {"shapes", "shapes2", "parquet", "folder"}


def test_a_replaced_file_is_read_again(tmp_path):
    write_parquet(tmp_path / "a.parquet", texts=["before"] * 20)
    before = fingerprint("parquet", path=tmp_path / "a.parquet")
    assert set(load("parquet", path=tmp_path / "a.parquet")["train"]["caption"]) == {"before"}
    write_parquet(tmp_path / "a.parquet", texts=["after!"] * 20)
    assert set(load("parquet", path=tmp_path / "a.parquet")["train"]["caption"]) == {"after!"}
    assert fingerprint("parquet", path=tmp_path / "a.parquet") != before


def test_fingerprint_follows_what_determines_the_data(tmp_path):
    base = fingerprint("shapes", train=100, seed=0)
    assert base == fingerprint("shapes", seed=0, train=100, size=32)
    others = [
        fingerprint("shapes", train=101),
        fingerprint("shapes", train=100, seed=1),
        fingerprint("shapes", train=100, size=16),
        fingerprint("shapes2", train=100),
    ]
    assert len({base, *others}) == 5
    for place in ("one", "two"):
        write_folder(tmp_path / place)
    one = fingerprint("folder", path=tmp_path / "one")
    assert one == fingerprint("folder", path=tmp_path / "two")  # neither place nor time counts
    data = bytearray((tmp_path / "two" / "003.png").read_bytes())
    data[-20] ^= 1
    (tmp_path / "two" / "003.png").write_bytes(data)
    assert one != fingerprint("folder", path=tmp_path / "two")


def test_importing_the_package_loads_no_heavy_library():
    code = "import iris.data, sys; print([m for m in ('torch', 'datasets', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_order_of_validation_rows_is_fixed(tmp_path):
    write_parquet(tmp_path / "a.parquet", 40)
    rows = load("parquet", path=tmp_path / "a.parquet", validation=5)["validation"]["row"]
    more = load("parquet", path=tmp_path / "a.parquet", validation=8)["validation"]["row"]
    assert set(rows) < set(more) and np.all(np.diff(rows) > 0)
