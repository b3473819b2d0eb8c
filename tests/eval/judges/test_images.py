import numpy as np
import pytest
import torch
from PIL import Image

from eval.judges import load_judge
from eval.judges.images import check_images, to_float, to_pixels
from eval.stages.features import extract_features


def pixels(n=3, side=8):
    return torch.randint(0, 256, (n, side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def floats(n=3, side=8):
    return to_float(pixels(n, side))


def test_accepts_every_kind_and_agrees():
    kinds = (
        pixels(),
        pixels().numpy(),
        list(pixels()),
        [image.numpy() for image in pixels()],
        [Image.fromarray(image.numpy()) for image in pixels()],
    )
    for kind in kinds:
        assert torch.equal(check_images(kind, ["a", "b", "c"]), pixels())
    for kind in (floats(), floats().numpy(), list(floats())):
        assert torch.equal(check_images(kind), floats())
    assert torch.equal(to_pixels(floats()), pixels())
    assert floats().min() >= -1 and floats().max() <= 1 and floats().shape == (3, 3, 8, 8)


def spoiled(value):
    images = floats()
    images[1, 2, 3, 4] = value
    return images


@pytest.mark.parametrize(
    "images,message",
    [
        ([], "at least 2 are needed, got 0"),
        (torch.zeros(0, 3, 8, 8), "at least 2 are needed, got 0"),
        (np.zeros((0, 8, 8, 3), np.uint8), "at least 2 are needed, got 0"),
        (pixels(1), "at least 2 are needed, got 1"),
        (spoiled(float("nan")), "1 of 3 hold pixels that are not finite, the first is number 1"),
        (spoiled(float("inf")), "not finite"),
        (spoiled(255.0), r"must lie in \[-1, 1\], found -.* to 255"),
        ([*pixels(2), *pixels(1, 16)], r"differ in size or type: 2 of \(8, 8, 3\) torch.uint8, 1 of \(16, 16, 3\)"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], "differ in size"),
        ([Image.new("RGB", (8, 8)), Image.new("RGBA", (8, 8))], r"images\[1\] has the colour mode RGBA"),
        ([pixels()[0], pixels()[0, 0]], r"images\[1\] must be"),
        (pixels()[..., :1], r"must be uint8 \[N, H, W, 3\]"),
        (floats()[:, :1], r"must be uint8 \[N, H, W, 3\]"),
        (pixels().permute(0, 3, 1, 2), r"must be uint8 \[N, H, W, 3\]"),
        (pixels().long(), "torch.int64"),
        (torch.zeros(4, 3, 0, 8), "hold no pixels"),
    ],
)
def test_refuses_images(images, message):
    with pytest.raises(ValueError, match=message):
        check_images(images)


@pytest.mark.parametrize(
    "captions,message",
    [
        (["a", "b"], "one for each of the 3 images is needed, got 2"),
        (list("abcd"), "got 4"),
        ([], "got 0"),
        ("abc", "list of 3 strings"),
        (["a", "b", 3], "list of 3 strings"),
    ],
)
def test_refuses_captions(captions, message):
    with pytest.raises(ValueError, match=message):
        check_images(pixels(), captions)


def test_one_image_is_enough_where_it_is():
    assert len(check_images(pixels(1), minimum=1)) == 1


def test_features_know_where_they_come_from():
    judge = load_judge("shapes")
    found = extract_features(judge, pixels(5, 32), batch=2, seed=3)
    assert found.values.shape == (5, judge.feature_width) and found.values.dtype == torch.float32
    torch.testing.assert_close(found.values, judge.image_features(floats(5, 32)), rtol=1e-4, atol=1e-4)
    assert found.metadata == {
        "judge": "shapes",
        "judge_sha256": judge.sha256,
        "resize": judge.resize,
        "image_size": 32,
        "metric_name": judge.metric_name,
        "seed": 3,
    }
    with pytest.raises(ValueError, match="generated: at least 2 are needed, got 1"):
        extract_features(judge, pixels(1, 32), name="generated")
