from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_shards import jpeg, numbers, write_shards

from iris.data import READY, open_source, source_settings
from iris.errors import SettingError

LOCAL_CIFAR10 = Path(__file__).parents[4] / "shared" / "data" / "cifar10"


def test_each_ready_data_set_is_a_whole_set_of_settings():
    assert READY == ("cc12m", "cc3m", "cifar10", "imagenet-256", "journeydb", "pokemon-blip-captions")
    columns = {
        name: (chosen.path, chosen.image_column, chosen.text_column, chosen.streaming)
        for name in READY
        if (chosen := source_settings(name)).name == "hub" and chosen.size in (32, 256)
    }
    assert columns == {
        "cifar10": ("uoft-cs/cifar10", "img", "label", False),
        "imagenet-256": ("benjamin-paine/imagenet-1k-256x256", "image", "label", False),
        "pokemon-blip-captions": ("lambdalabs/pokemon-blip-captions", "image", "text", False),
        "cc3m": ("pixparse/cc3m-wds", "jpg", "txt", True),
        "cc12m": ("pixparse/cc12m-wds", "jpg", "txt", True),
        "journeydb": ("BLIP3o/BLIP3o-Pretrain-JourneyDB", "jpg", "txt", True),
    }


def test_given_settings_win_and_none_is_not_given():
    chosen = source_settings("cc3m", size=64, path=None, buffer=None, text_column="json")
    assert (chosen.size, chosen.path, chosen.buffer, chosen.text_column) == (64, "pixparse/cc3m-wds", 1000, "json")
    with pytest.raises(SettingError, match=r"data\.sise is no setting"):
        source_settings("cc3m", sise=64)


def write_cifar(folder):
    """Parquet files with the columns of shared/data/cifar10."""
    folder.mkdir()
    for split, count in (("train", 20), ("test", 10)):
        pq.write_table(
            pa.table(
                {
                    "image": [{"bytes": jpeg(i, 32, 32), "path": None} for i in range(count)],
                    "text": ["a photo of something"] * count,
                    "label": [i % 10 for i in range(count)],
                }
            ),
            folder / f"{split}.parquet",
        )


def test_cifar10_from_parquet_files_has_class_names_as_captions(tmp_path):
    write_cifar(tmp_path / "files")
    source = open_source("cifar10", path=tmp_path / "files")
    assert (source.settings.name, len(source)) == ("parquet", 20)
    batch = source.batch([0, 9, 13])
    assert batch.captions == ["airplane", "truck", "cat"] and batch.labels.tolist() == [0, 9, 3]
    assert batch.images.shape == (3, 32, 32, 3)
    assert len(open_source("cifar10", path=tmp_path / "files", split="validation")) == 10
    assert open_source("cifar10", path=tmp_path / "files", text_column="text").batch([0]).captions[0][:7] == "a photo"


@pytest.mark.skipif(not LOCAL_CIFAR10.exists(), reason="CIFAR-10 is not on this machine")
def test_cifar10_itself():
    source = open_source("cifar10", path=LOCAL_CIFAR10, split="validation")
    assert len(source) == 10_000 and source.batch([0, 1]).images.shape == (2, 32, 32, 3)


def test_cc12m_from_shards_on_disk(tmp_path):
    source = open_source("cc12m", path=write_shards(tmp_path, 2, 4), size=16)
    assert source.settings.name == "tar" and sorted(numbers(source.stream())) == list(range(8))
