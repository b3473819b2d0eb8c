"""What stages are made of: progress, the MLflow run, stored pictures, classes, weights published or adopted."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from small_clip import save_clip
from small_models import parameters_of, small_model

from iris.data.source import Source
from iris.diffusion.sampling import SamplingSettings
from iris.errors import SettingError
from iris.io.progress import Progress
from iris.latents import build_latent
from iris.pipeline import IrisPipeline
from iris.randomness import initialise
from iris.stages import flow
from iris.stages.base import Watched, check_out, content_key, publish, save_grid
from iris.stages.data import Pixels, class_names, described, fingerprint, held_out, opened, store_pixels, with_classes
from iris.stages.flow import adopt
from iris.stages.settings import settings_of
from iris.stages.vae import NamedLatent, load_latent, save_latent
from iris.text import CLIPText
from iris.training.__main__ import main

ROW = {"step": 10, "steps": 40, "time": 1.0, "loss": 0.51234, "images_per_s": 100.0, "psnr": 21.04}


def data_of(*words: str):
    """Settings data.* of a command line."""
    return settings_of(["stage=vae", "scale=smoke", *words]).data


# -- progress -------------------------------------------------------------------------------------------------------


def progress(now: list[float], **how) -> tuple[Progress, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, width=120, **how)
    return Progress(console=console, every=5.0, clock=lambda: now[0]), file


def test_plain_lines_say_step_loss_pace_and_time_left():
    now = [0.0]
    said, file = progress(now)
    now[0] = 65.0
    said.training("text", ROW, batch=20)
    assert file.getvalue() == "[1:05] text 10/40 (25%), loss 0.5123, PSNR 21.0 dB, 100 images/s, 0:06 left\n"


def test_plain_lines_are_few_but_the_last_is_there():
    now = [0.0]
    said, file = progress(now)
    for step in range(1, 41):
        now[0] += 0.5
        said.training("text", ROW | {"step": step}, batch=20)
    lines = file.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["1/40", "11/40", "21/40", "31/40", "40/40"]
    assert "left" not in lines[-1]


def test_the_time_left_of_other_work_comes_from_its_pace():
    now = [0.0]
    said, file = progress(now)
    said.done("encoding", 10, 100)
    now[0] = 10.0
    said.done("encoding", 20, 100)
    said.done("counting", 7)
    assert file.getvalue().splitlines()[1:] == ["[0:10] encoding 20/100 (20%), 0:40 left", "[0:10] counting 7"]


def test_a_terminal_gets_one_line_that_goes_and_sentences_that_stay():
    now = [0.0]
    said, file = progress(now, force_terminal=True)
    with said:
        said.training("text", ROW, batch=20)
        said.say("done")
    shown = file.getvalue()
    assert "10/40" in shown and shown.rstrip().endswith("done") and "\x1b[" in shown


def test_only_the_first_process_speaks():
    file = io.StringIO()
    silent = Progress(quiet=True, console=Console(file=file))
    silent.say("hello")
    silent.training("text", ROW, batch=2)
    assert file.getvalue() == ""


# -- data -----------------------------------------------------------------------------------------------------------


def test_pictures_are_stored_once_and_read_by_the_row(tmp_path, monkeypatch):
    chosen = described(data_of("data.train=20"), "train")
    reports = []
    store_pixels(chosen, tmp_path, lambda done, total: reports.append((done, total)))
    pixels, wanted = Pixels(tmp_path), opened(chosen).batch(range(20)).images
    assert pixels.shape == (20, 32, 32, 3) and len(pixels) == 20 and reports == [(20, 20)]
    assert np.array_equal(pixels[:].numpy(), wanted)
    assert np.array_equal(pixels[torch.tensor([7, 3, 7])].numpy(), wanted[[7, 3, 7]])
    monkeypatch.setattr(Source, "stream", lambda *a, **k: pytest.fail("stored again"))
    store_pixels(chosen, tmp_path, lambda done, total: None)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda data: data[:-1], "61439 bytes long instead of 61440"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "changed since it was written"),
        (None, "missing"),
    ],
)
def test_stored_pictures_are_read_through_when_they_are_found(damage, told, tmp_path):
    chosen, path = described(data_of("data.train=20"), "train"), tmp_path / "pixels.bin"
    store_pixels(chosen, tmp_path, lambda done, total: None)
    data = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(data))
    with pytest.raises(SettingError, match=f"pixels.bin is {told}.*delete the folder to store them anew"):
        store_pixels(chosen, tmp_path, lambda done, total: None)
    path.write_bytes(data)
    about = json.loads((tmp_path / "about.json").read_text())
    (tmp_path / "about.json").write_text(json.dumps({"shape": about["shape"]}))  # as an earlier version wrote it
    store_pixels(chosen, tmp_path, lambda done, total: None)
    assert len(Pixels(tmp_path)) == 20


def test_a_stream_must_say_how_many_rows_to_store(tmp_path):
    chosen = described(data_of("data=tar", f"data.path={tmp_path}", "data.size=32", "data.train=null"), "train")
    (tmp_path / "0.tar").write_bytes(b"\0" * 1024)
    with pytest.raises(SettingError, match=r"data\.train is needed with data=tar.* 3 kB each"):
        store_pixels(chosen, tmp_path / "store", lambda done, total: None)


def test_fingerprints_of_a_world_need_no_drawing(monkeypatch):
    before = fingerprint(described(data_of("data.train=1000000"), "train"))
    assert before == fingerprint(described(data_of("data.train=1000000"), "train"))
    # What other splits have is another split's business.
    assert before == fingerprint(described(data_of("data.train=1000000", "data.validation=7"), "train"))
    others = [
        data_of("data.train=999999"),
        data_of("data.train=1000000", "data.seed=1"),
        data_of("data.train=1000000", "data.size=64"),
        data_of("data.train=1000000", "data.label_column=colour"),
    ]
    assert len({before, *(fingerprint(described(other, "train")) for other in others)}) == 5


def test_which_data_are_held_out():
    assert held_out(data_of()).split == "validation"
    assert held_out(data_of("data.validation=0")) is None
    assert held_out(data_of("data=tar", "data.path=x", "data.size=32")) is None
    assert held_out(data_of("data=cc3m")) is None  # streamed


def rows(*pairs):
    return [{"caption": caption, "label": label} for caption, label in pairs]


def test_names_of_classes():
    world = described(with_classes(data_of()), "train")
    assert world.label_column == "shape"
    names = class_names(rows(("a red circle", 0), ("x", 1)), world)
    assert len(set(names)) == 2 and "circle" in names
    bare = described(data_of("data=parquet", "data.path=x", "data.size=32", "data.label_column=label"), "train")
    assert class_names(rows(("cat", 3), ("dog", 5), ("cat", 3)), bare) == ["cat", "dog", "cat"]
    assert class_names(rows(("one cat", 3), ("two cats", 3)), bare) == ["3", "3"]
    assert class_names(rows(("cat", None), ("dog", None)), bare) == ["cat", "dog"]
    named = replace(bare, labels=("bird", "fish"))
    assert class_names(rows(("a", 1), ("b", 0)), named) == ["fish", "bird"]
    with pytest.raises(SettingError, match=r"data\.labels has 2 names, but column 'label' holds 2"):
        class_names(rows(("a", 2)), named)


# -- weights --------------------------------------------------------------------------------------------------------


def test_a_latent_folder_gives_the_latent_back(tmp_path):
    options = {"levels": 1, "stages": 1, "channels": 3, "width": 8}
    latent = initialise(build_latent("wavelet_vae", **options), 0)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    latent.standardise(images)
    save_latent(tmp_path, NamedLatent(latent.eval(), "wavelet_vae", options), 16)
    again = load_latent(tmp_path)
    assert (again.name, again.options) == ("wavelet_vae", options)
    assert torch.equal(again.latent.encode(images), latent.encode(images))
    (tmp_path / "latent.safetensors").write_bytes(b"no weights")
    with pytest.raises(SettingError, match=f"vae={tmp_path}: .*not a readable checkpoint"):
        load_latent(tmp_path)


def test_weights_are_published_whole_and_replace_those_before(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "steps-1").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(name)
    (tmp_path / "one" / "extra.json").touch()
    out = tmp_path / "deep" / "out"
    for name in ("one", "two"):
        check_out(str(out))
        assert publish(tmp_path / name, str(out)) == out
        assert (out / "config.json").read_text() == name and (out / "steps-1").is_dir()
    assert not (out / "extra.json").exists() and [path.name for path in out.parent.iterdir()] == ["out"]
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match="is a file"):
        check_out(str(tmp_path / "file"))


def test_a_folders_key_is_that_of_its_contents(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    one, two = tmp_path / "one", tmp_path / "two"
    assert content_key("from", one) == content_key("from", two)
    (two / "model.safetensors").write_bytes(b"other weights")
    assert content_key("from", one) != content_key("from", two)


def test_a_generator_is_adopted_if_it_has_the_same_shape():
    ours, theirs = small_model(0), small_model(1)
    before = parameters_of(ours.text)
    adopt(ours, theirs, "x")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert any(not torch.equal(value, before[name]) for name, value in parameters_of(ours.text).items())
    with pytest.raises(SettingError, match=r"from=x: model\.iterations is 3 there and 2 here"):
        adopt(small_model(0), small_model(1, iterations=3), "x")


def test_a_text_encoder_of_other_words_is_kept():
    ours, theirs = small_model(0), small_model(1)
    theirs.text.vocabulary.words[0] = "another"
    before = parameters_of(ours.text)
    adopt(ours, theirs, "x")
    assert all(torch.equal(value, before[name]) for name, value in parameters_of(ours.text).items())
    pairs = zip(ours.generator.parameters(), theirs.generator.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_grid_of_pictures(tmp_path):
    images = np.stack([np.full((32, 32, 3), 40 * i, np.uint8) for i in range(5)])
    save_grid(tmp_path / "deep" / "grid.png", images, 3)
    sheet = np.asarray(Image.open(tmp_path / "deep" / "grid.png"))
    assert sheet.shape == (2 * 66 - 2, 3 * 66 - 2, 3)
    assert [int(sheet[10, 66 * k + 10, 0]) for k in range(3)] == [0, 40, 80]
    assert (sheet[66 + 10, 10, 0], sheet[66 + 10, 66 + 10, 0], sheet[66 + 10, 132 + 10, 0]) == (120, 160, 255)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["grid.png"]


class _Task:
    module, batch = torch.nn.Linear(1, 1), 4

    def loss(self, step, part=None):
        return torch.tensor(float(step)), {}


def test_a_look_knows_the_step_and_is_logged_once():
    seen = []
    watched = Watched(_Task(), lambda step: (seen.append(step), (0.5, {"psnr": 20.0}))[1])
    watched.loss(6)
    assert watched.validate() == 0.5 and seen == [7]
    assert watched.facts() == {"psnr": 20.0} and watched.facts() == {}


def test_memory_that_encoding_lacks(tmp_path, monkeypatch, capsys):
    def encode(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flow, "encode_source", encode)
    assert main(["scale=smoke", "log=none", "data.train=32", "data.validation=8", "latent=haar", "stage=text"]) == 1
    told = "error: out of memory while 64 pictures were encoded at once with data.size=32: lower data.size (CUDA"
    assert capsys.readouterr().err.startswith(told)


# -- frozen text ----------------------------------------------------------------------------------------------------


def test_a_frozen_text_encoders_captions_are_embedded_once(tmp_path, monkeypatch, capsys):
    """And a student, whose teacher names the encoder, uses them."""
    monkeypatch.chdir(tmp_path)
    save_clip(tmp_path / "clip")
    words = [
        "scale=smoke",
        "log=none",
        "data.train=32",
        "data.validation=8",
        "latent=haar",
        "model.dim=16",
        "model.heads=2",
        "model.text=clip",
        "model.text_source=clip",
        "train.steps=2",
        "sample.count=2",
    ]
    assert main([*words, "stage=text", "sample.prompts=[red]", "out=model"]) == 0, capsys.readouterr().err
    assert "embedding captions" in capsys.readouterr().out
    pipeline = IrisPipeline.from_pretrained("model")
    assert isinstance(pipeline.model.text, CLIPText)
    images = pipeline.generate(["something new"], SamplingSettings(1))
    (tmp_path / "clip").rename(tmp_path / "elsewhere")
    with pytest.raises(SettingError, match="model.text_source"):
        IrisPipeline.from_pretrained("model")
    (tmp_path / "elsewhere").rename(tmp_path / "clip")
    assert images.shape == (1, 32, 32, 3)
    assert main([*words, "stage=distill", "from=model", "student.steps=1"]) == 0, capsys.readouterr().err
