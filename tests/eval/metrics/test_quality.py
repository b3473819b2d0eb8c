import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torchvision.transforms.v2.functional import gaussian_blur

from eval.judges import load_judge
from eval.judges.images import to_float
from eval.metrics.clip_score import clip_scores
from eval.metrics.features import Features
from eval.metrics.fid import frechet_distance, frechet_jackknife
from eval.metrics.fid_infinity import fid_infinity
from eval.metrics.kid import kid, kid_interval
from eval.metrics.manifold import manifold_metrics
from eval.metrics.quality import METRICS, measure_quality
from eval.stages.features import extract_features
from iris.data import WORLDS
from iris.errors import SettingError

MADE_WITH = {"judge": "shapes", "judge_sha256": "28", "resize": "bicubic-32", "image_size": 32}


def draw(n, seed, scale=1.0, d=8, **metadata):
    values = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale
    return Features.of(values, {**MADE_WITH, "metric_name": "FD (shapes)", **metadata})


@pytest.fixture(scope="module")
def judge():
    return load_judge("shapes")


@pytest.fixture(scope="module")
def pictures():
    return WORLDS["shapes"].draw("train", 512, 5)


@pytest.fixture(scope="module")
def real(judge):
    return extract_features(judge, WORLDS["shapes"].draw("train", 1024, 0).images)


def test_every_number_is_its_modules():
    x, y = draw(200, 1, 1.2), draw(300, 2)
    found = measure_quality(x, y, seed=3)
    assert tuple(found.measures) == METRICS
    fid, error = frechet_jackknife(x.values, y.values)
    assert (found["fid"].value, found["fid"].standard_error) == pytest.approx((fid, error), rel=1e-9)
    limit = fid_infinity(x.values, y.values, seed=3)
    assert (
        found["fid_infinity"].value,
        found["fid_infinity"].standard_error,
        found["fid_infinity"].seed,
    ) == pytest.approx((limit.value, limit.standard_error, 3), rel=1e-9)
    assert (found["kid"].value, found["kid"].standard_error) == kid(x.values, y.values)
    assert (found["kid"].low, found["kid"].high) == kid_interval(x.values, y.values)
    manifold = manifold_metrics(x.values, y.values)
    for name in ("precision", "recall", "density", "coverage"):
        assert found[name].value == getattr(manifold, name)
        assert found[name].standard_error == getattr(manifold, f"{name}_se")
        assert f"k = {5 if name in ('density', 'coverage') else 3}" in found[name].method
    for name in METRICS:
        measure = found[name]
        assert measure.low <= measure.value <= measure.high and measure.standard_error > 0
        assert (measure.n, measure.reference_n, measure.flags) == (200, 300, ())


def test_it_says_what_both_sides_were_made_with():
    found = measure_quality(draw(100, 1), draw(100, 2, data="5f3a"))
    assert found.title == "FD (shapes)" and found["fid_infinity"].seed == 0
    assert found.made_with["judge_sha256"] == "28" and found.reference["data"] == "5f3a"


def test_what_should_not_be_quoted_is_flagged_and_finite():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measure_quality(draw(30, 1, d=40), draw(35, 2, d=40))
    for one in found.measures.values():
        assert all(map(math.isfinite, (one.value, one.standard_error, one.low, one.high)))
    assert [text.split(":")[0] for text in found["fid"].flags] == [
        "30 generated images of 40 features",
        "35 real images of 40 features",
    ]
    assert len(found["fid_infinity"].flags) == 2 and "below 320" in found["fid_infinity"].flags[1]
    enough = measure_quality(draw(64, 1), draw(64, 2))
    assert not any(measure.flags for measure in enough.measures.values())


def test_metrics_can_be_chosen():
    found = measure_quality(draw(100, 1), draw(100, 2), metrics=("kid", "recall"))
    assert tuple(found.measures) == ("kid", "recall")
    with pytest.raises(SettingError, match="metrics='is' is unknown; allowed: fid"):
        measure_quality(draw(100, 1), draw(100, 2), metrics=("is",))


@pytest.mark.parametrize(
    "changed", [{"judge": "dinov2"}, {"judge_sha256": "29"}, {"resize": "bilinear"}, {"image_size": 64}]
)
def test_refuses_a_reference_of_another_making(changed):
    with pytest.raises(ValueError, match=f"cannot be compared, {next(iter(changed))} differs"):
        measure_quality(draw(100, 1), draw(100, 2, **changed))


def test_refuses_too_few_images():
    with pytest.raises(ValueError, match="features: at least 8 images are needed for all metrics, got 7"):
        measure_quality(draw(7, 1), draw(100, 2))
    measure_quality(draw(8, 1), draw(8, 2))


def grows(values, factor=1.05):
    return all(factor * low < high for low, high in itertools.pairwise(values))


def test_a_set_is_at_distance_zero_of_itself(real):
    assert abs(frechet_distance(real.values, real.values)) <= 1e-6
    found = measure_quality(real, real, metrics=("precision", "recall", "coverage"))
    assert all(measure.value == 1 for measure in found.measures.values())


def test_fid_and_kid_grow_with_blur(judge, pictures, real):
    images = to_float(torch.from_numpy(pictures.images))
    blurred = [images if not sigma else gaussian_blur(images, [19, 19], [sigma, sigma]) for sigma in (0, 1.5, 3, 6)]
    features = [extract_features(judge, part).values for part in blurred]
    assert grows([frechet_distance(part, real.values) for part in features])
    assert grows([kid(part, real.values)[0] for part in features[1:]])


def test_fid_and_kid_grow_with_noise(judge, pictures, real):
    images = to_float(torch.from_numpy(pictures.images))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    features = [extract_features(judge, (images + sigma * noise).clamp(-1, 1)).values for sigma in (0, 0.2, 0.4, 0.8)]
    assert grows([frechet_distance(part, real.values) for part in features])
    assert grows([kid(part, real.values)[0] for part in features[1:]])


def test_fid_grows_with_the_share_of_other_labels(judge):
    """The reference holds four colours; of the generated pictures a growing share has one of the other four."""
    drawn = WORLDS["shapes"].draw("train", 1600, 3)
    few = np.flatnonzero(drawn.attributes["colour"] < 4)
    other = np.flatnonzero(drawn.attributes["colour"] >= 4)
    right = extract_features(judge, drawn.images[few[:400]])
    mixed = [np.concatenate([few[400 : 400 + 300 - count], other[:count]]) for count in (0, 30, 100, 300)]
    found = [
        measure_quality(extract_features(judge, drawn.images[rows]), right, metrics=("fid", "precision"))
        for rows in mixed
    ]
    assert grows([each["fid"].value for each in found])
    assert found[-1]["precision"].value < 0.5 * found[0]["precision"].value


def test_clip_score_falls_with_the_share_of_wrong_captions(judge, pictures):
    images = to_float(torch.from_numpy(pictures.images))
    scores = []
    for share in (0, 0.25, 0.5, 1):
        moved = int(share * len(images))
        captions = pictures.captions[1:moved] + pictures.captions[: min(moved, 1)] + pictures.captions[moved:]
        scores.append(float(clip_scores(judge.similarity(images, captions)).mean()))
    assert grows(scores[::-1], 1.1)
