"""The benchmarks that train: the latents' comparison and the class stage's samples, on a little data."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import cifar_classes, cifar_classifier, latents, step
from benchmarks.cifar_classes import Judged, halves
from benchmarks.cifar_classifier import augment, load_classifier, load_labelled
from benchmarks.cifar_report import command_of, statement
from benchmarks.few_steps import Row, verdicts
from benchmarks.latents import ARMS, Plan, matched_width
from iris.data import source_settings
from iris.errors import SettingError
from iris.latents import build_latent
from iris.pipeline import IrisPipeline
from iris.stages import base
from iris.stages.settings import settings_of
from iris.training.__main__ import main as train

ROOT = Path(__file__).parents[2]
CLASSES = source_settings("cifar10").labels
SMALL = ("scale=smoke", "log=none", "train.steps=6", "latent.levels=1", "latent.stages=1", "threads=1")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- few steps ------------------------------------------------------------------------------------------------------


def test_the_report_on_few_steps_judges_its_own_numbers():
    page = (ROOT / "reports" / "few_steps.md").read_text()
    rows = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[1].isdecimal():
            fid, error = map(float, cells[3].split(" ± "))
            rows.append(Row(cells[0], int(cells[1]), int(cells[2]), fid, error))
    assert len(rows) == 16 and all(f"\n{row}\n" in page for row in rows)
    assert verdicts(rows) == [line for line in page.splitlines() if line.startswith("- ")]
    assert [line.rpartition(" ")[2] for line in verdicts(rows)] == ["met.", "met.", "missed.", "met."]
    assert len(verdicts([row for row in rows if row.steps != 4])) == 2


# -- a step ---------------------------------------------------------------------------------------------------------


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


# -- latents --------------------------------------------------------------------------------------------------------


def built(arm: str, width: int, **options: int) -> int:
    chosen = dict(ARMS[arm])
    with torch.device("meta"):
        latent = build_latent(chosen.pop("name"), **chosen, width=width, **options)
    return sum(p.numel() for p in latent.parameters())


def test_the_latents_agree_in_parameters_at_the_first_width_that_allows_it():
    settings = settings_of(["stage=vae", "latent.channels=16", "latent.width=100"])
    width, counts = matched_width(settings)
    assert counts == {arm: built(arm, width, channels=16, levels=2, stages=0) for arm in ARMS}
    assert counts["wavelet"] == counts["unshuffle"] < counts["conv"] <= 1.01 * counts["wavelet"]
    before = [built(arm, width - 8, channels=16, levels=2, stages=0) for arm in ("wavelet", "conv")]
    assert width - 8 >= 100 and before[1] > 1.01 * before[0]
    settings = settings_of(["stage=vae", "latent.channels=16", "latent.width=1000"])
    with pytest.raises(SettingError, match=r"latent.width=1000: up to 1024, no width .* within 0.0%"):
        matched_width(settings, 1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=cifar10"], "cifar10=FOLDER is needed"),
        (["seeds=0,a"], "seeds=a must be a whole number of at least 0"),
        (["pictures=1"], "pictures=1 must be a whole number of at least 2"),
        (["longer=0"], "longer=0 must be"),
    ],
)
def test_a_plan_that_cannot_be_followed(words, message):
    with pytest.raises(SettingError, match=message):
        Plan.of(words)


def test_latents_are_compared_once(tmp_path, monkeypatch, capsys):
    words = ["data=shapes", "channels=4", "seeds=0,1", "pictures=160", "longer=8", "report=out/latents.md", *SMALL]
    latents.main(words)
    report = (tmp_path / "out/latents.md").read_text()
    kept = json.loads((tmp_path / "runs/latents.json").read_text())
    trained = []
    for key, found in kept.items():  # beside the stage's own figures, of the same held-out pictures
        folder = tmp_path / "runs/stages" / key.split()[0]
        settings, result = (json.loads((folder / name).read_text()) for name in (base.SETTINGS, base.RESULT))
        measures, stage = found["measures"], result["metrics"]
        assert measures["psnr"] == pytest.approx(stage["psnr"], abs=1e-3)
        assert measures["psnr cD"] == pytest.approx(stage["band_psnr/cD"], abs=1e-3)
        assert measures["FD (judge shapes)"] > 0
        arm = next(arm for arm, latent in ARMS.items() if latent.items() <= settings["latent"].items())
        trained.append((settings["train"]["steps"], settings["seed"], arm, measures["psnr"]))
        assert settings["latent"]["width"] == 24
    assert [row[:3] for row in trained] == [(steps, seed, arm) for steps in (6, 8) for seed in (0, 1) for arm in ARMS]
    mean = np.mean([psnr for steps, _, arm, psnr in trained if arm == "conv" and steps == 6])
    count = built("conv", 24, channels=4, levels=1, stages=1)
    assert "## shapes, 4 channels, 8 steps\n" in report and f"| conv_vae | {count:,} | {mean:.2f} ±" in report
    assert (tmp_path / "out/latents.png").stat().st_size < 200_000

    monkeypatch.setattr(base, "fit", lambda *a: pytest.fail("trained again"))
    monkeypatch.setattr(latents, "measure", lambda *a: pytest.fail("measured again"))
    latents.main(words)
    assert (tmp_path / "out/latents.md").read_text() == report


# -- classes --------------------------------------------------------------------------------------------------------


def test_augmented_images_are_moved_and_mirrored_originals():
    draws = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 8, 8, generator=draws)
    seen = set()
    for image, changed in zip(images, augment(images, draws), strict=True):
        padded = F.pad(image[None], (4,) * 4, mode="reflect")[0]
        crops = {(top, left): padded[:, top : top + 8, left : left + 8] for top in range(9) for left in range(9)}
        seen |= {
            (*place, mirrored)
            for place, crop in crops.items()
            for mirrored in (False, True)
            if torch.equal(crop.flip(2) if mirrored else crop, changed)
        }
    assert len(seen) >= 12 and {mirrored for *_, mirrored in seen} == {False, True}


def test_halves_share_no_picture():
    labels = torch.tensor([1, 0, 1, 1, 0, 0, 1])
    chosen, rest = halves(labels, 2)
    assert chosen.tolist() == [1, 4, 0, 2] and rest.tolist() == [3, 5, 6]
    with pytest.raises(ValueError, match="each=3 must be below 3"):
        halves(labels, 3)


def judged(right: float, guidance: float | None = None) -> Judged:
    """100 pictures of each of ten classes, that share of each recognised and the rest taken for the next class."""
    wanted = torch.arange(10).repeat_interleave(100)
    wrong = torch.arange(100).repeat(10) >= round(100 * right)
    return Judged("", torch.where(wrong, (wanted + 1) % 10, wanted), wanted, 0.0, 0.0, guidance)


def test_accuracy_by_class_and_what_is_mistaken():
    found = judged(0.25)
    assert found.accuracy == 0.25 and found.interval[0] < 0.25 < found.interval[1]
    share, (low, high) = found.of_class(3)
    assert share == 0.25 and low < found.interval[0] and high > found.interval[1]
    assert found.mistaken(9) == (0, 0.75) and judged(1.0).mistaken(9) is None


def test_one_answer_to_everything_is_no_success():
    wanted = torch.arange(10).repeat_interleave(100)
    best = Judged("", torch.full_like(wanted, 4), wanted, 0.0, 0.0, 2.0)
    assert best.of_class(4)[0] == 1.0 and best.when_named(4) == 0.1 and best.when_named(5) == 0.0
    text = statement([judged(0.9), judged(0.85), best], best, CLASSES)
    assert text.startswith("**No**") and "and rightly: no class." in text and text.endswith(f"{', '.join(CLASSES)}.")


@pytest.mark.parametrize(
    ("right", "word", "lost"),
    [(0.8, "Yes, mostly", "no class"), (0.3, "In part", "no class"), (0.1, "No", "airplane, ")],
)
def test_the_statement_follows_from_the_numbers(right, word, lost):
    best = judged(right, 2.0)
    text = statement([judged(0.9), judged(0.85), best], best, CLASSES)
    assert text.startswith(f"**{word}**") and f"recognises {right:.1%} [" in text and "real pictures get 90.0%" in text
    assert f"Not above chance: {lost}" in text


def test_the_command_gives_the_settings_again():
    words = [
        "stage=class",
        "data=cifar10",
        "data.path=files",
        "latent.channels=16",
        "train.learning_rate=3e-3",
        "reconstruction.bands=0,1,1,1",
        "data.train=100",
        "train.compile=true",
        "seed=1",
        "runs_dir=far/away",
        "out=far/weights",
        "vae=far/latent",
    ]
    settings = json.loads(json.dumps(asdict(settings_of(words))))
    command = command_of(settings).split()
    assert command[:3] == ["python", "-m", "iris.training"] and "far" not in command
    again = asdict(settings_of([*command[3:], "runs_dir=far/away"]))
    assert again == asdict(settings_of(words)) | {"out": "weights", "vae": "latent"}
    assert len(command) == 3 + len(words)  # nothing beyond what was said: latent= for runs_dir=


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """Ten classes of noise around a colour each, as CIFAR-10's parquet files."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    draws, folder = np.random.default_rng(0), tmp_path / "files"
    folder.mkdir()
    colours = draws.integers(0, 200, (10, 3))
    for split, count in (("train", 400), ("test", 120)):
        rows = {"image": [], "text": [], "label": []}
        for i in range(count):
            stream = io.BytesIO()
            Image.fromarray((colours[i % 10] + draws.integers(0, 50, (32, 32, 3))).astype(np.uint8)).save(stream, "PNG")
            rows["image"].append({"bytes": stream.getvalue(), "path": None})
            rows["text"].append(CLASSES[i % 10])
            rows["label"].append(i % 10)
        datasets.Dataset.from_dict(rows).to_parquet(folder / f"{split}.parquet")
    return folder


def test_samples_of_a_class_stage_are_judged(files, tmp_path, monkeypatch, capsys):
    cifar_classifier.main(
        [
            "--path",
            str(files),
            "--out",
            "judge/classifier.safetensors",
            "--epochs",
            "8",
            "--batch",
            "40",
            "--width",
            "8",
        ]
    )
    model, test = load_classifier(Path("judge/classifier.safetensors")), load_labelled(str(files), "validation")
    assert model.about["accuracy"] > 0.9 and model.classes == CLASSES
    right = cifar_classifier.classified(model, test.pixels) == test.labels
    assert right.double().mean().item() == pytest.approx(model.about["accuracy"])

    assert train([*SMALL, "stage=class", "data=cifar10", f"data.path={files}", "data.train=128", "out=model"]) == 0
    stage = next(tmp_path.glob("runs/stages/class-*"))
    words = [
        "model",
        "--path",
        str(files),
        "--classifier",
        "judge/classifier.safetensors",
        "--ran",
        str(stage),
        "--each",
        "6",
        "--guidance",
        "1",
        "2.5",
        "--steps",
        "2",
        "--report",
        "out/cifar10.md",
    ]
    cifar_classes.main(words)
    report = (tmp_path / "out/cifar10.md").read_text()
    assert "| real | 100.0% [" in report and "| samples, guidance 2.5 | " in report and "nobody has looked" in report
    assert "| class | 6 | 16 | " in report and "python -m iris.training stage=class data=cifar10" in report
    grid = Image.open(tmp_path / "out/cifar10.png")
    assert grid.size == (72 + 6 * 66 - 2, 10 * 66 - 2)

    monkeypatch.setattr(IrisPipeline, "generate", lambda *a: pytest.fail("sampled again"))
    cifar_classes.main([*words, "--seen", "Nothing but noise."])
    again = (tmp_path / "out/cifar10.md").read_text()
    assert again == report.replace("nobody has looked yet (`--seen`).", "Nothing but noise.")
