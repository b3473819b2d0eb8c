import json
import threading
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from eval.judges import load_judge
from eval.metrics.fid import frechet_distance
from eval.stages.reference import ABOUT, FEATURES, STATISTICS, ReferenceKey, load_reference, reference
from iris.errors import SettingError

KEY = ReferenceKey(
    data="5f3a", split="validation", image_size=32, judge="shapes", judge_sha256="28", resize="bicubic-32", count=40
)


def features(count=40, seed=0):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def never():
    raise AssertionError("computed again")


def test_is_computed_once_and_read_back_as_it_was(tmp_path):
    made = reference(KEY, features, tmp_path)
    again = reference(KEY, never, tmp_path)
    for found in (made, again):
        assert torch.equal(found.values, features()) and found.metadata == asdict(KEY)
        assert frechet_distance(found.statistics, features(50, 1)) == pytest.approx(
            frechet_distance(features(), features(50, 1)), rel=1e-9
        )
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == [KEY.folder]
    assert sorted(path.name for path in (tmp_path / KEY.folder).iterdir()) == [ABOUT, FEATURES, STATISTICS]


@pytest.mark.parametrize(
    "changed",
    [
        {"data": "other"},
        {"split": "heldout"},
        {"image_size": 64},
        {"judge": "dinov2"},
        {"judge_sha256": "29"},
        {"resize": "bilinear"},
        {"count": 20},
    ],
)
def test_every_part_of_the_key_counts(tmp_path, changed):
    other = replace(KEY, **changed)
    reference(KEY, features, tmp_path)
    found = reference(other, lambda: features(other.count, 1), tmp_path)
    assert not torch.equal(found.values[:20], features()[:20])
    assert torch.equal(reference(KEY, never, tmp_path).values, features())
    # A folder that was moved or renamed is not taken for the other one, and the error names what differs.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / other.folder).rename(tmp_path / "elsewhere" / KEY.folder)
    with pytest.raises(SettingError, match=f"another one: {next(iter(changed))} is {next(iter(changed.values()))!r}"):
        reference(KEY, never, tmp_path / "elsewhere")


def test_key_of_a_judge(tmp_path):
    judge = load_judge("shapes")
    key = ReferenceKey.of(judge, "5f3a", "validation", 32, 40)
    assert (key.judge, key.judge_sha256, key.resize, key.image_size) == (judge.name, judge.sha256, judge.resize, 32)


@pytest.mark.parametrize("name", [FEATURES, STATISTICS, ABOUT])
def test_damage_is_refused(tmp_path, name):
    reference(KEY, features, tmp_path)
    path = tmp_path / KEY.folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(SettingError, match=f"{name}|another one"):
        reference(KEY, never, tmp_path)
    path.unlink()
    with pytest.raises(SettingError, match=f"{name} is missing"):
        reference(KEY, never, tmp_path)


def test_another_format_is_refused(tmp_path):
    reference(KEY, features, tmp_path)
    path = tmp_path / KEY.folder / ABOUT
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(SettingError, match="another format; delete the folder"):
        load_reference(tmp_path / KEY.folder)


def test_a_failure_leaves_nothing_behind(tmp_path):
    def fail():
        raise RuntimeError("out of power")

    with pytest.raises(RuntimeError, match="out of power"):
        reference(KEY, fail, tmp_path)
    with pytest.raises(ValueError, match="40 features were asked for, 39 were made"):
        reference(KEY, lambda: features(39), tmp_path)
    with pytest.raises(ValueError, match="not finite"):
        reference(KEY, lambda: features() * np.nan, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    assert len(reference(KEY, features, tmp_path)) == 40


def test_two_askers_make_it_once(tmp_path):
    calls, found, gate = [], [], threading.Barrier(2)

    def make():
        calls.append(1)
        return features()

    def ask():
        gate.wait()
        found.append(reference(KEY, make, tmp_path))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(found) == 2 and torch.equal(found[0].values, found[1].values)


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"count": 1}, "count must be a whole number >= 2"),
        ({"image_size": [32, 48]}, "image_size"),
        ({"split": ""}, "split"),
    ],
)
def test_refuses_keys(changed, message):
    with pytest.raises(SettingError, match=message):
        replace(KEY, **changed)
