import json
import time

import pytest
from small_shards import jpeg, numbers, write_shards

from iris.data import open_source
from iris.data.decode import decode_image
from iris.errors import SettingError


def rows(count=40, bad=()):
    import datasets as hf

    features = hf.Features(
        {
            "picture": hf.Image(),
            "said": hf.Value("string"),
            "score": hf.Value("float32"),
            "kind": hf.ClassLabel(names=["cat", "dog"]),
        }
    )
    return hf.Dataset.from_dict(
        {
            "picture": [{"bytes": b"?" if i in bad else jpeg(i), "path": None} for i in range(count)],
            "said": [f"row {i}" for i in range(count)],
            "score": [i / 10 for i in range(count)],
            "kind": [i % 2 for i in range(count)],
        },
        features=features,
    )


def save(folder, how, **given):
    import datasets as hf

    data = rows(**given)
    if how == "saved":
        hf.DatasetDict({"train": data, "validation": data.select(range(3))}).save_to_disk(str(folder))
    elif how == "one":
        data.save_to_disk(str(folder))
    else:
        (folder / "data").mkdir(parents=True)
        for i in range(4):
            data.shard(4, i).to_parquet(folder / "data" / f"train-{i}.parquet")
        data.select(range(3)).to_parquet(folder / "data" / "validation-0.parquet")
    return folder


def opened(folder, **settings):
    return open_source(
        "hub", path=folder, image_column="picture", **{"text_column": "said", "size": 16, "buffer": 7} | settings
    )


@pytest.mark.parametrize("how", ["saved", "files"])
def test_whole_data_sets_are_tables(tmp_path, how):
    source = opened(save(tmp_path / "set", how), label_column="kind", score_column="score", min_score=1.05)
    batch = source.batch([0, 5])
    assert len(source) == 29 and batch.captions == ["row 11", "row 16"] and batch.labels.tolist() == [1, 0]
    assert (batch.images[0] == decode_image({"bytes": jpeg(11)}, 16)).all()
    assert len(opened(tmp_path / "set", split="validation")) == 3
    assert opened(tmp_path / "set", text_column="kind").batch([3]).captions == ["dog"]


def test_a_single_saved_split_is_divided(tmp_path):
    save(tmp_path / "set", "one")
    assert [len(opened(tmp_path / "set", split=split)) for split in ("train", "validation")] == [36, 4]


@pytest.mark.parametrize("how", ["saved", "files"])
def test_streams_shuffle_share_and_resume(tmp_path, how):
    source = opened(save(tmp_path / "set", how), streaming=True, label_column="kind")
    assert not hasattr(source, "batch") and source.shards == (16 if how == "saved" else 4)
    orders = [numbers(source.stream(1, epoch)) for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40))
    assert orders[0] != orders[1] == numbers(source.stream(1, 1))
    for world in (2, 5):
        shares = [numbers(source.stream(1, 0, rank, world)) for rank in range(world)]
        assert sorted(sum(shares, [])) == list(range(40))
    stream = source.stream(1, 0, 1, 2)
    before = [next(stream) for _ in range(9)]
    assert all(example.label == number % 2 for example, number in zip(before, numbers(before), strict=True))
    position = json.loads(json.dumps(stream.position))
    assert numbers(source.stream(1, 0, 1, 2, position)) == numbers(stream) and len(json.dumps(position)) < 300


def test_streams_select_by_score_and_count_damage(tmp_path):
    source = opened(
        save(tmp_path / "set", "files", bad=(7, 30)), streaming=True, score_column="score", min_score=0.5, max_bad=0.02
    )
    stream = source.stream()
    assert sorted(numbers(stream)) == [i for i in range(5, 40) if i not in (7, 30)] and stream.bad == 2


def test_a_damaged_file_of_a_stream_is_counted(tmp_path):
    source = opened(save(tmp_path / "set", "files"), streaming=True)
    path = tmp_path / "set" / "data" / "train-2.parquet"
    path.write_bytes(path.read_bytes()[:200])
    stream = source.stream()
    assert sorted(numbers(stream)) == [*range(20), *range(30, 40)] and stream.bad == 1


def test_tar_shards_through_the_hub_loader(tmp_path):
    write_shards(tmp_path / "set", 3, 5)
    source = open_source("hub", path=tmp_path / "set", streaming=True, image_column="jpg", text_column="txt", size=16)
    assert source.shards == 3 and sorted(numbers(source.stream())) == list(range(15))


def test_missing_columns_and_splits_are_named(tmp_path):
    save(tmp_path / "set", "files")
    for streaming in (False, True):
        with pytest.raises(SettingError, match=r"data\.text_column: .*'words'.*picture, said"):
            opened(tmp_path / "set", streaming=streaming, text_column="words")
        with pytest.raises(SettingError, match=r"data\.score_column: .*'beauty'"):
            opened(tmp_path / "set", streaming=streaming, score_column="beauty")
        with pytest.raises(SettingError, match=r"data\.split must be one of train, validation"):
            opened(tmp_path / "set", streaming=streaming, split="test")


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unknown_name_offline_is_a_quick_error(streaming, monkeypatch):
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    began = time.monotonic()
    with pytest.raises(SettingError, match=r"data\.path='nobody/nothing': not in HF's cache, and HF_HUB_OFFLINE"):
        open_source("hub", path="nobody/nothing", size=16, streaming=streaming)
    assert time.monotonic() - began < 5
    with pytest.raises(SettingError, match=r"data\.path='/no/such folder' is neither a folder nor the name"):
        open_source("hub", path="/no/such folder", size=16)


def test_without_an_answer_the_hub_is_asked_once(monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    asked = []

    def refuse(self, name, **options):
        asked.append((name, options["timeout"]))
        raise ConnectionError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(SettingError, match=r"data\.path='nobody/nothing': no such folder.* hub gave.*no network"):
        open_source("hub", path="nobody/nothing", size=16)
    assert asked == [("nobody/nothing", 5.0)]


def test_fingerprint_of_a_stream_and_of_a_table(tmp_path):
    one, two = (save(tmp_path / name, "files") for name in ("one", "two"))
    other = save(tmp_path / "other", "files", bad=(0,))
    for streaming in (False, True):
        prints = [opened(folder, streaming=streaming).fingerprint() for folder in (one, two, other)]
        assert prints[0] == prints[1] != prints[2]
