import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from small_shards import jpeg, noise, numbers, write_shard, write_shards

from iris.data import decode, open_source
from iris.data.shards import expand, find
from iris.errors import SettingError


def opened(path, **settings):
    return open_source("tar", path=path, **{"size": 16, "buffer": 7} | settings)


def test_braces_expand_as_in_a_shell(tmp_path):
    assert expand("a-{008..011}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert expand("{x,y}{9..10}") == ["x9", "x10", "y9", "y10"] and expand("plain") == ["plain"]
    write_shards(tmp_path, 3, 1)
    names = ["s-000.tar", "s-001.tar", "s-002.tar"]
    for pattern in (tmp_path, tmp_path / "s-{000..002}.tar", tmp_path / "s-*.tar", tmp_path / "s-0{00..02}.tar"):
        assert [file.name for file in find(str(pattern))] == names


def test_missing_and_compressed_shards_are_named(tmp_path):
    write_shards(tmp_path, 2, 1)
    with pytest.raises(SettingError, match=r"data\.path: shard .*s-002\.tar is missing"):
        opened(tmp_path / "s-{000..005}.tar")
    with pytest.raises(SettingError, match=r"data\.path has no tar shards"):
        opened(tmp_path / "t-*.tar")
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(SettingError, match=r"a\.tar\.gz must be an uncompressed"):
        opened(tmp_path / "a.tar.gz")


def test_rows_have_picture_caption_label_and_score(tmp_path):
    write_shards(tmp_path, 1, 5)
    source = opened(tmp_path, label_column="class", score_column="score")
    rows = list(source.stream(shuffle=False))
    assert [row.caption for row in rows] == [f"row {i}" for i in range(5)]
    assert [row.label for row in rows] == [0, 1, 2, 0, 1] and [row.score for row in rows] == [0, 0.1, 0.2, 0.3, 0.4]
    for i, row in enumerate(rows):
        assert (row.image == decode.decode_image({"bytes": jpeg(i)}, 16)).all() and row.key == f"s-000.tar/{i:05d}"


def test_captions_from_a_field_of_the_json_and_pictures_by_several_endings(tmp_path):
    stream = io.BytesIO()
    Image.fromarray(noise(16, 16)).save(stream, "PNG")
    nested = json.dumps({"caption": "field 0", "deep": {"class": 1}}).encode()
    write_shard(tmp_path / "a.tar", [0], r0={"jpg": None, "png": stream.getvalue(), "json": nested})
    (row,) = opened(tmp_path, text_column="caption").stream()
    assert row.caption == "field 0" and (row.image == noise(16, 16)).all()
    (row,) = opened(tmp_path, text_column="deep.class", labels=["cat", "dog"]).stream()
    assert row.caption == "dog"


def test_min_score_selects_rows_and_does_not_count_the_others_as_bad(tmp_path):
    write_shards(tmp_path, 2, 10)
    stream = opened(tmp_path, score_column="score", min_score=0.8, max_bad=0.0).stream()
    assert sorted(numbers(stream)) == list(range(8, 20)) and stream.bad == 0


def test_an_epoch_has_every_row_once_in_an_order_of_its_own(tmp_path):
    source = opened(write_shards(tmp_path))
    first, again, second = (numbers(source.stream(3, epoch)) for epoch in (0, 0, 1))
    assert first == again != second and sorted(first) == sorted(second) == list(range(40))
    assert numbers(source.stream(4, 0)) != first and numbers(source.stream(shuffle=False)) == list(range(40))
    assert [n // 10 for n in first] != sorted(n // 10 for n in first)  # shards too are shuffled
    assert first[:7] != sorted(first[:7])  # and rows within the buffer


@pytest.mark.parametrize("world", [2, 3, 4, 7])
def test_ranks_share_the_rows(tmp_path, world):
    source = opened(write_shards(tmp_path))
    shares = [numbers(source.stream(0, 1, rank, world)) for rank in range(world)]
    assert sorted(sum(shares, [])) == list(range(40)) and min(map(len, shares)) >= 40 // world // 2


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2), (2, 6)])
def test_a_stream_goes_on_at_any_position(tmp_path, rank, world):
    source = opened(write_shards(tmp_path), crop="random")
    whole, positions, stream = [], [], source.stream(5, 2, rank, world)
    positions.append(stream.position)
    for example in stream:
        whole.append(example)
        positions.append(stream.position)
    for at, position in enumerate(positions):
        assert len(json.dumps(position)) < 300  # small: a checkpoint holds it
        rest = list(source.stream(5, 2, rank, world, json.loads(json.dumps(position))))
        assert [example.key for example in rest] == [example.key for example in whole[at:]]
        assert all((a.image == b.image).all() for a, b in zip(rest, whole[at:], strict=True))


def test_a_position_of_another_stream_is_refused(tmp_path):
    source = opened(write_shards(tmp_path))
    position = source.stream(5, 2).position
    with pytest.raises(SettingError, match="seed=5, this stream has 6"):
        source.stream(6, 2, position=position)
    with pytest.raises(SettingError, match="buffer=7"):
        opened(tmp_path, buffer=8).stream(5, 2, position=position)
    with pytest.raises(SettingError, match="rank=2"):
        source.stream(rank=2, world=2)


def member_offset(path, name):
    with tarfile.open(path) as archive:
        return archive.getmember(name)


def damage(path, case):
    """Damage row 4 of ten; returns the rows that are lost and how many counts that makes."""
    data = bytearray(path.read_bytes())
    jpg, txt = member_offset(path, "00004.jpg"), member_offset(path, "00004.txt")
    if case == "picture":
        data[jpg.offset_data : jpg.offset_data + 40] = b"?" * 40
        lost, count = {4}, 1
    elif case == "header":
        data[txt.offset : txt.offset + 100] = b"?" * 100
        lost, count = {4}, 3  # the header, and the two halves of its row
    elif case == "cut":
        data = data[: txt.offset_data + 3]
        lost, count = set(range(4, 10)), 2  # the shard, and the row it left incomplete
    elif case == "no end":
        data = data[: member_offset(path, "00005.jpg").offset]
        lost, count = set(range(5, 10)), 1
    elif case == "empty":
        data, lost, count = b"", set(range(10)), 1
    else:
        data, lost, count = b"no tar at all" * 999, set(range(10)), 1
    path.write_bytes(data)
    return lost, count


CASES = ["picture", "header", "cut", "no end", "empty", "rubbish"]


@pytest.mark.parametrize("case", CASES)
def test_damage_is_counted_and_costs_only_the_rows_it_hits(tmp_path, case):
    write_shards(tmp_path)
    lost, count = damage(tmp_path / "s-000.tar", case)
    stream = opened(tmp_path, max_bad=0.05).stream()
    assert set(range(40)) - set(numbers(stream)) == lost and stream.bad == count


@pytest.mark.parametrize("case", CASES)
def test_damage_does_not_disturb_resuming(tmp_path, case):
    write_shards(tmp_path)
    damage(tmp_path / "s-000.tar", case)
    source = opened(tmp_path, max_bad=0.5, buffer=3)
    stream = source.stream(1)
    whole, positions = [], [stream.position]
    for example in stream:
        whole.append(example)
        positions.append(stream.position)
    for at, position in enumerate(positions):
        rest = source.stream(1, position=position)
        assert numbers(rest) == numbers(whole[at:]) and rest.bad == stream.bad


def test_rows_without_a_picture_caption_or_sound_json(tmp_path):
    write_shard(tmp_path / "a.tar", range(8), r1={"jpg": None}, r3={"txt": None}, r5={"txt": b" "}, r7={"json": b"{"})
    stream = opened(tmp_path, max_bad=0.04, score_column="score").stream(shuffle=False)
    assert numbers(stream) == [0, 2, 4, 6] and stream.bad == 4


def test_more_damage_than_allowed_stops_with_names(tmp_path):
    write_shard(tmp_path / "a.tar", range(30), **{f"r{i}": {"jpg": b"?"} for i in (3, 9)})
    message = r"data\.max_bad allows 1\.00%.*2 of 10.*a\.tar/00003 \(unreadable.*a\.tar/00009"
    with pytest.raises(SettingError, match=message):
        list(opened(tmp_path).stream(shuffle=False))
    with pytest.raises(SettingError, match=r"data\.max_bad.*1 of 4"):
        list(opened(tmp_path, max_bad=0.0).stream(shuffle=False))


def test_a_shard_that_vanishes_later_is_counted(tmp_path):
    write_shards(tmp_path)
    source = opened(tmp_path)
    (tmp_path / "s-002.tar").unlink()
    stream = source.stream()
    assert sorted(numbers(stream)) == [*range(20), *range(30, 40)] and stream.bad == 1


@pytest.mark.parametrize(("width", "height"), [(60, 20), (20, 60)])
def test_crops_keep_the_aspect_and_are_antialiased(tmp_path, width, height):
    stream = io.BytesIO()
    Image.fromarray(noise(width, height)).save(stream, "PNG")
    write_shard(tmp_path / "a.tar", [0], r0={"jpg": stream.getvalue()})
    # The longest side resized as a whole: the crop must be a window of it, the middle one if it is centred.
    half = (width // 2, height // 2)
    resized = np.asarray(Image.fromarray(noise(width, height)).resize(half, Image.Resampling.BICUBIC))
    resized = resized if width > height else resized.transpose(1, 0, 2)
    turn = (lambda image: image) if width > height else (lambda image: image.transpose(1, 0, 2))
    (centre,) = opened(tmp_path, size=10).stream()
    assert (turn(centre.image) == resized[:, 10:20]).all()
    source, seen = opened(tmp_path, size=10, crop="random"), set()
    for epoch in range(20):
        (one,), (same,) = source.stream(0, epoch), source.stream(0, epoch)
        assert (one.image == same.image).all()
        errors = [np.abs(turn(one.image).astype(int) - resized[:, x : x + 10]).mean() for x in range(21)]
        seen.add(int(np.argmin(errors)))
    assert len(seen) > 6 and min(seen) < 5 and max(seen) > 15


def test_fingerprint_follows_contents_and_settings_but_not_the_place(tmp_path):
    for place in ("one", "two"):
        write_shards(tmp_path / place, 2, 3)
    base = opened(tmp_path / "one").fingerprint()
    assert base == opened(tmp_path / "two", max_bad=0.3, buffer=2).fingerprint()
    others = [opened(tmp_path / "one", **change).fingerprint() for change in ({"size": 8}, {"crop": "random"})]
    write_shard(tmp_path / "two" / "s-001.tar", range(3, 7))
    assert len({base, *others, opened(tmp_path / "two").fingerprint()}) == 4
