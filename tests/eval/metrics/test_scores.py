import math

import pytest
import torch

from eval.metrics.attributes import attribute_accuracy, wilson_interval
from eval.metrics.clip_score import clip_score


def test_clip_score_clamps_each_sample():
    mean, error = clip_score(torch.tensor([0.5, -0.3, 0.1]))
    assert mean == pytest.approx(20.0)
    assert error == pytest.approx(math.sqrt((30**2 + 20**2 + 10**2) / 2 / 3))


@pytest.mark.parametrize(
    "cosines", [torch.tensor([0.5]), torch.tensor([0.5, math.nan]), torch.tensor([30.0, 2.0]), torch.zeros(2, 2)]
)
def test_clip_score_refuses(cosines):
    with pytest.raises(ValueError, match="cosines"):
        clip_score(cosines)


def test_caption_is_right_when_all_attributes_are():
    wanted = {"colour": torch.tensor([0, 1, 2, 3]), "shape": torch.tensor([1, 1, 1, 1])}
    predicted = {"shape": torch.tensor([1, 1, 0, 1]), "colour": torch.tensor([0, 1, 2, 0])}
    assert attribute_accuracy(predicted, wanted) == {"colour": 0.75, "shape": 0.75, "caption": 0.5}


def test_attribute_accuracy_refuses():
    good = {"colour": torch.tensor([0, 1])}
    for predicted, wanted in (
        (good, {"shape": torch.tensor([0, 1])}),
        ({}, {}),
        (good, {"colour": torch.tensor([0])}),
        ({"colour": torch.zeros(2)}, good),
        ({"colour": torch.zeros(2, 2).long()}, good),
        ({"colour": torch.tensor([]).long()}, {"colour": torch.tensor([]).long()}),
        ({"caption": torch.tensor([0])}, {"caption": torch.tensor([0])}),
    ):
        with pytest.raises(ValueError):
            attribute_accuracy(predicted, wanted)


def test_wilson_interval():
    low, high = wilson_interval(0.3, 10)  # Brown, Cai & DasGupta 2001: (0.108, 0.603)
    assert (low, high) == (pytest.approx(0.1078, abs=1e-4), pytest.approx(0.6032, abs=1e-4))
    assert wilson_interval(1.0, 50)[1] == 1.0 and wilson_interval(0.0, 50)[0] == 0.0
    with pytest.raises(ValueError, match="accuracy"):
        wilson_interval(30, 10)
