import base64
import io
import re
from html import unescape

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from eval.judges import load_judge
from eval.metrics import duplicates as module
from eval.metrics.duplicates import find_duplicates, nearest
from eval.report.duplicates_page import expected_high, write_page
from eval.stages.features import extract_features
from iris.data import WORLDS

COPIES, NOISY = range(100, 106), range(200, 206)


def draw(n, seed, d=10):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def copying():
    """Pictures of a model that copied twelve training pictures, six of them with a little noise."""
    world, judge = WORLDS["shapes"], load_judge("shapes")
    training, heldout, drawn = (world.draw("train", n, seed) for n, seed in ((2048, 0), (1024, 7), (600, 9)))
    generated, noise = drawn.images.copy(), np.random.default_rng(0)
    for i in COPIES:
        generated[i] = training.images[i]
    for i in NOISY:
        generated[i] = np.clip(training.images[i] + noise.integers(-4, 5, training.images[i].shape), 0, 255)
    features = (extract_features(judge, images).values for images in (generated, training.images, heldout.images))
    return find_duplicates(*features), generated, training.images, drawn.captions


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_nearest_matches_every_pair(metric, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 16)
    x, y = draw(50, 1), draw(70, 2)
    if metric == "cosine":
        pairs = 1 - torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=-1)
    else:
        pairs = (x[:, None] - y[None]).norm(dim=-1)
    distance, index = nearest(x, y, metric)
    torch.testing.assert_close(distance, pairs.min(1).values, rtol=1e-9, atol=1e-12)
    assert torch.equal(index, pairs.argmin(1))
    distance, index = nearest(y[:20] + 1e5, y + 1e5, "euclidean")
    assert (distance == 0).all() and torch.equal(index, torch.arange(20))


def test_copies_are_flagged_with_their_originals(copying):
    found = copying[0]
    flagged = set(found.flagged.nonzero().flatten().tolist())
    assert set(COPIES) <= flagged and len(flagged & set(NOISY)) >= 5
    assert [found.neighbour(i) for i in COPIES] == list(COPIES)
    assert found.closest(6) == list(COPIES) and float(found.cosine.distance[list(COPIES)].max()) == 0
    assert len(flagged) <= 12 + expected_high(found)


def test_new_images_are_flagged_as_rarely_as_it_says():
    counts = []
    for seed in range(20):
        found = find_duplicates(draw(500, 10 + seed), draw(400, 1), draw(500, 100 + seed), quantile=0.02)
        assert int((found.cosine.flagged | found.euclidean.flagged).sum()) == int(found.flagged.sum())
        assert 0.02 * 500 <= found.heldout_flagged <= 2 * 0.02 * 500
        counts.append(int(found.flagged.sum()) / found.expected)
    assert 0.7 < np.mean(counts) < 1.4


def test_threshold_is_the_quantile_and_the_rule_says_so():
    x, y, z = draw(50, 1), draw(300, 2), draw(1000, 3)
    found = find_duplicates(x, y, z, quantile=0.01)
    for side in (found.cosine, found.euclidean):
        real = nearest(z, y, side.metric)[0]
        assert side.threshold == float(real.sort().values[9]) and int((real <= side.threshold).sum()) == 10
        assert f"{side.threshold:.4g}" in found.rule
    assert "300 training images" in found.rule and "1 % of 1,000 real" in found.rule


def test_expected_high_is_a_bound_of_one_in_twenty():
    found = find_duplicates(draw(400, 1), draw(300, 2), draw(1000, 3), quantile=0.01)
    high = expected_high(found)
    assert stats.binom.sf(high, 400, found.heldout_flagged / 1000) < 0.05 and high < 0.1 * 400


def test_page_shows_the_pairs_and_needs_no_other_file(copying, tmp_path):
    found, generated, training, captions = copying
    path = write_page(
        found,
        generated,
        training,
        tmp_path / "sub" / "page.html",
        "shapes",
        captions,
        pairs=9,
        facts={"Model": "<b>copier</b>"},
    )
    text = path.read_text(encoding="utf-8")
    uris = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(uri)))) for uri in uris]
    order = found.closest(9)
    assert len(shown) == 18
    for i, mine, theirs in zip(order, shown[::2], shown[1::2], strict=True):
        assert np.array_equal(mine, generated[i]) and np.array_equal(theirs, training[found.neighbour(i)])
    assert not re.search(r'(?:src|href)="(?!data:)|url\((?!data:)|<script', text)
    assert found.rule in unescape(text) and f"{int(found.flagged.sum())} flagged" in text
    assert all(captions[i] in text for i in order) and "&lt;b&gt;copier" in text
    assert 'class="pairs pixels"' in text and "var(--bad)" in text.split("<section")[1].split(">")[0]


def test_page_of_a_model_that_does_not_copy(tmp_path):
    """Judged in a space where nothing is close; images of another size and kind than the training set's."""
    found = find_duplicates(draw(5, 1) + 50, draw(30, 2), draw(20, 3), quantile=0.1)
    text = write_page(
        found, torch.zeros(5, 3, 128, 128), [Image.new("RGB", (8, 8))] * 30, tmp_path / "page.html", "shapes"
    ).read_text(encoding="utf-8")
    assert "none flagged" in text and "pairs pixels" not in text and text.count("<img") == 10
    assert "var(--good)" in text.split("<section")[1].split(">")[0]


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"heldout": draw(999, 3)}, "999 images cannot tell a quantile of 0.001; at least 1000"),
        ({"quantile": 0.0}, "quantile: must be"),
        ({"training": draw(20, 2)[:, :5]}, "10, 5 and 10 wide"),
        ({"features": draw(0, 1)}, "at least 1 samples are needed, got 0"),
        ({"features": draw(5, 1) * 0}, "features: 5 features are all zero"),
        ({"training": draw(5, 1) / 0}, "training.*not finite"),
    ],
)
def test_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        find_duplicates(**{"features": draw(10, 1), "training": draw(20, 2), "heldout": draw(1000, 3), **changed})


def test_page_refuses_other_images_than_were_compared(copying, tmp_path):
    found, generated, training, captions = copying
    for given, message in (
        ((generated[:-1], training, captions), "generated: 600"),
        ((generated, training[:-1], captions), "training: 2,048"),
        ((generated, training, captions[:-1]), "captions: 600"),
    ):
        with pytest.raises(ValueError, match=message):
            write_page(found, given[0], given[1], tmp_path / "page.html", "shapes", given[2])
    assert not (tmp_path / "page.html").exists()
