import io

import numpy as np
import pytest
from PIL import Image

from iris.data import pixels
from iris.errors import SettingError


def png(width=32, height=32, colour=(200, 30, 30), mode="RGB"):
    stream = io.BytesIO()
    Image.new(mode, (width, height), colour).save(stream, "PNG")
    return stream.getvalue()


def dataset(images, captions=None):
    import datasets as hf

    columns = {
        "image": [image if image is None else {"bytes": image, "path": None} for image in images],
        "caption": [f"picture {i}" for i in range(len(images))] if captions is None else captions,
    }
    return hf.Dataset.from_dict(columns, features=hf.Features({"image": hf.Image(), "caption": hf.Value("string")}))


def test_right_size_is_left_untouched():
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    assert (pixels(dataset([stream.getvalue()]), 16).images[0] == noise).all()


def test_centre_crop_keeps_the_aspect():
    noise = np.random.default_rng(0).integers(0, 256, (32, 96, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    short_side_resized = np.asarray(Image.fromarray(noise).resize((48, 16), Image.Resampling.BICUBIC))
    assert (pixels(dataset([stream.getvalue()]), 16).images[0] == short_side_resized[:, 16:32]).all()


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # without a low-pass this gives black or white
    stream = io.BytesIO()
    Image.fromarray(stripes).save(stream, "PNG")
    image = pixels(dataset([stream.getvalue()]), 8).images[0].astype(int)
    assert abs(image[2:-2, 2:-2] - 127).max() < 12


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [("L", 90, (90, 90, 90)), ("RGBA", (10, 20, 30, 0), (255, 255, 255)), ("CMYK", (0, 0, 0, 0), (255, 255, 255))],
)
def test_modes_become_rgb(mode, colour, expected):
    stream = io.BytesIO()
    Image.new(mode, (16, 16), colour).save(stream, "TIFF")
    assert tuple(pixels(dataset([stream.getvalue()]), 16).images[0, 8, 8]) == expected


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b"not an image at all", "unreadable"),
        (png()[:60], "unreadable"),  # cut off in the middle
        (b"", "no image"),
        (None, "no image"),
        (png(200, 3), "200x3 pixels"),
    ],
)
def test_bad_images_are_skipped_and_named(broken, reason):
    images = [png(), broken, png(), png()]
    result = pixels(dataset(images), 16, max_bad=0.25)
    assert result.images.shape == (3, 16, 16, 3) and result.captions == ["picture 0", "picture 2", "picture 3"]
    assert len(result.bad) == 1 and result.bad[0].startswith("row 1 (") and reason in result.bad[0]


def test_too_many_bad_images_are_an_error_with_count_and_names():
    images = [png(), *[b"rubbish"] * 7, png(), png()]
    with pytest.raises(SettingError, match=r"data\.max_bad.*7 of 10.*row 1 .*row 5 .*…"):
        pixels(dataset(images), 16, max_bad=0.5)


def test_an_empty_caption_is_a_bad_row():
    result = pixels(dataset([png()] * 4, ["a", "  ", None, "d"]), 16, max_bad=0.5)
    assert result.captions == ["a", "d"] and result.bad == ["row 1 (empty caption)", "row 2 (empty caption)"]
    with pytest.raises(SettingError, match=r"data\.max_bad"):
        pixels(dataset([png()] * 4, ["a", "  ", None, "d"]), 16)


def test_no_caption_at_all_names_the_column():
    with pytest.raises(SettingError, match=r"data\.text_column: all 3 captions are empty"):
        pixels(dataset([png()] * 3, ["", " ", None]), 16, max_bad=0.9)


@pytest.mark.parametrize(
    ("size", "max_bad", "setting"), [(4, 0.01, "size"), (32, 1.0, "max_bad"), (32, -0.1, "max_bad")]
)
def test_settings_out_of_range(size, max_bad, setting):
    with pytest.raises(SettingError, match=rf"data\.{setting}"):
        pixels(dataset([png()]), size, max_bad)


def test_an_empty_split_is_an_error():
    with pytest.raises(SettingError, match="no rows"):
        pixels(dataset([]), 16)
