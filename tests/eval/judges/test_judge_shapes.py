import json

import numpy as np
import pytest
import torch

from eval.judges import JUDGES, load_judge
from eval.judges.shapes import RECORD, WEIGHTS, ShapesJudge, WordTokenizer
from eval.judges.train_shapes import as_tensor, attribute_accuracy, make, neighbours, retrieval, spoil
from iris.data import WORLDS
from iris.data.raster import key_of, random_bits
from iris.errors import SettingError

FRESH = 77  # a seed that neither training nor the record uses
TOLERANCE = 0.01
worlds = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)


@pytest.fixture(scope="module")
def judge():
    return load_judge("shapes")


def test_the_record_meets_the_targets(judge):
    record = json.loads(RECORD.read_text())["record"]
    assert judge.record == record and judge.sha256 == record["sha256"] and judge.name == "shapes"
    assert WEIGHTS.stat().st_size == record["bytes"] <= 4_000_000
    assert record["worlds"] == {name: world.version for name, world in WORLDS.items()}
    assert record["command"].startswith("python -m eval.judges.train_shapes")
    assert min(record["retrieval_at_1"].values()) >= 0.95
    for split, accuracy in record["attribute_accuracy"].items():
        assert min(value for name, value in accuracy.items() if name != "caption") >= 0.97, split


@worlds
@pytest.mark.parametrize("split", ["validation", "heldout"])
def test_the_record_holds_on_fresh_pictures(judge, world, split):
    where = f"{world.name}/{split}"
    assert abs(retrieval(judge, world, split, FRESH) - judge.record["retrieval_at_1"][where]) <= 0.02
    for key, spoiled in (("attribute_accuracy", False), ("attribute_accuracy_spoiled", True)):
        measured = attribute_accuracy(judge, world, split, 512, FRESH, spoiled)
        for name, value in judge.record[key][where].items():
            assert abs(measured[name] - value) <= TOLERANCE, (key, name)


@worlds
def test_answers_follow_the_picture(judge, world):
    """Against the labels of other pictures the accuracy must be chance, else the figure measures something else."""
    pictures = world.draw("validation", 1024, FRESH)
    read = judge.attributes(world.name, as_tensor(pictures))
    for name, values in world.attributes.items():
        assert read[name].dtype == torch.int64 and read[name].shape == (1024,)
        share = (read[name].numpy() == np.roll(pictures.attributes[name], 1)).mean()
        assert abs(share - 1 / len(values)) < 0.08, name
    black = judge.attributes(world.name, torch.full((2, 3, 32, 32), -1.0))["background"]
    assert (black == world.attributes["background"].index("black")).all()


@worlds
def test_the_right_caption_beats_one_with_a_single_wrong_attribute(judge, world):
    pictures = world.draw("validation", 256, FRESH)
    images = as_tensor(pictures)
    right = judge.similarity(images, pictures.captions)
    assert right.shape == (256,) and right.abs().max() <= 1 + 1e-5
    for name, values in world.attributes.items():
        changed = pictures.attributes | {name: (pictures.attributes[name] + 1) % len(values)}
        lines = world.allowed(changed)  # shapes2: not into two objects of one colour
        changed = {key: column[lines] for key, column in changed.items()}
        wrong = judge.similarity(images[torch.from_numpy(lines)], world.caption(changed))
        assert (right[torch.from_numpy(lines)] > wrong).float().mean() >= 0.97, name


def test_both_directions_of_a_relation_score_alike(judge):
    world = WORLDS["shapes2"]
    pictures = world.draw("validation", 128, FRESH)
    forward, backward = (judge.similarity(as_tensor(pictures), world.caption(pictures.attributes, i)) for i in (0, 1))
    assert (forward - backward).abs().mean() < 0.05


def test_features_do_not_depend_on_the_batch(judge):
    images = as_tensor(WORLDS["shapes"].draw("train", 300, FRESH))
    features = judge.image_features(images)
    assert features.shape == (300, 128) and features.dtype == torch.float32
    assert torch.allclose(features[290:], judge.image_features(images[290:]), atol=1e-4)
    assert not features.requires_grad


def test_other_sizes_are_resized(judge):
    world = WORLDS["shapes"]
    for size in (16, 64, 128):
        pictures = world.draw("heldout", 128, FRESH, size=size)
        read = judge.attributes("shapes", as_tensor(pictures))
        assert (read["colour"].numpy() == pictures.attributes["colour"]).mean() > 0.97, size


def test_misuse_is_named(judge):
    with pytest.raises(SettingError, match=f"judge must be one of {', '.join(JUDGES)}, not 'oracle'"):
        load_judge("oracle")
    with pytest.raises(SettingError, match="'zebra'"):
        judge.text_features(["a small red zebra"])
    with pytest.raises(SettingError, match="16 words"):
        judge.text_features(["red " * 17])
    with pytest.raises(SettingError, match="shapes, shapes2, not of data 'parquet'"):
        judge.attributes("parquet", torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="one caption an image"):
        judge.similarity(torch.zeros(2, 3, 32, 32), ["a red circle"])
    for wrong in (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, 32, 32, 3), torch.zeros(3, 32, 32)):
        with pytest.raises(ValueError, match=r"float images \[B, 3, H, W\]"):
            judge.image_features(wrong)


def test_changed_or_missing_weights_are_refused(tmp_path):
    data = bytearray(WEIGHTS.read_bytes())
    data[-1] ^= 1
    (tmp_path / "shapes.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="sha256"):
        ShapesJudge(weights=tmp_path / "shapes.safetensors")
    with pytest.raises(FileNotFoundError, match="train_shapes"):
        ShapesJudge(weights=tmp_path / "none.safetensors")


def test_tokens_end_with_the_highest_id():
    tokens = WordTokenizer(["circle", "red"], 6)(["Red, circle", "red"])
    assert tokens.tolist() == [[1, 3, 2, 4, 0, 0], [1, 3, 4, 0, 0, 0]]


@worlds
def test_hard_negatives_differ_in_one_attribute(world):
    rows = neighbours(world, 50, random_bits(key_of("test"), np.arange(200), 3)).reshape(50, 4, -1)
    assert world.allowed(world.columns(rows.reshape(200, -1))).all()
    differing = (rows[:, 1:] != rows[:, :1]).sum(axis=2)
    assert differing.max() == 1 and differing.mean() > 0.9


def test_spoiling_changes_pictures_but_not_much():
    images = as_tensor(WORLDS["shapes"].draw("train", 64, FRESH))
    spoiled = spoil(images, torch.Generator().manual_seed(0))
    assert 0.02 < (spoiled - images).abs().mean() < 0.15 and spoiled.abs().max() <= 1


def test_training_is_deterministic(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.judges.train_shapes.BATCH", 32)
    monkeypatch.setattr("eval.judges.train_shapes.MEASURED", 64)
    one, two = (make(2, 0, tmp_path / name / "shapes.safetensors") for name in ("one", "two"))
    assert one.sha256 == two.sha256 and one.sha256 != make(2, 1, tmp_path / "three" / "shapes.safetensors").sha256
