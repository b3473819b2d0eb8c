"""``python -m iris``: pictures from captions, and one line about whatever is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from iris.__main__ import GAP, SAMPLERS, main
from iris.diffusion.flow import SAMPLERS as FLOW_SAMPLERS
from iris.latents import build_latent
from iris.model import TextToLatent
from iris.nn.generator import Generator, GeneratorConfig
from iris.pipeline import IrisPipeline, SamplingSettings
from iris.randomness import initialise
from iris.text import Vocabulary, WordEncoder

ROOT = Path(__file__).parents[2]
PROMPT, OTHER, SIZE = "a red circle", "a blue square", 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a saved model, small and with random weights."""
    config = GeneratorConfig(
        channels=12,
        text_width=12,
        dim=16,
        heads=2,
        prelude=1,
        core=1,
        coda=1,
        iterations=2,
        ffn_ratio=2.0,
        mixer="grfm",
    )
    text = WordEncoder(Vocabulary.from_captions([PROMPT, OTHER], 6), 12)
    parts = initialise(TextToLatent(text, Generator(config)), 0)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))
    folder = tmp_path_factory.mktemp("model")
    IrisPipeline(parts, build_latent("haar", levels=1), "haar", {"levels": 1}, SIZE).save_pretrained(folder)
    return folder


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """Runs the command in a folder of its own, in this process; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*arguments: str) -> str:
        main(["--model", str(model), *arguments])
        return capsys.readouterr().out

    return run


def failure(run, capsys, *arguments):
    """The message of a command that must fail: one line on stderr, exit code 2, nothing written."""
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.startswith("python -m iris: ")
    assert list(Path.cwd().glob("*.png")) == []
    return printed.err


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_in_a_process_of_its_own(model, tmp_path):
    command = [
        sys.executable,
        "-m",
        "iris",
        PROMPT,
        "--model",
        str(model),
        "--steps",
        "3",
        "--iterations",
        "4",
        "--guidance",
        "2",
        "--seed",
        "5",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = r"out\.png: 1 image of 8x8 pixels, 3 steps of 4 iterations, guidance 2, seed 5, in \d+\.\d\d s\n"
    assert re.fullmatch(said, done.stdout)
    settings = SamplingSettings(3, guidance=2.0, iterations=4)
    expected = IrisPipeline.from_pretrained(model).generate([PROMPT], settings, seed=5)[0].numpy()
    assert np.abs(pixels(tmp_path / "out.png").astype(int) - expected).max() <= 1


def test_several_images_become_a_grid(run):
    assert "6 images" in run(PROMPT, OTHER, "--count", "3", "--out", "grid.png")
    whole = pixels("grid.png")
    assert whole.shape == (2 * SIZE + GAP, 3 * SIZE + 2 * GAP, 3)
    run(PROMPT, "--count", "1", "--out", "one.png")
    assert np.array_equal(whole[:SIZE, :SIZE], pixels("one.png"))  # image i depends on the seed and i alone
    assert (whole[SIZE : SIZE + GAP] == 255).all()
    run(PROMPT, OTHER, "--out", "two.png")
    assert pixels("two.png").shape == (SIZE, 2 * SIZE + GAP, 3)


def test_sizes_and_formats(run):
    assert "12x4 pixels" in run(PROMPT, "--size", "12x4", "--out", "wide.webp")
    assert Image.open("wide.webp").size == (12, 4)
    run(PROMPT, "--size", "16", "--out", "square.JPG")
    assert Image.open("square.JPG").size == (16, 16)


def test_options_matter(run):
    run(PROMPT, "--out", "plain.png")
    options = {"seed": "1", "guidance": "1", "negative": OTHER, "sampler": "heun", "steps": "2"}
    for name, value in options.items():
        run(PROMPT, f"--{name}", value, "--out", f"{name}.png")
        assert not np.array_equal(pixels(f"{name}.png"), pixels("plain.png")), name


def test_a_student_is_sampled_as_it_says(run, model, capsys, tmp_path):
    student = IrisPipeline(*IrisPipeline.from_pretrained(model).parts[:5], SamplingSettings(2, "stochastic"), 2.5)
    student.save(tmp_path / "student")
    said = run(PROMPT, "--model", str(tmp_path / "student"), "--out", "own.png")
    assert "2 steps of 2 iterations, guidance 1, seed 0" in said
    run(PROMPT, "--steps", "2", "--sampler", "stochastic", "--guidance", "1", "--out", "told.png")
    run(PROMPT, "--steps", "2", "--guidance", "1", "--out", "euler.png")
    assert np.array_equal(pixels("own.png"), pixels("told.png"))
    assert not np.array_equal(pixels("own.png"), pixels("euler.png"))
    for picture in tmp_path.glob("*.png"):
        picture.unlink()
    refused = failure(run, capsys, PROMPT, "--model", str(tmp_path / "student"), "--guidance", "3")
    assert "guidance 2.5 distilled into its weights" in refused


def test_editing(run):
    photo = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    mask[:4] = 255
    Image.fromarray(photo).save("photo.png")
    Image.fromarray(mask).save("mask.png")
    run(PROMPT, "--image", "photo.png", "--strength", "0", "--out", "same.png")
    assert np.array_equal(pixels("same.png"), photo)
    run(PROMPT, "--image", "photo.png", "--mask", "mask.png", "--out", "half.png")
    assert np.array_equal(pixels("half.png")[4:], photo[4:]) and not np.array_equal(pixels("half.png")[:4], photo[:4])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--steps 0", "--steps: '0' must be a number at least 1"),
        ("--steps many", "--steps"),
        ("--iterations 0", "--iterations"),
        ("--guidance -1", "--guidance"),
        ("--guidance nan", "--guidance"),
        ("--count 0", "--count"),
        ("--seed x", "--seed"),
        ("--sampler ddim", "--sampler.*euler"),
        ("--size 7", "--size: 7x7 must be multiples of 2"),
        ("--size 0", "--size"),
        ("--size 8x", "--size"),
        ("--size 2000000", "--size or --count.*memory"),
        ("--out out.txt", "--out: 'out.txt' must end in .png"),
        ("--out no/such/out.png", "--out: folder no/such"),
        ("--image none.png", "--image: cannot read 'none.png'"),
        ("--image text.txt", "--image.*picture"),
        ("--mask text.txt", "--mask"),
        ("--strength 2", "--strength"),
        ("--strength 0.5", "--strength: needs --image"),
        ("--model nowhere/at/all", "--model.*no such folder"),
        ("--model someone/model", "--model: model='someone/model'"),
        ("--telepathy", "--telepathy"),
    ],
)
def test_bad_input_is_told_in_one_line(options, named, run, capsys, tmp_path):
    (tmp_path / "text.txt").write_text("no picture")
    assert re.search(named, failure(run, capsys, PROMPT, *options.split()))


def test_a_prompt_is_needed(run, capsys):
    assert "prompt" in failure(run, capsys)


def test_a_damaged_model_is_told(run, capsys, model, tmp_path):
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:-9])
    assert "config.json" in failure(run, capsys, PROMPT, "--model", str(tmp_path))


def test_without_a_model_the_shipped_one_is_used(run, capsys, model, monkeypatch, tmp_path):
    monkeypatch.setattr("iris.__main__.files", lambda package: tmp_path)
    without = lambda *arguments: main([PROMPT, *arguments])  # noqa: E731
    assert re.search("--model: no model is shipped in .*weights/shapes", failure(without, capsys))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "shapes").symlink_to(model)
    without("--out", "out.png")
    assert pixels("out.png").shape == (SIZE, SIZE, 3)


def test_the_samplers_are_those_of_the_flow():
    assert tuple(FLOW_SAMPLERS) == SAMPLERS
