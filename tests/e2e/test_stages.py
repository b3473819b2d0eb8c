"""The command of training: each stage end to end, found again, gone on with after a kill, by two processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import ranks, together
from PIL import Image

from iris.diffusion.sampling import SamplingSettings
from iris.io.progress import Progress
from iris.io.tensors import load_tensors
from iris.pipeline import IrisPipeline
from iris.stages import trained
from iris.stages.encoded import Latents
from iris.stages.latent import load_latent
from iris.stages.latent_cache import CachedLatents
from iris.stages.student import students
from iris.training.__main__ import main

SMALL = (
    "scale=smoke",
    "log=none",
    "data.train=64",
    "data.validation=16",
    "model.dim=16",
    "model.heads=2",
    "model.text_width=16",
    "latent.width=8",
    "vae.steps=12",
    "compute.checkpoint_seconds=0",
    "compute.log_every=2",
    "compute.validate_every=6",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose stages the tests share, as a person's commands in one folder do."""
    return tmp_path_factory.mktemp("place")


@pytest.fixture(autouse=True)
def here(place, monkeypatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def train(*words: str, small: tuple[str, ...] = SMALL) -> list[str]:
    """Run the command; what it printed, line by line, without times."""
    file = io.StringIO()
    with contextlib.redirect_stdout(file):
        code = main([*small, *words])
    assert code == 0, file.getvalue()
    return [line.partition("] ")[2] for line in file.getvalue().splitlines()]


def made(lines: list[str]) -> list[str]:
    """The stages that a command trained, by the first word of their keys."""
    told = [line for line in lines if " is made in " in line or " goes on where it was in " in line]
    return [line.partition(": ")[2].partition("-")[0] for line in told]


def folder_of(lines: list[str]) -> Path:
    """Of the stage that was made last."""
    return Path([line for line in lines if " in runs/stages/" in line and "done in" not in line][-1].rpartition(" ")[2])


def encoded(folder: Path) -> CachedLatents:
    """What the model of a stage's folder was trained on."""
    stage = folder.parent / json.loads((folder / "result.json").read_text())["built_on"]["encoded"]
    return CachedLatents(stage / json.loads((stage / "result.json").read_text())["latents"])


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_images(folder: Path, captions: list[str]) -> None:
    """A pipeline that makes pictures."""
    images = IrisPipeline.from_pretrained(folder).generate(captions)
    assert images.shape == (len(captions), 32, 32, 3) and images.float().std() > 1


def test_text_makes_its_vae_and_is_then_found(place, monkeypatch):
    lines = train("stage=text", "out=model")
    assert made(lines) == ["latent", "text"]
    vae, text = (next(place.glob(f"runs/stages/{name}-*")) for name in ("latent", "text"))
    assert lines[-2] == "weights   model" and lines[-1].startswith('use them  python -m iris --model model "')
    check_images(place / "model", ["a large red circle"])
    for name in ("model.safetensors", "latent.safetensors", "config.json"):
        assert (place / "model" / name).read_bytes() == (text / "weights" / name).read_bytes()
    rows = logged(text)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12] and rows[-1]["loss"] < rows[0]["loss"]
    assert [row["step"] for row in rows if "validation" in row] == [6, 12]
    result = json.loads((text / "result.json").read_text())
    assert result["built_on"] == {"latent": vae.name, "encoded": encoded(text).folder.parent.name}
    assert result["metrics"]["validation_loss"] == pytest.approx(rows[-1]["validation"])
    for folder, name in ((text, "samples"), (vae, "reconstructions")):
        pictures = sorted(path.name for path in (folder / "pictures").iterdir())
        assert pictures == [f"{name}-000006.png", f"{name}-000012.png"]
        assert np.asarray(Image.open(folder / "pictures" / pictures[-1])).std() > 1

    monkeypatch.setattr(trained, "fit", lambda *a: pytest.fail("trained again"))
    again = train("stage=text", "out=other")
    assert made(again) == [] and again[0] == f"text: {text.name} is finished, taken as it is"
    check_images(place / "other", ["a blue square"])
    assert train("stage=vae", "out=latent")[0].startswith(f"latent wavelet_vae: {vae.name} is finished")


def test_the_vae_of_a_command_of_its_own(place):
    lines = train("stage=vae", "out=latent")
    named = load_latent(place / "latent")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert named.name == "wavelet_vae" and named.latent.encode(images).shape == (2, 8, 8, 8)
    assert lines[-1] == "use them  python -m iris.training stage=text latent.weights=latent data=shapes"
    vae = next(place.glob("runs/stages/latent-*"))
    metrics, rows = json.loads((vae / "result.json").read_text())["metrics"], logged(vae)
    assert set(metrics) == {"psnr", *(f"band_psnr/{band}" for band in ("cA", "cH", "cV", "cD"))}
    assert {name: rows[-1][name] for name in metrics} == pytest.approx(metrics, abs=1e-3)
    assert rows[-1]["psnr"] > rows[2]["psnr"]
    # As the latent of another stage, by its folder: its weights identify it, not its place.
    lines = train("stage=text", "latent.weights=latent", "train.steps=2")
    assert made(lines) == ["text"]
    (place / "latent").rename(place / "moved")
    assert made(train("stage=text", "latent.weights=moved", "train.steps=2")) == []
    saved = load_latent(folder_of(lines) / "weights").latent
    assert torch.equal(saved.encode(images), named.latent.encode(images))


def test_vae_with_every_term_that_needs_no_file(place):
    lines = train(
        "stage=vae",
        "adversarial.weight=0.1",
        "adversarial.layers=2",
        "adversarial.width=16",
        "reconstruction.bands=1,2,2,2",
        "latent=conv_vae",
        "vae.steps=4",
    )
    folder = folder_of(lines)
    assert {"discriminator", "generator"} <= set(logged(folder)[-1])
    assert load_latent(folder / "weights").name == "conv_vae"


def test_distil_the_text_stage(place):
    lines = train("stage=distill", "student.steps=1,2,4", "out=student")
    # Its teacher may stand from a test before.
    assert made(lines) in (["student"], ["text", "student"], ["latent", "text", "student"])
    assert made(train("stage=distill", "student.steps=1,2,4", "out=student")) == []
    folders = students(place / "student", (1, 2, 4))
    assert folders == {1: place / "student/steps-1", 2: place / "student/steps-2", 4: place / "student"}
    for steps, folder in folders.items():
        student, captions = IrisPipeline.from_pretrained(folder), ["a large red circle", "a blue square"]
        assert student.sampling == SamplingSettings(steps, "stochastic") and student.distilled_guidance == 2.5
        check_images(folder, captions)
        explicit = {"num_inference_steps": steps, "sampler": "stochastic", "guidance_scale": 1.0, "shift": 1.0}
        own, told = (student(captions, output_type="latent", **given).images for given in ({}, explicit))
        assert torch.equal(own, told)
        assert any(f'use them  python -m iris --model {folder.relative_to(place)} "' in line for line in lines[-3:])
    train("stage=text", "out=teacher")
    weights = [load_tensors(place / name / "model.safetensors")[0] for name in ("teacher", "student")]
    assert weights[0].keys() == weights[1].keys()
    changed = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert changed and all(name.startswith("generator.") for name in changed)
    assert list((folder_of(lines) / "pictures").iterdir())


def parquet(folder: Path, rows: int = 40) -> Path:
    """Noise of three colours, with class numbers and scores from 0 to 9."""
    from datasets import Dataset

    draws, cells = np.random.default_rng(0), []
    for i in range(rows):
        pixels = draws.integers(0, 60, (32, 32, 3), dtype=np.uint8)
        pixels[..., i % 3] += 180
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        cells.append({"bytes": stream.getvalue(), "path": None})
    columns = {
        "image": cells,
        "text": [f"a {('red', 'green', 'blue')[i % 3]} picture" for i in range(rows)],
        "label": [i % 3 for i in range(rows)],
        "score": [float(i % 10) for i in range(rows)],
    }
    Dataset.from_dict(columns).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


@pytest.fixture(scope="module")
def files(place, tmp_path_factory) -> tuple[str, ...]:
    """Words that name a parquet file."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield "data=parquet", f"data.path={parquet(place)}", "data.size=32", "data.train=null", "data.validation=8"
    datasets.config.HF_DATASETS_CACHE = before


def test_class_then_text_then_aesthetic_then_a_student_on_files(files, place):
    lines = train("stage=class", *files, "data.label_column=label", "data.labels=red,green,blue", "out=classes")
    assert made(lines) == ["latent", "class"]
    config = json.loads((place / "classes" / "config.json").read_text())
    assert config["text"]["name"] == "labels" and sorted(config["text"]["classes"]) == ["blue", "green", "red"]
    check_images(place / "classes", ["red", "blue"])

    text = train("stage=text", *files, "start=classes", "train.steps=4")
    assert made(text) == ["text"]
    one, two = (
        load_tensors(folder / "model.safetensors")[0]["generator.input.weight"].flatten()
        for folder in (place / "classes", folder_of(text) / "weights")
    )
    assert torch.nn.functional.cosine_similarity(one, two, 0) > 0.9
    check_images(folder_of(text) / "weights", ["a red picture"])

    key = folder_of(text).name
    selection = "data.score_column=score", "data.min_score=8"
    scored = train("stage=aesthetic", *files, f"start={key}", *selection, "finetune.steps=4")
    assert made(scored) == ["aesthetic"]
    scores = encoded(folder_of(scored)).scores
    assert scores and min(scores) >= 8
    before, after = (json.loads((folder_of(run) / "weights" / "config.json").read_text()) for run in (text, scored))
    assert before == after

    few = train(
        "stage=distill",
        *files,
        "start=classes",
        "data.label_column=label",
        "data.labels=red,green,blue",
        "student.method=shortcut",
        "student.steps=1,2",
        "distill.steps=4",
    )
    assert made(few) == ["student"]
    for steps, folder in students(folder_of(few) / "weights", (1, 2)).items():
        check_images(folder, ["red"])
        assert IrisPipeline.from_pretrained(folder).sampling == SamplingSettings(steps)


def test_stages_on_a_stream_take_its_first_rows(tmp_path, monkeypatch):
    """data.train of them, latents as well as pictures."""
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            for row in range(30):
                stream = io.BytesIO()
                Image.new("RGB", (32, 32), (8 * row, 99, 0)).save(stream, "PNG")
                for ending, data in (("png", stream.getvalue()), ("txt", b"a picture")):
                    info = tarfile.TarInfo(f"{row:03d}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    lines = train("stage=text", "data=tar", f"data.path={tmp_path}", "data.size=32", "data.train=40", "train.steps=4")
    assert made(lines) == ["latent", "text"]
    latents = Latents(encoded(folder_of(lines)))
    assert len(latents) == 40 and latents.keys([0, 39]) == ["0.tar/000", "1.tar/009"]
    assert len(list(tmp_path.glob("runs/stages/encoded-*"))) == 1  # nothing is held out of a stream
    (pixels,) = tmp_path.glob("runs/stages/data-*")
    assert json.loads((pixels / "about.json").read_text())["shape"] == [40, 32, 32, 3]


def test_weights_that_do_not_fit_are_told(place, capsys):
    train("stage=text", "out=model")
    assert main([*SMALL, "stage=text", "start=model", "model.dim=24"]) == 2
    assert "start=model: model.dim is 16 there and 24 here" in capsys.readouterr().err


# -- kills and several processes ------------------------------------------------------------------------------------


LABELS = {"vae": "latent wavelet_vae", "distill": "student consistency"}


def kill_at(label: str, step: int) -> None:
    """kill -9 of this process when a stage has logged ``step``."""
    training = Progress.training

    def watched(self, work, row, batch):
        training(self, work, row, batch)
        if work == f"train {label}" and row["step"] >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    Progress.training = watched


@pytest.mark.parametrize("stage", ["vae", "text", "class", "aesthetic", "distill"])
def test_a_killed_stage_continues_and_ends_the_same(stage, place, files, tmp_path, monkeypatch):
    words = [f"stage={stage}"]
    if stage == "aesthetic":
        words += [*files, "data.score_column=score", "data.min_score=5"]
    whole, label = _folder(place, words), LABELS.get(stage, stage)
    others = shutil.ignore_patterns(whole.name)
    shutil.copytree(place / "runs" / "stages", tmp_path / "runs" / "stages", ignore=others)
    monkeypatch.chdir(tmp_path)
    wanted = random.Random().randint(2, 10)
    told = f"killed at {wanted}"

    def work(rank: int) -> int:
        kill_at(label, wanted)
        return main([*SMALL, *words])

    assert together(work, [{}]) == [-signal.SIGKILL], told
    killed = tmp_path / "runs" / "stages" / whole.name
    step = load_tensors(killed / "checkpoint.safetensors")[1]["step"]
    assert wanted - 1 <= step < 12 and not (killed / "result.json").exists(), told
    assert f"{label}: {whole.name} goes on where it was in runs/stages/{whole.name}" in train(*words)
    compared = sorted(path.relative_to(whole) for path in whole.rglob("weights/**/*.safetensors"))
    assert compared
    for path in compared:
        tensors, others = load_tensors(whole / path)[0], load_tensors(killed / path)[0]
        assert tensors.keys() == others.keys(), told
        assert all(torch.equal(tensors[name], others[name]) for name in tensors), told
    for name in ("step", "loss", "grad_norm", "validation"):
        assert [row.get(name) for row in logged(killed)] == [row.get(name) for row in logged(whole)], told


def _folder(place: Path, words: list[str]) -> Path:
    """Of the stage that a command makes, or finds."""
    line = [line for line in train(*words) if " is made in " in line or " is finished, " in line][-1]
    return place / "runs" / "stages" / line.partition(": ")[2].split()[0]


def test_two_processes_make_the_stages_of_one(place, tmp_path, monkeypatch, capfd):
    words = ["stage=text", "train.optimiser=adamw"]
    alone = _folder(place, words)
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    assert together(lambda rank: main([*SMALL, *words, "out=model"]), ranks(2)) == [0, 0], capfd.readouterr().err
    said = capfd.readouterr().out
    assert said.count("weights   model") == 1 and said.count(" is made in ") == 2
    both = tmp_path / "runs" / "stages" / alone.name
    vae = json.loads((alone / "result.json").read_text())["built_on"]["latent"]
    # Measured 1e-7 of the VAE, and 8e-7 of what is trained on its latents.
    for one, other in ((both, alone), (both.parent / vae, alone.parent / vae)):
        assert [row["step"] for row in logged(one)] == [row["step"] for row in logged(other)]
        assert [row["loss"] for row in logged(one)] == pytest.approx([row["loss"] for row in logged(other)], rel=1e-5)
    check_images(tmp_path / "model", ["a large red circle"])
    assert together(lambda rank: main([*SMALL, *words, "train.batch=15"]), ranks(2)) == [2, 2]
    said = capfd.readouterr().err
    assert said.count("error: ") == 1 and "train.batch=15 must be a multiple of 2: 2 processes" in said
