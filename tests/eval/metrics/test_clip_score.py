import math

import pytest
import torch

from eval.metrics.clip_score import clip_scores


def test_each_sample_is_clamped():
    scores = clip_scores(torch.tensor([0.5, -0.3, 0.1]))
    assert scores.dtype == torch.float64 and scores.tolist() == pytest.approx([50, 0, 10], abs=1e-5)


@pytest.mark.parametrize(
    "cosines", [torch.zeros(0), torch.tensor([0.5, math.nan]), torch.tensor([30.0, 2.0]), torch.zeros(2, 2)]
)
def test_refuses(cosines):
    with pytest.raises(ValueError, match="cosines"):
        clip_scores(cosines)
