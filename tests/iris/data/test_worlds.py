import hashlib

import numpy as np
import pytest

from iris.data import WORLDS, shapes, shapes2
from iris.data.raster import COLOURS, SHAPES, distance
from iris.data.world import HELDOUT_PAIRS
from iris.errors import SettingError

# The first 256 training pictures of seed 0. A change here is a change of the world: raise its VERSION and train the
# judge again, since every stored figure belongs to the old pictures.
STORED = {
    "shapes": (
        "6f1a60c9e64f048357202ceb60022b8fda1d3815454fee6d0b80a1fd8fd59c37",
        "5a9983670355e744e51b46ecd6dfdbbd5233fe38fd497ce2d6a89f2fc7251b18",
    ),
    "shapes2": (
        "045c0f3c3f246dc4e8da885df9752fffb67c979d19b54f8176a7414b93bd8949",
        "b39af9bcb6af9222a12de338e76e4e4c0666d6caf3c6b181c23ae0422cbe696e",
    ),
}
worlds = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)


def rows(world, split):
    return set(map(tuple, world.tuples[split].tolist()))


@worlds
def test_pictures_are_the_stored_ones(world):
    drawn = world.draw("train", 256, 0)
    assert drawn.images.shape == (256, world.size, world.size, 3) and drawn.images.dtype == np.uint8
    assert (
        hashlib.sha256(drawn.images.tobytes()).hexdigest(),
        hashlib.sha256("\n".join(drawn.captions).encode()).hexdigest(),
    ) == STORED[world.name]


@worlds
def test_a_picture_does_not_depend_on_how_many_are_drawn(world):
    many, few, late = world.draw("train", 2000, 5), world.draw("train", 7, 5), world.draw("train", 3, 5, first=1500)
    assert (many.images[:7] == few.images).all() and many.captions[:7] == few.captions
    assert (many.images[1500:1503] == late.images).all() and many.captions[1500:1503] == late.captions


@worlds
def test_seeds_and_splits_draw_different_pictures(world):
    base = world.draw("train", 8, 0).images
    assert not (base == world.draw("train", 8, 1).images).all(axis=(1, 2, 3)).any()
    assert not (base == world.draw("validation", 8, 0).images).all(axis=(1, 2, 3)).any()


@worlds
def test_splits_share_no_tuple_and_cover_the_world(world):
    train, validation, heldout = (rows(world, split) for split in ("train", "validation", "heldout"))
    assert not train & validation and not train & heldout and not validation & heldout
    assert train | validation | heldout == rows(world, "all")
    assert 0.10 <= len(validation) / (len(train) + len(validation)) <= 0.15


@worlds
def test_heldout_pairs_are_never_trained_on_and_validation_pairs_always(world):
    assert len(HELDOUT_PAIRS) == len(COLOURS) and set(HELDOUT_PAIRS.values()) == set(SHAPES)
    for colour, shape in world.pairs:
        seen = {
            split: {
                (world.attributes[colour][c], world.attributes[shape][s])
                for c, s in zip(*(world.columns(world.tuples[split])[name] for name in (colour, shape)), strict=True)
            }
            for split in world.tuples
        }
        assert not set(HELDOUT_PAIRS.items()) & (seen["train"] | seen["validation"])
        assert len(seen["train"]) == 32 and seen["validation"] <= seen["train"]
        assert set(HELDOUT_PAIRS.items()) <= seen["heldout"]


@worlds
def test_drawn_attributes_belong_to_their_split_and_fill_it(world):
    for split in ("train", "validation", "heldout"):
        drawn = world.draw(split, 20 * len(world.tuples[split]) if world.name == "shapes" else 500, 0)
        tuples = set(zip(*(column.tolist() for column in drawn.attributes.values()), strict=True))
        assert tuples <= rows(world, split)
        assert world.name != "shapes" or tuples == rows(world, split)


@worlds
def test_captions_name_every_attribute_in_at_most_16_words(world):
    columns = world.columns(world.tuples["all"])
    for phrasing in range(world.phrasings):
        texts = world.caption(columns, phrasing)
        assert len(set(texts)) == len(texts)  # a caption tells exactly which tuple it describes
        for i in range(0, len(texts), 97):
            names = {key: world.attributes[key][column[i]] for key, column in columns.items()}
            relation = names.pop("relation", "")
            assert all(name in texts[i] for name in names.values()) and len(texts[i].split()) <= 16
            assert not relation or relation in texts[i] or shapes2.INVERSE[relation] in texts[i]
            assert " a orange" not in f" {texts[i]}" and " an red" not in f" {texts[i]}"


def test_both_directions_of_a_relation_describe_the_same_picture():
    one = {name: np.zeros(1, int) for name in shapes2.ATTRIBUTES} | {"other_colour": np.ones(1, int)}
    assert shapes2.caption(one, 0) == ["a red circle left of a green circle on a white background"]
    assert shapes2.caption(one, 1) == ["a green circle right of a red circle on a white background"]
    image = shapes2.render(one)[0].astype(int)
    assert abs(image[32, 17] - COLOURS["red"]).max() <= 1 and abs(image[32, 47] - COLOURS["green"]).max() <= 1


@worlds
def test_objects_fit_in_the_picture_at_every_extreme(world):
    """No pixel at the border is wholly covered: the outline closes inside the picture."""
    rows = world.tuples["all"][:: 1 if world.name == "shapes" else 10]
    columns = world.columns(rows)
    places = world.jitters - 3 * (len(world.pairs) + 1)
    jitter = np.full((len(rows), world.jitters), 0.5, np.float32)  # the middle of every tint: exact colours
    table = np.asarray(list(COLOURS.values()))
    for seed in range(3):
        jitter[:, :places] = np.random.default_rng(seed).integers(0, 2, (len(rows), places)) * np.float32(1 - 2**-24)
        images = world.render(columns, jitter).astype(int)
        border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
        for colour, _ in world.pairs:
            own = table[columns[colour]]
            assert abs(border - own[:, None]).max(-1).min() > 3
            inside = abs(images - own[:, None, None]).max(-1) <= 1
            assert inside.mean(axis=(1, 2)).min() > 0.02  # and there is an object to speak of


def test_shapes_have_the_right_place_colour_and_size():
    for position, (x, y) in zip(shapes.ATTRIBUTES["position"], shapes.CORNERS, strict=True):
        index = shapes.ATTRIBUTES["position"].index(position)
        one = dict.fromkeys(shapes.ATTRIBUTES, np.zeros(1, int)) | {"position": np.array([index])}
        image = shapes.render(one)[0].astype(int)
        inside = abs(image - COLOURS["red"]).max(-1) < 3
        centre = np.argwhere(inside).mean(0) + 0.5
        assert abs(centre - (16 + 8.5 * y, 16 + 8.5 * x)).max() < 0.5
        assert abs(inside.sum() / (np.pi * 5.5**2) - 1) < 0.2


def test_distances_are_negative_inside_and_right_on_the_edges():
    at = lambda shape, x, y: float(distance(SHAPES.index(shape), *np.float32([[x], [y], [10]]))[0])  # noqa: E731
    assert at("circle", 6, 8) == 0 and at("circle", 0, 0) == -10
    assert at("ring", 0, 0) > 0 and at("ring", 7.8, 0) < 0 and abs(at("ring", 10, 0)) < 1e-5
    assert abs(at("square", 8.8, 3)) < 1e-5 and at("square", 8, 8) < 0
    assert at("cross", 9, 0) < 0 and at("cross", 6, 6) > 0 and abs(at("cross", 10, 0)) < 1e-5
    assert abs(at("triangle", 0, -10)) < 1e-5 and at("triangle", 0, 0) < 0 and at("triangle", 8, -8) > 0


def test_drawing_at_another_size_keeps_the_picture():
    small, large = shapes.draw("train", 16, 0).images, shapes.draw("train", 16, 0, size=64).images
    halved = large.reshape(16, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    assert abs(halved - small).mean() < 2


@worlds
def test_misuse_is_named(world):
    ones = {name: np.zeros(1, int) for name in world.attributes} | {"other_colour": np.ones(1, int)}
    with pytest.raises(SettingError, match="train, validation, heldout"):
        world.draw("test", 4, 0)
    with pytest.raises(SettingError, match="missing: shape"):
        world.render({name: value for name, value in ones.items() if name != "shape"})
    with pytest.raises(SettingError, match=r"colour of world .* 0\.\.7"):
        world.render(ones | {"colour": np.array([8])})
    with pytest.raises(SettingError, match="jitter"):
        world.render(ones, np.zeros((1, 2), np.float32))
    assert len(world.draw("train", 0, 0).captions) == 0


def test_two_objects_of_one_colour_are_no_picture_of_shapes2():
    with pytest.raises(SettingError, match="no pictures"):
        shapes2.render({name: np.zeros(1, int) for name in shapes2.ATTRIBUTES})
