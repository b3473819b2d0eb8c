"""``python -m eval.compare``: paired differences, what is refused, and models measured on the spot."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.__main__ import main as evaluate
from eval.compare import main
from eval.metrics.bootstrap import jackknife_interval, paired_difference
from eval.metrics.fid import frechet_replicates, jackknife_error
from eval.report.comparison import column_of, compare_results, pairs, verdict
from eval.results import read_results
from iris.data import WORLDS
from iris.errors import SettingError

SHIPPED = Path(__file__).parents[2] / "iris" / "weights" / "shapes"
N = 48
SETTINGS = ("measure=smoke", "track=none", f"measure.samples={N}", "measure.what=quality,alignment,skills")


@pytest.fixture(autouse=True, scope="module")
def surroundings(tmp_path_factory):
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("work"))
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def drawn():
    """Captions with repeats, and two sets of pictures of them: real ones, and ones whose colours are worse by noise."""
    pictures = WORLDS["shapes"].draw("validation", N // 2, 5)
    heldout = WORLDS["shapes"].draw("heldout", N // 2, 5)
    images, captions = np.concatenate([pictures.images, heldout.images]), [*pictures.captions, *heldout.captions]
    noise = np.random.default_rng(0).normal(0, 60, images.shape)
    return images, np.clip(images + noise, 0, 255).astype(np.uint8), captions


@pytest.fixture(scope="module")
def results(drawn):
    """Folders of results: the clean pictures, the noisy ones, and the clean ones in another order."""
    clean, noisy, captions = drawn
    order = np.random.default_rng(1).permutation(N)
    sets = {
        "clean": (clean, captions),
        "noisy": (noisy, captions),
        "shuffled": (clean[order], [captions[i] for i in order]),
    }
    for name, (images, texts) in sets.items():
        np.savez(f"{name}.npz", images=images, captions=np.asarray(texts))
        assert evaluate([f"model={name}.npz", *SETTINGS, f"out={name}"]) == 0
    return {name: Path(name).resolve() for name in sets}


def compared(a, b, **options):
    found = compare_results(read_results(a), read_results(b), resamples=999, **options)
    return found, {one.metric: one for one in found.differences}


def changed(folder, name, **values):
    """A copy of results in which every number was made with something else, or has another field."""
    place = Path(name)
    shutil.copytree(folder, place)
    stored = json.loads((place / "results.json").read_text())
    for number in stored["numbers"].values():
        for key, value in values.items():
            (number["made_with"] if key in number["made_with"] else number)[key] = value
    (place / "results.json").write_text(json.dumps(stored))
    return place


def test_noise_is_told_from_clean_pictures(results):
    found, by_name = compared(results["clean"], results["noisy"])
    for metric in ("fid/shapes", "clip_score/shapes", "accuracy_all/shapes", "heldout_accuracy_all/shapes"):
        one = by_name[metric]
        assert one.verdict == "A better", one
        assert one.value == pytest.approx(one.second - one.first) and one.low <= one.value <= one.high
        assert (one.value > 0) == (one.better == "lower")
    assert by_name["fid/shapes"].pairing == "20 blocks" and by_name["recall/shapes"].pairing == ""
    assert found.refused == {} and not found.same_noise
    back = compared(results["noisy"], results["clean"])[1]
    assert back["fid/shapes"].verdict == "B better"
    assert back["fid/shapes"].value == pytest.approx(-by_name["fid/shapes"].value)
    assert back["fid/shapes"].low == pytest.approx(-by_name["fid/shapes"].high)


def test_the_same_results_do_not_differ(results):
    by_name = compared(results["clean"], results["clean"])[1]
    assert all(one.value == 0 for one in by_name.values())
    assert all(by_name[name].verdict == "equal" for name in ("fid/shapes", "kid/shapes", "clip_score/shapes"))
    assert by_name["recall/shapes"].verdict == "within noise"


def test_intervals_are_those_of_paired_prompts_and_blocks(results):
    a, b = read_results(results["clean"]), read_results(results["noisy"])
    by_name = compared(results["clean"], results["noisy"], confidence=0.9)[1]
    first, second, captions = pairs(a, b, "clip_score/shapes")
    wanted = paired_difference(first, second, captions, confidence=0.9, resamples=999)
    assert (by_name["clip_score/shapes"].low, by_name["clip_score/shapes"].high) == (wanted.low, wanted.high)
    assert by_name["clip_score/shapes"].value == pytest.approx(wanted.value)
    assert by_name["clip_score/shapes"].n == len(set(captions))
    fid = by_name["fid/shapes"]
    gaps = np.subtract(b.numbers["fid/shapes"].replicates, a.numbers["fid/shapes"].replicates)
    assert (fid.low, fid.high) == pytest.approx(jackknife_interval(fid.value, jackknife_error(list(gaps)), 20, 0.9))
    errors = [one.numbers["recall/shapes"].standard_error for one in (a, b)]
    assert by_name["recall/shapes"].standard_error == pytest.approx(math.hypot(*errors))


def test_shares_are_means_over_images_of_seen_or_held_out_captions(results):
    a, b = read_results(results["clean"]), read_results(results["noisy"])
    by_name = compared(results["clean"], results["noisy"])[1]
    for metric, heldout in (("accuracy_shape/shapes", "0"), ("heldout_accuracy_shape/shapes", "1")):
        for side, one in ((a, by_name[metric].first), (b, by_name[metric].second)):
            hits = [int(row["right_shape"]) for row in side.per_image if row["heldout"] == heldout]
            assert len(hits) == N // 2 and one == pytest.approx(np.mean(hits))
    gap = by_name["accuracy_gap_shape/shapes"]
    assert gap.low <= gap.value <= gap.high and "quadrature" in gap.method
    assert column_of("accuracy_gap_shape/shapes") == "right_shape" and column_of("fid/shapes") is None


def test_the_paired_error_is_that_of_repeated_draws():
    """Two models over the same prompts: features share most of what a prompt brings."""
    width, n = 6, 300
    draws = torch.Generator().manual_seed(0)
    reference = torch.randn(4000, width, generator=draws)
    values, paired, apart = [], [], []
    for _ in range(40):
        prompt = torch.randn(n, width, generator=draws)
        sides = [0.95 * prompt + shift + 0.3 * torch.randn(n, width, generator=draws) for shift in (0.1, 0.3)]
        (a, first), (b, second) = (frechet_replicates(side, reference) for side in sides)
        values.append(b - a)
        paired.append(jackknife_error(list(np.subtract(second, first))))
        apart.append(math.hypot(jackknife_error(first), jackknife_error(second)))
    spread = np.std(values, ddof=1)
    assert 0.75 < np.mean(paired) / spread < 1.33
    assert np.mean(apart) > 1.5 * spread  # what pairing saves


def test_other_captions_do_not_pair_up(results):
    found, by_name = compared(results["clean"], results["shuffled"])
    assert "not the same, image by image" in found.refused["clip_score/shapes"]
    assert "clip_score/shapes" not in by_name
    assert by_name["fid/shapes"].pairing == "" and "as if independent" in by_name["fid/shapes"].method
    assert by_name["fid/shapes"].value == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"judge_sha256": "00"}, "judge_sha256 differs"),
        ({"judge": "inception"}, "judge differs"),
        ({"image_size": 64}, "image_size differs: 32 and 64"),
        ({"n": N + 1}, f"n differs: {N} and {N + 1}"),
        ({"resize": "other"}, "resize differs"),
    ],
)
def test_what_cannot_be_compared_is_refused(values, reason, results, tmp_path, capsys):
    other = changed(results["clean"], tmp_path / "other", **values)
    with pytest.raises(SettingError, match="nothing of A and B can be compared"):
        compared(results["clean"], other)
    assert main([str(results["clean"]), str(other)]) == 2
    assert reason in capsys.readouterr().err


def test_another_reference_refuses_the_distances_alone(results, tmp_path):
    place = tmp_path / "other"
    shutil.copytree(results["clean"], place)
    stored = json.loads((place / "results.json").read_text())
    for name in ("fid/shapes", "kid/shapes"):
        stored["numbers"][name]["reference_n"] = 99
    (place / "results.json").write_text(json.dumps(stored))
    found, by_name = compared(results["clean"], place)
    assert set(found.refused) == {"fid/shapes", "kid/shapes"}
    assert "reference_n differs: 128 and 99" in found.refused["fid/shapes"] and "recall/shapes" in by_name


def test_the_command_prints_a_table_and_writes_json(results, capsys):
    out = Path("difference.json")
    assert main([str(results["clean"]), str(results["noisy"] / "results.json"), "--out", str(out)]) == 0
    said, stored = capsys.readouterr().out, json.loads(out.read_text())
    assert "A better" in said and "clip_score" in said and str(out) in said
    assert stored["differences"]["fid/shapes"]["verdict"] == "A better" and stored["A"]["judge"] == "shapes"
    assert stored["differences"]["fid/shapes"]["value"] == pytest.approx(
        stored["differences"]["fid/shapes"]["second"] - stored["differences"]["fid/shapes"]["first"]
    )


def test_models_are_measured_on_the_spot(results, capsys):
    words = ["measure=smoke", "track=none", "measure.what=quality", f"measure.samples={N}"]
    assert main(["clean.npz", "noisy.npz", *words]) == 0
    assert "B - A" in capsys.readouterr().out
    stored = json.loads(next(Path("eval_results").glob("*-against-*.json")).read_text())
    assert stored["differences"]["fid/shapes"]["value"] == pytest.approx(
        compared(results["clean"], results["noisy"])[1]["fid/shapes"].value
    )


def test_models_are_timed_in_turn(monkeypatch, capsys):
    monkeypatch.setattr("eval.compare.ROUNDS", 2)
    monkeypatch.setattr("eval.compare.WARMUP", 0)
    shutil.copytree(SHIPPED, "model")
    for steps in (1, 2):
        words = ["measure=smoke", "track=none", "measure.what=quality", "measure.samples=16", f"sample.steps={steps}"]
        assert evaluate(["model=model", *words, f"out=steps{steps}"]) == 0
    assert main(["steps1", "steps2", "--speed", "--out", "speed.json"]) == 0
    assert "latency of one image, B / A: " in capsys.readouterr().out
    stored = json.loads(Path("speed.json").read_text())
    assert stored["speed"]["A"]["latency"]["ratio_to_first"] == 1 and stored["speed"]["B"]["latency"]["n"] == 2
    assert stored["same_noise"] and stored["differences"]["fid/shapes"]["pairing"] == "8 blocks"
    config = json.loads(Path("model/config.json").read_text())
    config["generator"]["iterations"] = 1
    Path("model/config.json").write_text(json.dumps(config))
    assert main(["steps1", "steps2", "--speed"]) == 2
    assert "have changed since they were measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["clean", "nowhere"], ["model=nowhere", "no such folder"]),
        (["clean", "noisy", "data=shapes"], ["data=shapes", "A and B are results"]),
        (["clean", "noisy", "--speed"], ["--speed", "stored images"]),
        (["clean/results.json", "clean.json"], ["clean.json: no results there"]),
        (["clean", "junk.json"], ["junk.json: not the results of python -m eval"]),
    ],
)
def test_bad_input_is_named(words, expected, results, capsys):
    Path("junk.json").write_text('{"format": 1}')
    assert main(words) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in expected), said


@pytest.mark.parametrize(
    "words", [[], ["clean"], ["clean", "noisy", "--confidence", "2"], ["clean", "noisy", "--out", "x.csv"]]
)
def test_a_command_line_that_cannot_be_read_ends_with_status_2(words, results, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("low", "high", "better", "expected"),
    [
        (0.1, 0.2, "lower", "A better"),
        (0.1, 0.2, "higher", "B better"),
        (-0.2, -0.1, "lower", "B better"),
        (-0.2, -0.1, "higher", "A better"),
        (-0.1, 0.2, "lower", "within noise"),
        (0.0, 0.0, "lower", "equal"),
        (None, None, "lower", "no interval"),
    ],
)
def test_verdicts(low, high, better, expected):
    assert verdict(low, high, better) == expected
