"""What stages are made of: weights kept, published and adopted, looks at a training, a frozen text encoder."""

from __future__ import annotations

import pytest
import torch
from small_clip import save_clip
from small_models import parameters_of, small_model

from iris.diffusion.sampling import SamplingSettings
from iris.errors import SettingError
from iris.latents import build_latent
from iris.pipeline import IrisPipeline
from iris.randomness import initialise
from iris.stages import encoded
from iris.stages.flow import adopt
from iris.stages.latent import NamedLatent, load_latent, save_latent
from iris.stages.trained import Watched
from iris.text import CLIPText
from iris.training.__main__ import main
from iris.training.publishing import check_out, publish


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
    with pytest.raises(SettingError, match=f"latent.weights={tmp_path}: .*not a readable checkpoint"):
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


def test_a_generator_is_adopted_if_it_has_the_same_shape():
    ours, theirs = small_model(0), small_model(1)
    before = parameters_of(ours.text)
    adopt(ours, theirs, "x")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert any(not torch.equal(value, before[name]) for name, value in parameters_of(ours.text).items())
    with pytest.raises(SettingError, match=r"start=x: model\.iterations is 3 there and 2 here"):
        adopt(small_model(0), small_model(1, iterations=3), "x")


def test_a_text_encoder_of_other_words_is_kept():
    ours, theirs = small_model(0), small_model(1)
    theirs.text.vocabulary.words[0] = "another"
    before = parameters_of(ours.text)
    adopt(ours, theirs, "x")
    assert all(torch.equal(value, before[name]) for name, value in parameters_of(ours.text).items())
    pairs = zip(ours.generator.parameters(), theirs.generator.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


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
    monkeypatch.setattr(encoded, "encode_source", encode)
    assert main(["scale=smoke", "log=none", "data.train=32", "data.validation=8", "latent=haar", "stage=text"]) == 1
    told = "error: out of memory while 512 pictures were encoded at once with data.size=32: lower data.size (CUDA"
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
        "distill.steps=2",
        "preview.count=2",
        "preview.prompts=[red]",
    ]
    assert main([*words, "stage=text", "out=model"]) == 0, capsys.readouterr().err
    assert "embedding captions" in capsys.readouterr().out
    pipeline = IrisPipeline.from_pretrained("model")
    assert isinstance(pipeline.model.text, CLIPText)
    images = pipeline.generate(["something new"], SamplingSettings(1))
    (tmp_path / "clip").rename(tmp_path / "elsewhere")
    with pytest.raises(SettingError, match="model.text_source"):
        IrisPipeline.from_pretrained("model")
    (tmp_path / "elsewhere").rename(tmp_path / "clip")
    assert images.shape == (1, 32, 32, 3)
    for start in ("text", "model"):  # by the folder that lies elsewhere too
        assert main([*words, "stage=distill", f"start={start}", "student.steps=1"]) == 0, capsys.readouterr().err
        assert ("embedding captions" in capsys.readouterr().out) == (start == "model")
