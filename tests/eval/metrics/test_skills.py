import numpy as np
import pytest
import torch

from eval.judges import load_judge
from eval.judges.images import to_float
from eval.judges.train_shapes import as_tensor, spoil
from eval.metrics.bootstrap import wilson_interval
from eval.metrics.objects import count_objects
from eval.metrics.skills import ABSENT, ALL, NO_IMAGES, NOT_READ, SKILLS, Share, summarise_skills
from iris.data import WORLDS
from iris.errors import SettingError

SHAPES, SHAPES2 = WORLDS["shapes"], WORLDS["shapes2"]
worlds = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)


def wanted(world, n=200, split="all", seed=0):
    return {name: torch.from_numpy(classes) for name, classes in world.draw(split, n, seed).attributes.items()}


def wrong(world, named, name, lines):
    """``named`` with attribute ``name`` misread on ``lines``."""
    changed = named[name].clone()
    changed[lines] = (changed[lines] + 1) % len(world.attributes[name])
    return {**named, name: changed}


@worlds
def test_the_judge_reads_real_pictures_right_in_every_skill(world):
    pictures = world.draw("all", 256, 77)
    read = load_judge("shapes").attributes(world.name, to_float(torch.from_numpy(pictures.images)))
    found = summarise_skills(world, {**read, "count": count_objects(pictures.images)}, pictures.attributes)
    shown = {name.removeprefix("other_") for name in world.attributes} | {"count", ALL}
    for part in (found.seen, found.heldout):
        assert list(part) == [*SKILLS, ALL]
        assert {skill for skill, share in part.items() if isinstance(share, Share)} == shown
        assert min(share.value for share in part.values() if isinstance(share, Share)) >= 0.97
    assert found.seen[ALL].n + found.heldout[ALL].n == 256


def test_what_a_world_cannot_show_has_no_number():
    for world, absent in ((SHAPES, {"relation"}), (SHAPES2, {"size", "position"})):
        named = wanted(world)
        found = summarise_skills(world, named, named)
        for part in (found.seen, found.heldout, found.gap):
            assert {skill for skill, share in part.items() if share == ABSENT} == absent
            assert part["count"] == NOT_READ


def test_shares_are_counted_apart_by_held_out_pairs():
    named = wanted(SHAPES)
    heldout = torch.from_numpy(SHAPES.is_heldout({name: classes.numpy() for name, classes in named.items()}))
    lines = heldout.nonzero().flatten()[:7]
    read = wrong(SHAPES, named, "colour", lines)
    found = summarise_skills(SHAPES, read, named)
    count = int(heldout.sum())
    assert found.seen["colour"].value == 1 and found.seen["colour"].n == 200 - count
    assert found.heldout["colour"] == Share((count - 7) / count, *wilson_interval((count - 7) / count, count), count)
    assert found.heldout[ALL].value == found.heldout["colour"].value and found.heldout["shape"].value == 1
    gap = found.gap["colour"]
    assert gap.value == pytest.approx(7 / count) and 0 < gap.low < gap.value < gap.high
    assert found.gap["shape"].low < 0 == found.gap["shape"].value < found.gap["shape"].high


def test_gap_interval_is_newcombes():
    """Newcombe 1998, table II, method 10: 56/70 - 48/80 has the interval 0.0524 to 0.3339."""
    named = {name: torch.zeros(150, dtype=torch.long) for name in SHAPES.attributes}
    partner = next(
        i
        for i in range(5)
        if SHAPES.is_heldout({**{k: v.numpy() for k, v in named.items()}, "shape": np.full(150, i)}).all()
    )
    named["shape"] = torch.where(torch.arange(150) < 70, (partner + 1) % 5, partner)
    right = torch.cat([torch.arange(70) < 56, torch.arange(80) < 48])
    found = summarise_skills(SHAPES, {**named, "size": (~right).long()}, named)
    assert (found.gap["size"].low, found.gap["size"].high) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_both_objects_count():
    named = wanted(SHAPES2, split="train")
    read = wrong(SHAPES2, wrong(SHAPES2, named, "colour", slice(0, 10)), "other_colour", slice(5, 20))
    found = summarise_skills(SHAPES2, {**read, "count": torch.full((200,), 2)}, named)
    assert found.seen["colour"].value == pytest.approx(0.9) and found.seen["relation"].value == 1
    one_missing = torch.full((200,), 2)
    one_missing[100:150] = 1
    found = summarise_skills(SHAPES2, {**read, "count": one_missing}, named)
    assert found.seen["count"].value == 0.75 and found.seen[ALL].value == pytest.approx(0.65)
    assert found.heldout["colour"] == found.gap["colour"] == NO_IMAGES


def test_json_holds_every_skill():
    named = wanted(SHAPES)
    stored = summarise_skills(SHAPES, named, named).as_dict()
    assert list(stored["seen"]) == list(stored["gap"]) == [*SKILLS, ALL]
    assert stored["seen"]["relation"] == ABSENT and set(stored["heldout"]["colour"]) == {"value", "low", "high", "n"}


def test_refuses():
    named = wanted(SHAPES)
    with pytest.raises(SettingError, match="wanted: world shapes has the attributes colour"):
        summarise_skills(SHAPES, named, {"colour": named["colour"]})
    with pytest.raises(ValueError, match="predicted"):
        summarise_skills(SHAPES, {"colour": named["colour"]}, named)
    for changed in ({name: classes[:5] for name, classes in named.items()}, {**named, "size": named["size"][:, None]}):
        with pytest.raises(ValueError, match="same N"):
            summarise_skills(SHAPES, changed, named)
    none = {name: classes[:0] for name, classes in named.items()}
    with pytest.raises(ValueError, match="N >= 1"):
        summarise_skills(SHAPES, none, none)
    with pytest.raises(ValueError, match="classes must be integers"):
        summarise_skills(SHAPES, {**named, "size": named["size"].float()}, named)
    with pytest.raises(SettingError, match="colour of world shapes must be in 0..7"):
        summarise_skills(SHAPES, named, {**named, "colour": named["colour"] + 7})


@worlds
@pytest.mark.parametrize("split", ["validation", "heldout"])
def test_objects_are_counted(world, split):
    pictures = world.draw(split, 256, 77)
    objects = len(world.pairs)
    assert (count_objects(pictures.images) == objects).all()
    images = spoil(as_tensor(pictures), torch.Generator().manual_seed(0))
    assert (count_objects(images) == objects).float().mean() >= 0.98
    if world.name == "shapes2":
        half = pictures.images.copy()
        lines = pictures.attributes["relation"] == 0
        half[lines, :, :32] = half[lines, :1, :1]  # the left object painted over
        assert (count_objects(half[lines]) == 1).float().mean() >= 0.9


def test_an_empty_picture_has_no_object():
    assert count_objects(torch.full((2, 32, 32, 3), 128, dtype=torch.uint8)).tolist() == [0, 0]
