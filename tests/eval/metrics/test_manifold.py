import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from eval.metrics import manifold as module
from eval.metrics.manifold import manifold_metrics

NAMES = ("precision", "recall", "density", "coverage")


def draw(n, seed, scale=1.0, shift=0.0, d=8):
    noise = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise * scale + shift


def slowly(x, y, k=3, wide=5):
    """The four definitions, one ball at a time."""

    def radius(points, i, neighbour):
        return sorted(math.dist(points[i], points[j]) for j in range(len(points)) if j != i)[neighbour - 1]

    x, y = x.tolist(), y.tolist()
    real, outer = ([radius(y, i, neighbour) for i in range(len(y))] for neighbour in (k, wide))
    made = [radius(x, i, k) for i in range(len(x))]
    inside = [[math.dist(a, b) for b in y] for a in x]
    return {
        "precision": np.mean([any(d <= r for d, r in zip(row, real, strict=True)) for row in inside]),
        "recall": np.mean([any(inside[i][j] <= made[i] for i in range(len(x))) for j in range(len(y))]),
        "density": np.mean([sum(d <= r for d, r in zip(row, outer, strict=True)) / wide for row in inside]),
        "coverage": np.mean([any(inside[i][j] <= outer[j] for i in range(len(x))) for j in range(len(y))]),
    }


@pytest.mark.parametrize("scale,shift", [(0.7, 0.0), (1.3, 0.2), (1.0, 0.8)])
def test_matches_the_definitions(scale, shift):
    x, y = draw(60, 1, scale, shift, d=3), draw(75, 2, d=3)
    found = manifold_metrics(x, y)
    for name, value in slowly(x, y).items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-12), name
    assert (found.neighbours, found.density_neighbours, found.n, found.reference_n, found.blocks) == (3, 5, 60, 75, 20)


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("seed", [1, 3])
def test_matches_torch_fidelity(k, seed):
    x, y = draw(300, seed, 0.8, 0.3), draw(400, seed + 1)
    theirs = prc_features_to_metric(x, y, prc_neighborhood=k, prc_batch_size=128, save_cpu_ram=False, verbose=False)
    found = manifold_metrics(x, y, neighbours=k)
    assert 0 < found.recall < found.precision < 1
    assert (found.precision, found.recall) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)


def test_rows_held_at_a_time_do_not_matter(monkeypatch):
    x, y = draw(150, 1, 0.8), draw(130, 2)
    expected = manifold_metrics(x, y)
    monkeypatch.setattr(module, "ROWS", 37)
    found = manifold_metrics(x, y)
    assert all(getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12) for name in vars(found))


def test_far_from_zero_the_digits_stay():
    x, y = draw(150, 1, 0.8), draw(130, 2)
    near, far = manifold_metrics(x, y), manifold_metrics(x + 1e6, y + 1e6)
    assert [getattr(near, name) for name in NAMES] == [getattr(far, name) for name in NAMES]


def test_fidelity_and_diversity_are_told_apart():
    y = draw(500, 9)
    narrow, wide = manifold_metrics(draw(500, 1, 0.5), y), manifold_metrics(draw(500, 1, 2.0), y)
    assert narrow.precision > 0.95 > 0.3 > narrow.recall and wide.recall > 0.95 > 0.3 > wide.precision
    assert narrow.density > 1 > wide.density
    same = manifold_metrics(y, y)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    elsewhere = manifold_metrics(y + 100, y)
    assert all(getattr(elsewhere, name) == 0 for name in NAMES)


def test_one_repeated_image_covers_next_to_nothing():
    found = manifold_metrics(draw(1, 1, 0.1).repeat(200, 1), draw(300, 2))
    assert found.precision == 1 and found.recall == 0 and found.coverage < 0.2


def test_errors_leave_blocks_out():
    x, y, block = draw(53, 1, 0.8), draw(70, 2), torch.arange(53) % 5
    found = manifold_metrics(x, y, blocks=5)
    parts = [manifold_metrics(x[block != i], y, blocks=2) for i in range(5)]
    for name in ("recall", "coverage"):
        expected = 2 * np.std([getattr(part, name) for part in parts])
        assert getattr(found, f"{name}_se") == pytest.approx(expected, rel=1e-9), name


def test_errors_are_the_spread_of_redraws():
    """Those of recall and coverage are jackknifes of nearest neighbours, which over-state."""
    y = draw(400, 1000)
    found = [manifold_metrics(draw(300, seed, 1.1), y) for seed in range(30)]
    for name, most in (("precision", 1.5), ("density", 1.6), ("recall", 2.2), ("coverage", 2.2)):
        spread = np.std([getattr(each, name) for each in found], ddof=1)
        assert 0.65 < np.mean([getattr(each, f"{name}_se") for each in found]) / spread < most, name


def test_fewer_samples_than_features_stay_finite():
    found = manifold_metrics(draw(20, 1, d=64), draw(30, 2, d=64), blocks=10)
    assert all(math.isfinite(value) for value in vars(found).values())


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"features": draw(100, 1)[:, :5]}, "5 and 8 wide"),
        ({"features": draw(1, 1)}, "at least 2 samples"),
        ({"reference": draw(5, 1)}, "density_neighbours=5 needs at least 6"),
        ({"features": draw(4, 1), "blocks": 2}, "4 samples without one of 2 blocks"),
        ({"reference": draw(100, 1) / 0}, "reference.*not finite"),
        ({"neighbours": 0}, "neighbours: must be at least 1"),
        ({"blocks": 51}, "blocks"),
    ],
)
def test_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        manifold_metrics(**{"features": draw(100, 1), "reference": draw(100, 2), **changed})


def test_the_result_names_its_settings():
    found = manifold_metrics(draw(50, 1), draw(50, 2), neighbours=4, density_neighbours=2, blocks=10)
    assert found == replace(found, neighbours=4, density_neighbours=2, blocks=10, n=50, reference_n=50)
