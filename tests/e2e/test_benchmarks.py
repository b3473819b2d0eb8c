"""The benchmark of a training step judges its own numbers."""

import pytest

from benchmarks import step


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ((1.01, 1.02, 1.03), "met (median 1.020, quartiles 1.015 to 1.025)"),
        ((1.06, 1.07, 1.2), "missed (median 1.070"),
        ((1.0, 1.04, 1.2), "within the spread of the rounds (median 1.040"),
    ],
)
def test_the_page_of_a_step_judges_the_median_by_its_quartiles(ratios, verdict):
    seconds = {
        "bare": [0.5] * 3,
        "fit": [0.5 * ratio for ratio in ratios],
        "reading": [0.005 * ratio for ratio in ratios],
    }
    text = step.page(seconds)
    assert f"at most 1.05 times the bare loop, {verdict}" in text
    assert "| bare loop, ms a step | 500.000 | 500.000 | 500.000 |" in text
    assert "| reading / `fit` | 0.010 | 0.010 | 0.010 |" in text
