import json

import numpy as np
import pytest
import torch
from small_shards import write_shard, write_shards

from iris.data import open_source
from iris.errors import SettingError
from iris.io.arrays import ABOUT, PROGRESS
from iris.io.pixels import to_images
from iris.latents import build_latent
from iris.randomness import initialise
from iris.stages import latent_cache
from iris.stages.latent_cache import LATENTS, ROWS, CachedLatents, encode_source, latent_digest


def opened(path, **settings):
    return open_source("tar", path=path, **{"size": 16, "score_column": "score", "label_column": "class"} | settings)


@pytest.fixture
def latent():
    return build_latent("haar")


@pytest.fixture
def source(tmp_path):
    return opened(write_shards(tmp_path / "shards", 3, 5))


class Stop(BaseException):
    """A kill."""


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_latents_are_those_of_the_rows_in_the_dtype_asked(tmp_path, latent, source, dtype):
    cache = CachedLatents(encode_source(latent, source, tmp_path, dtype, batch=4), verify=True)
    rows = list(source.stream(shuffle=False))
    exact = latent.encode(to_images(torch.from_numpy(np.stack([row.image for row in rows]))))
    kept = exact.to(getattr(torch, dtype))
    assert len(cache) == 15 and cache.latents().dtype == torch.float32 and cache.dtype == kept.dtype
    assert torch.equal(cache.latents(), kept.float()) and torch.equal(cache.latents([7, 2]), kept[[7, 2]].float())
    assert cache.captions == [row.caption for row in rows] and cache.labels == [row.label for row in rows]
    assert cache.scores == [row.score for row in rows] and cache.rows[3]["key"] == rows[3].key
    assert (cache.folder / LATENTS).stat().st_size == 256 + kept.numel() * kept.element_size()
    if dtype != "bfloat16":
        assert np.load(cache.folder / LATENTS).dtype == dtype  # any program reads it


def test_a_cache_is_reused_by_the_same_data_and_weights_only(tmp_path, latent, source, monkeypatch):
    place = encode_source(latent, source, tmp_path)
    others = {
        place,
        encode_source(latent, source, tmp_path, "float32"),
        encode_source(latent, opened(tmp_path / "shards", size=32), tmp_path),
        encode_source(build_latent("pixel"), source, tmp_path),
    }
    assert len(others) == 4
    monkeypatch.setattr(latent_cache, "_encode", lambda *_: pytest.fail("encoded anew"))
    assert encode_source(build_latent("haar"), opened(tmp_path / "shards", max_bad=0.2), tmp_path) == place


def test_the_digest_follows_weights_and_statistics():
    digests = [latent_digest(initialise(build_latent("wavelet_vae"), seed)) for seed in (0, 0, 1)]
    shifted = build_latent("haar")
    shifted.mean += 0.5
    assert digests[0] == digests[1] != digests[2] and latent_digest(shifted) != latent_digest(build_latent("haar"))


@pytest.mark.parametrize(("seconds", "kill"), [(0.0, 1), (0.0, 3), (1e9, 3)])
def test_a_killed_call_goes_on_and_ends_with_the_same_bytes(tmp_path, latent, source, monkeypatch, seconds, kill):
    whole = encode_source(latent, source, tmp_path / "whole", batch=4)
    monkeypatch.setattr(latent_cache, "SAVE_SECONDS", seconds)
    batches = []

    def report(done):
        batches.append(done)
        if len(batches) == kill:
            raise Stop

    with pytest.raises(Stop):
        encode_source(latent, source, tmp_path / "parts", batch=4, report=report)
    place = tmp_path / "parts" / whole.name
    with pytest.raises(SettingError, match=rf"{ABOUT} is missing"):
        CachedLatents(place)
    with open(place / LATENTS, "ab") as file:
        file.write(b"half a row")  # as a kill in the middle of a write leaves it
    assert encode_source(latent, source, tmp_path / "parts", batch=4, report=batches.append) == place
    resumed = batches[kill] > 4
    assert resumed == (seconds == 0.0 and kill > 1)
    for name in (LATENTS, ROWS, ABOUT):
        assert (place / name).read_bytes() == (whole / name).read_bytes()
    assert not (place / PROGRESS).exists()


@pytest.mark.parametrize("kill", [None, 1, 2])
def test_of_a_stream_the_first_rows_are_encoded(tmp_path, latent, monkeypatch, kill):
    """data.train of them, in all calls together."""
    monkeypatch.setattr(latent_cache, "SAVE_SECONDS", 0.0)
    path, done = write_shards(tmp_path / "shards", 3, 5), []

    def report(rows):
        done.append(rows)
        if len(done) == kill:
            raise Stop

    first = opened(path, train=7)
    if kill is not None:
        with pytest.raises(Stop):
            encode_source(latent, first, tmp_path, batch=3, report=report)
    place = encode_source(latent, first, tmp_path, batch=3, report=report)
    assert done == {None: [3, 6, 7], 1: [3, 3, 6, 7], 2: [3, 6, 6, 7]}[kill]
    assert CachedLatents(place, verify=True).captions == [f"row {i}" for i in range(7)]
    others = [CachedLatents(encode_source(latent, opened(path, train=count), tmp_path)) for count in (8, 99, None)]
    assert [len(cache) for cache in others] == [8, 15, 15] and len({place, *(cache.folder for cache in others)}) == 4


def test_a_cache_that_was_there_is_read_through(tmp_path, latent, source):
    place = encode_source(latent, source, tmp_path)
    whole = bytearray((place / LATENTS).read_bytes())
    whole[-1] ^= 1
    (place / LATENTS).write_bytes(whole)
    with pytest.raises(SettingError, match=r"latents\.npy is changed since it was written.*delete the folder"):
        encode_source(latent, source, tmp_path)


def test_damage_is_detected(tmp_path, latent, source):
    place = encode_source(latent, source, tmp_path)
    whole = (place / LATENTS).read_bytes()
    (place / LATENTS).write_bytes(whole[:-1])
    with pytest.raises(SettingError, match=r"latents\.npy is \d+ bytes long instead of"):
        CachedLatents(place)
    (place / LATENTS).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    CachedLatents(place)
    with pytest.raises(SettingError, match=r"latents\.npy is changed since"):
        CachedLatents(place, verify=True)
    (place / LATENTS).write_bytes(b"?" * len(whole))
    with pytest.raises(SettingError, match="not a numpy file"):
        CachedLatents(place)
    (place / LATENTS).write_bytes(whole)
    (place / ROWS).write_text((place / ROWS).read_text().replace("row 1", "row 2", 1))
    with pytest.raises(SettingError, match=r"rows\.jsonl is changed"):
        encode_source(latent, source, tmp_path)
    (place / ABOUT).write_text(json.dumps({"format": 99}))
    with pytest.raises(SettingError, match="not one of format 1"):
        CachedLatents(place)


def test_damaged_rows_are_left_out_and_counted(tmp_path, latent):
    write_shard(tmp_path / "a.tar", range(8), r2={"jpg": b"?"})
    cache = CachedLatents(encode_source(latent, opened(tmp_path, max_bad=0.1), tmp_path / "cache"))
    assert len(cache) == 7 and cache.about["bad"] == 1 and "row 2" not in cache.captions
    with pytest.raises(SettingError, match=r"data\.max_bad"):
        encode_source(latent, opened(tmp_path, max_bad=0.0), tmp_path / "other")


def test_tables_are_encoded_in_their_order(tmp_path, latent):
    world = open_source("shapes", train=9)
    cache = CachedLatents(encode_source(latent, world, tmp_path, "float32", batch=4))
    exact = latent.encode(to_images(torch.from_numpy(world.batch(range(9)).images)))
    assert cache.captions == world.captions and torch.equal(cache.latents(), exact)


def test_settings_are_checked(tmp_path, latent, source):
    with pytest.raises(SettingError, match="dtype='int8' is unknown; allowed: float32, float16, bfloat16"):
        encode_source(latent, source, tmp_path, "int8")
    with pytest.raises(SettingError, match="batch=0"):
        encode_source(latent, source, tmp_path, batch=0)
    with pytest.raises(SettingError, match=r"data\.crop=random"):
        encode_source(latent, opened(tmp_path / "shards", crop="random"), tmp_path)
    with pytest.raises(SettingError, match="no usable row"):
        encode_source(latent, opened(tmp_path / "shards", min_score=99), tmp_path)
    latent.std /= 1e6
    with pytest.raises(SettingError, match="not finite in dtype=float16; use dtype=float32"):
        encode_source(latent, source, tmp_path)
