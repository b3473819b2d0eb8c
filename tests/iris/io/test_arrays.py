"""Arrays that grow row by row: what is on disk, what a kill leaves, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from iris.errors import SettingError
from iris.io.arrays import ABOUT, HEADER, PROGRESS, ArrayFolder, GrowingArray, GrowingLines, Growth
from iris.io.tensors import DTYPES

ROW = (2, 3)


def folder_at(path):
    path.mkdir(parents=True, exist_ok=True)
    return ArrayFolder(path, "numbers", "count", "count_all", 7, frozenset({"limit"}))


def growth_at(path, dtype="float32"):
    folder = folder_at(path)
    return Growth(folder, [GrowingArray(folder, "x.npy", ROW, dtype), GrowingLines(folder, "x.jsonl")])


def values(first, count):
    return torch.arange(first * 6, (first + count) * 6, dtype=torch.float32).reshape(count, *ROW)


def add(growth, first, count):
    growth.append(values(first, count), [f"row {i}\n" for i in range(first, first + count)], seen=first + count)


def whole(path, dtype="float32"):
    growth = growth_at(path, dtype)
    add(growth, 0, 5)
    growth.finish({"dtype": dtype, "limit": 9})
    return growth.folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_come_back_in_their_dtype(tmp_path, dtype):
    folder = whole(tmp_path, dtype)
    stored = folder.read("x.npy", np.asarray([4, 1]))
    expected = values(0, 5)[[4, 1]].to(DTYPES[dtype])
    assert torch.equal(stored.view(torch.bfloat16) if dtype == "bfloat16" else stored, expected)
    assert torch.equal(folder.read("x.npy", slice(1, 3)), folder.read("x.npy", np.asarray([1, 2])))
    assert (tmp_path / "x.npy").stat().st_size == HEADER + 5 * 6 * expected.element_size()
    folder.check_array("x.npy", (5, *ROW), dtype)
    assert (tmp_path / "x.jsonl").read_text().splitlines() == [f"row {i}" for i in range(5)]


def test_truth_values_are_kept(tmp_path):
    folder = folder_at(tmp_path)
    growth = Growth(folder, [GrowingArray(folder, "x.npy", (3,), "bool")])
    growth.append(torch.tensor([[True, False, True]]))
    growth.finish({"dtype": "bool", "limit": 1})
    assert np.load(tmp_path / "x.npy").tolist() == [[True, False, True]]


def test_about_json_is_written_last_and_progress_goes(tmp_path):
    growth = growth_at(tmp_path)
    add(growth, 0, 2)
    with pytest.raises(SettingError, match=rf"numbers .*: {ABOUT} is missing; count_all writes it last"):
        growth.folder.open("x.jsonl", False)
    growth.save()
    assert json.loads((tmp_path / PROGRESS).read_text()) == {"rows": 2, "seen": 2}
    growth.finish({"dtype": "float32", "limit": 9})
    about = growth.folder.open("x.jsonl", True)
    assert list(about) == ["format", "dtype", "limit", "files"] and list(about["files"]) == ["x.npy", "x.jsonl"]
    assert {path.name for path in tmp_path.iterdir()} == {ABOUT, "x.npy", "x.jsonl"}


@pytest.mark.parametrize("behind", [b"", b"half a row", bytes(100)])
def test_a_killed_writer_goes_on_behind_the_last_saved_row(tmp_path, behind):
    growth = growth_at(tmp_path / "a")
    add(growth, 0, 2)
    growth.save()
    add(growth, 2, 1)
    for name in ("x.npy", "x.jsonl"):
        with open(tmp_path / "a" / name, "ab") as file:
            file.write(behind)
    again = growth_at(tmp_path / "a")
    assert again.progress == {"rows": 2, "seen": 2}
    add(again, 2, 3)
    again.finish({"dtype": "float32", "limit": 9})
    for path in whole(tmp_path / "b").path.iterdir():
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()


def test_one_that_is_killed_between_its_header_and_its_end_goes_on(tmp_path):
    growth = growth_at(tmp_path)
    add(growth, 0, 2)
    growth.save()
    growth.files[0].close(2)
    assert growth_at(tmp_path).progress["rows"] == 2


@pytest.mark.parametrize("spoil", ["array", "lines", "header", "progress"])
def test_what_is_not_on_the_disk_is_written_anew(tmp_path, spoil):
    growth = growth_at(tmp_path)
    add(growth, 0, 2)
    growth.save()
    array, lines = tmp_path / "x.npy", tmp_path / "x.jsonl"
    if spoil == "array":
        array.write_bytes(array.read_bytes()[:-1])
    elif spoil == "lines":
        lines.write_bytes(lines.read_bytes()[:-1])
    elif spoil == "header":  # of an array that was written otherwise
        np.save(array, np.zeros((20, *ROW), np.float32))
    else:
        (tmp_path / PROGRESS).write_text("{")
    again = growth_at(tmp_path)
    assert again.progress == {"rows": 0}
    assert array.read_bytes() == bytes(HEADER) and lines.read_bytes() == b""


def test_save_waits(tmp_path):
    growth = growth_at(tmp_path)
    add(growth, 0, 1)
    growth.save(every=1e9)
    assert not (tmp_path / PROGRESS).exists()


def test_values_that_the_file_cannot_hold_are_refused(tmp_path):
    growth = growth_at(tmp_path, "float16")
    with pytest.raises(SettingError, match="numbers: values of x are not finite in dtype=float16; use dtype=float32"):
        growth.append(torch.full((1, *ROW), 7e4), ["row\n"])
    with pytest.raises(SettingError, match="not finite in dtype=float16$"):
        growth.append(torch.full((1, *ROW), float("nan")), ["row\n"])
    with pytest.raises(ValueError, match=r"x.npy has rows of shape \(2, 3\), not \(3, 2\)"):
        growth.append(torch.zeros(1, 3, 2), ["row\n"])


def test_the_folder_is_made_once(tmp_path):
    folder, calls = folder_at(tmp_path / "new"), []

    def write():
        calls.append(1)
        growth = Growth(folder, [GrowingLines(folder, "x.jsonl")])
        growth.append(["row\n"])
        growth.finish({"dtype": "float32", "limit": 9})

    assert [folder.make(write), folder.make(write)] == [False, True] and calls == [1]


def test_damage_is_told(tmp_path):
    folder = whole(tmp_path)

    def refused(name, data, message, verify=False):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SettingError, match=message):
            folder.open("x.jsonl", verify)
        (tmp_path / name).write_bytes(before)

    array, lines = (tmp_path / "x.npy").read_bytes(), (tmp_path / "x.jsonl").read_bytes()
    refused("x.npy", array[:-1], "x.npy is 375 bytes long instead of 376; delete the folder to count anew")
    refused("x.npy", array[:-1] + b"?", "x.npy is changed since it was written", verify=True)
    refused("x.jsonl", lines[::-1], "x.jsonl is changed since it was written")
    for about in (b'{"format": 8, "dtype": "float32", "limit": 9, "files": {}}', b'{"format": 7}', b"[]"):
        refused(ABOUT, about, f"{ABOUT} is not one of format 7; delete the folder")
    refused(ABOUT, b"{", f"{ABOUT} is not readable")
    (tmp_path / "x.npy").unlink()
    with pytest.raises(SettingError, match="x.npy is missing"):
        folder.open("x.jsonl", False)


def test_arrays_of_another_shape_or_kind_are_told(tmp_path):
    folder = whole(tmp_path)
    with pytest.raises(SettingError, match=r"float32 \(5, 2, 3\) instead of float32 \(5, 3, 2\)"):
        folder.check_array("x.npy", (5, 3, 2), "float32")
    with pytest.raises(SettingError, match="float32 .* instead of int16 "):
        folder.check_array("x.npy", (5, *ROW), "bfloat16")
    with pytest.raises(SettingError, match="x.jsonl is not a numpy file"):
        folder.check_array("x.jsonl", (5, *ROW), "float32")


def test_a_folder_names_its_path():
    with pytest.raises(SettingError, match="numbers nowhere: about.json is missing"):
        ArrayFolder(Path("nowhere"), "numbers", "count", "count_all", 7, frozenset()).open("x", False)
