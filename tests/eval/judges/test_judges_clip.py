"""Judges clip and clip_vit_b32, on small networks of open_clip and one of the real shape, all with random weights."""

import hashlib
import json
import math

import numpy as np
import open_clip
import pytest
import torch
from judge_files import TINY, clip_folder, clip_network, openai_archive
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from eval.judges import describe, load_judge
from eval.judges.clip import ClipJudge
from eval.judges.clip_tags import VIT_B_32, VIT_B_32_CONFIG, tag_of, vit_b_32
from eval.judges.weights import MissingWeights, is_torchscript
from eval.metrics.clip_score import clip_scores
from iris.errors import SettingError

CAPTIONS = ["a red circle", "two blue squares on a green table", ""]


@pytest.fixture(scope="module")
def network():
    return clip_network(TINY)


@pytest.fixture(scope="module")
def files(network, tmp_path_factory):
    """The same weights in every format."""
    folder = tmp_path_factory.mktemp("clip")
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    torch.save(state, folder / "tiny.pt")
    trained = {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}
    torch.save(trained, folder / "epoch_3.pt")
    save_file(state, folder / "tiny.safetensors")
    return folder


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    """open_clip knows the small network by the names tiny-quickgelu and tiny."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-quickgelu", TINY)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", TINY | {"quick_gelu": False})


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    return str(clip_folder(network, TINY, tmp_path_factory.mktemp("hub") / "tiny-clip"))


@pytest.fixture(scope="module")
def judge(folder):
    return load_judge("clip", weights=folder)


def pictures(count=3, height=90, width=120, seed=0):
    """Random pictures uint8 [count, height, width, 3] with edges and noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.rand(count, 3, 6, 6, generator=generator), (height, width), mode="nearest")
    noisy = coarse + 0.1 * torch.randn(count, 3, height, width, generator=generator)
    return (noisy.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def as_images(pixels):
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


# Agreement with open_clip


@pytest.mark.parametrize(("height", "width"), [(64, 64), (256, 256), (90, 120), (32, 32)])
@pytest.mark.parametrize(
    "how", [{}, {"interpolation": "bilinear", "resize_mode": "squash", "mean": [0.5] * 3}, {"resize_mode": "longest"}]
)
def test_preprocessing_is_open_clips(network, tmp_path, height, width, how):
    judge = load_judge("clip", weights=str(clip_folder(network, TINY, tmp_path / "tiny", **how)))
    pixels = pictures(2, height, width)
    transform = image_transform_v2(PreprocessCfg(size=64, **how), is_train=False)
    theirs = torch.stack([transform(Image.fromarray(picture.numpy())) for picture in pixels])
    assert theirs.shape == (2, 3, 64, 64) and torch.equal(judge.preprocess(as_images(pixels)), theirs)


def test_features_are_open_clips(judge, network):
    pixels = pictures()
    transform = image_transform_v2(PreprocessCfg(size=64), is_train=False)
    with torch.inference_mode():
        image = network.encode_image(torch.stack([transform(Image.fromarray(picture.numpy())) for picture in pixels]))
        text = network.encode_text(open_clip.get_tokenizer("ViT-B-32")(CAPTIONS))
    torch.testing.assert_close(judge.image_features(as_images(pixels)), image)
    torch.testing.assert_close(judge.text_features(CAPTIONS), text)
    expected = F.cosine_similarity(image, text)
    similarity = judge.similarity(as_images(pixels), CAPTIONS)
    torch.testing.assert_close(similarity, expected)
    assert clip_scores(similarity).mean().item() == pytest.approx(100 * expected.clamp_min(0).mean().item(), rel=1e-5)


def test_every_format_holds_the_same_network(judge, files, network):
    openai_archive(network, files / "archive.pt")
    images = as_images(pictures())
    wanted = judge.image_features(images), judge.text_features(CAPTIONS)
    for name, tolerance in (("tiny.pt", 1e-6), ("epoch_3.pt", 1e-6), ("tiny.safetensors", 1e-6), ("archive.pt", 5e-3)):
        loaded = load_judge("clip", model="tiny-quickgelu", weights=str(files / name))
        assert {p.dtype for p in loaded.network.parameters()} == {torch.float32}
        for made, right in zip((loaded.image_features(images), loaded.text_features(CAPTIONS)), wanted, strict=True):
            assert made.dtype == torch.float32 and made.shape == (3, 16)
            torch.testing.assert_close(made, right, atol=tolerance * float(right.abs().max()), rtol=0)


def test_a_network_of_the_real_shape_goes_through_openais_format(tmp_path):
    """ViT-B/32 of 151 million parameters, half precision, TorchScript: all that the real file is but its values."""
    config = open_clip.get_model_config("ViT-B-32-quickgelu")
    network = clip_network(config)
    path = openai_archive(network, tmp_path / "ViT-B-32.pt")
    try:
        assert 290e6 < path.stat().st_size < 310e6 and is_torchscript(path)
        judge = load_judge("clip_vit_b32", weights=str(path))
    finally:
        path.unlink()
    assert sum(p.numel() for p in judge.network.parameters()) == 151_277_313
    images = as_images(pictures(2))
    with torch.inference_mode():
        image = network.encode_image(judge.preprocess(images))
        text = network.encode_text(open_clip.tokenize(CAPTIONS[:2]))
    assert F.cosine_similarity(judge.image_features(images), image).min() > 0.999
    assert F.cosine_similarity(judge.text_features(CAPTIONS[:2]), text).min() > 0.999
    assert (judge.name, judge.feature_width, judge.has_text) == ("clip_vit_b32", 512, True)
    assert judge.metric_name == "FD-CLIP (ViT-B-32-quickgelu, unverified weights)"
    assert judge.record["activation"] == "quick_gelu" and judge.worlds == ()


def test_features_do_not_depend_on_the_batch(judge):
    images = as_images(pictures(70, 48, 48))
    texts = [f"caption {i}" for i in range(260)]
    for features, inputs in ((judge.image_features, images), (judge.text_features, texts)):
        torch.testing.assert_close(features(inputs)[-6:], features(inputs[-6:]), atol=1e-5, rtol=1e-4)


def test_loading_moves_no_random_numbers(files):
    torch.manual_seed(5)
    load_judge("clip", model="tiny-quickgelu", weights=str(files / "tiny.pt"))
    after = torch.rand(1)
    torch.manual_seed(5)
    assert after == torch.rand(1)


# Captions


def test_the_prefix_is_put_before_captions_and_recorded(judge, folder):
    prefixed = load_judge("clip", weights=folder, prefix="A photo depicts ")
    torch.testing.assert_close(prefixed.text_features(["a dog"]), judge.text_features(["A photo depicts a dog"]))
    assert not torch.allclose(prefixed.text_features(["a dog"]), judge.text_features(["a dog"]))
    assert (judge.record["prefix"], prefixed.record["prefix"]) == ("", "A photo depicts ")
    assert describe("clip", weights=folder, prefix="A photo depicts ")["prefix"] == "A photo depicts "
    assert prefixed.sha256 == judge.sha256


def test_captions_that_cannot_be_read_are_named(judge):
    with pytest.raises(ValueError, match="captions: at least one"):
        judge.text_features([])
    with pytest.raises(ValueError, match="one caption an image: 3 images, 2 captions"):
        judge.similarity(as_images(pictures(3)), CAPTIONS[:2])
    long = "red " * 200
    torch.testing.assert_close(judge.text_features([long]), judge.text_features([long + "blue"]))  # cut at 77 tokens


# What the settings mean


def test_the_description_is_the_judges(judge, folder, files):
    path = str(files / "tiny.safetensors")
    loaded = load_judge("clip", model="tiny-quickgelu", weights=path)
    for one, options in ((judge, {"weights": folder}), (loaded, {"weights": path, "model": "tiny-quickgelu"})):
        found = describe("clip", **options)
        for name in ("sha256", "metric_name", "resize", "feature_width", "verified", "has_text"):
            assert found[name] == getattr(one, name), name
        assert json.loads(json.dumps(found))["model"] == one.record["model"]
    assert loaded.sha256 == hashlib.sha256((files / "tiny.safetensors").read_bytes()).hexdigest()
    assert (judge.feature_width, judge.resize) == (16, "open_clip-pil-shortest-bicubic-64")


def test_a_folder_is_another_judge_with_another_configuration(network, judge, tmp_path):
    gelu = clip_folder(network, TINY | {"quick_gelu": False}, tmp_path / "x")
    other = describe("clip", weights=f"local-dir:{gelu}")
    assert other["sha256"] != judge.sha256
    assert (other["activation"], judge.record["activation"]) == ("gelu", "quick_gelu")
    squash = describe("clip", weights=str(clip_folder(network, TINY, tmp_path / "y", resize_mode="squash")))
    assert squash["sha256"] != judge.sha256 and squash["resize"] == "open_clip-pil-squash-bicubic-64"


def test_the_activation_changes_features(judge, network, tmp_path):
    """Else the guard below would guard nothing."""
    other = load_judge("clip", weights=str(clip_folder(network, TINY | {"quick_gelu": False}, tmp_path / "gelu")))
    images = as_images(pictures())
    difference = (other.image_features(images) - judge.image_features(images)).abs().amax(1)
    assert (difference > 1e-3 * judge.image_features(images).abs().amax(1)).all()


def test_weights_of_another_activation_are_refused(files, network, monkeypatch):
    archive = str(openai_archive(network, files / "archive.pt"))
    with pytest.raises(SettingError, match="as only OpenAI's are.*with QuickGELU; set judge.model=tiny-quickgelu"):
        describe("clip", model="tiny", weights=archive)
    with pytest.raises(SettingError, match="=openai was trained with QuickGELU; set judge.model=ViT-L-14-quickgelu"):
        describe("clip", model="ViT-L-14", weights="openai")
    with pytest.raises(SettingError, match="b82k was trained without QuickGELU; set judge.model=ViT-L-14$"):
        describe("clip", model="ViT-L-14-quickgelu", weights="laion2b_s32b_b82k")
    publish(monkeypatch, "tiny", files / "tiny.pt", quick_gelu=True)  # known by its hash
    with pytest.raises(SettingError, match=r"tiny.pt \(openai\) was trained with QuickGELU"):
        describe("clip", model="tiny", weights=str(files / "tiny.pt"))


def publish(monkeypatch, model, path, **entry):
    """Let open_clip offer a file as the tag ``openai`` of ``model``, its hash in the URL as OpenAI's are."""
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    entry = {
        "url": f"https://openaipublic.azureedge.net/clip/models/{sha256}/{path.name}",
        "hf_hub": "owner/tiny/",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.2, 0.2, 0.2),
        "interpolation": "bicubic",
        "resize_mode": "squash",
        **entry,
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, model, {"openai": entry})
    if entry.get("quick_gelu"):
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, f"{model}-quickgelu", {"openai": entry})


def test_a_tag_is_found_in_open_clips_cache_and_its_hash_is_checked(files, network, tmp_path, monkeypatch):
    publish(monkeypatch, "tiny", files / "tiny.pt", quick_gelu=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    cached = tmp_path / ".cache" / "clip" / "tiny.pt"
    cached.parent.mkdir(parents=True)
    cached.write_bytes((files / "tiny.pt").read_bytes())
    judge = load_judge("clip", model="tiny-quickgelu", weights="OpenAI")
    assert judge.verified and judge.metric_name == "FD-CLIP (tiny-quickgelu)"
    assert judge.record["weights_tag"] == "openai"
    assert judge.resize == "open_clip-pil-squash-bicubic-64"
    assert judge.preprocess(torch.zeros(1, 3, 64, 64)).abs().max() < 0.02  # the tag's mean of 0.5, not OpenAI's
    by_path = describe("clip", model="tiny-quickgelu", weights=str(cached))  # the same file, known by its hash
    assert by_path["verified"] and by_path["weights_tag"] == "openai" and by_path["resize"] == judge.resize
    cached.write_bytes(cached.read_bytes()[:-10])
    with pytest.raises(ValueError, match="a broken download. Delete it"):
        describe("clip", model="tiny-quickgelu", weights="openai")


def test_known_weights_of_another_model_are_refused(files, monkeypatch):
    publish(monkeypatch, "other", files / "tiny.safetensors")
    with pytest.raises(SettingError, match=r"tiny.safetensors holds other \(openai\), judge.model=tiny"):
        describe("clip", model="tiny", weights=str(files / "tiny.safetensors"))


def test_open_clips_table_is_read_as_open_clip_does():
    for model, tag in open_clip.list_pretrained():
        entry = open_clip.get_pretrained_cfg(model, tag)
        file = tag_of(model, tag).file
        assert file.hub or file.sha256, (model, tag)
        assert file.sha256 == "" or len(file.sha256) == 64 or len(file.sha256) == 8, (model, tag)
        if entry["hf_hub"]:
            assert all(f"{repository}/" in entry["hf_hub"] for repository, _ in file.hub)
    assert vit_b_32() == tag_of(VIT_B_32, "openai") and open_clip.get_model_config(VIT_B_32) == VIT_B_32_CONFIG
    openai = tag_of("ViT-B-32", "openai").file
    assert openai.sha256 in openai.url and openai.hub[0][1] == "open_clip_model.safetensors"
    binary = tag_of("ViTamin-S", "datacomp1b").file
    assert [name for _, name in binary.hub] == ["pytorch_model.safetensors", "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "set judge.weights to a tag"),
        ({"weights": "openai"}, "set judge.model to a name of open_clip"),
        ({"weights": "openai", "model": "ViT-B-33"}, "'ViT-B-33' is not a model of open_clip .did you mean ViT-B-32"),
        (
            {"weights": "laion2b_s34b_b79", "model": "ViT-B-32"},
            "neither a file nor a tag of ViT-B-32 .did you mean laion2b_s34b_b79k",
        ),
        ({"weights": "x", "model": "tiny"}, "tags: none"),
    ],
)
def test_settings_that_mean_nothing_are_named(options, words):
    with pytest.raises(SettingError, match=words):
        describe("clip", **options)


def test_preprocessing_is_not_guessed(files):
    with pytest.raises(SettingError, match="ViT-L-14 were published with different preprocessing"):
        describe("clip", model="ViT-L-14", weights=str(files / "tiny.pt"))


def test_files_that_do_not_fit_are_refused(files, folder, tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, tmp_path / "other.pt")
    for path, model in (
        (tmp_path / "text.pt", "tiny"),
        (tmp_path / "other.pt", "tiny"),
        (files / "tiny.pt", "ViT-S-32"),
    ):
        with pytest.raises(ValueError, match=f"judge clip: .*{path.name} does not hold the weights of {model}:"):
            load_judge("clip", model=model, weights=str(path))
    with pytest.raises(SettingError, match="is a folder.*leave out judge.model"):
        describe("clip", model="tiny", weights=folder)
    with pytest.raises(MissingWeights, match="a folder with open_clip_config.json and open_clip_model.safetensors"):
        describe("clip", weights=str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text("[]")
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="no configuration of open_clip"):
        describe("clip", weights=str(tmp_path))


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match="does not hold the weights"):
        load_judge("clip", model="tiny", weights=str(tmp_path / "bomb.pt"))


@pytest.mark.parametrize("model", ["roberta-ViT-B-32", "ViT-B-16-SigLIP"])
def test_text_towers_from_the_hub_are_looked_for_before_the_network_is_asked(model, files, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights, match="the text tower needs .*config.json of .* by `hf download"):
        describe("clip", model=model, weights=str(files / "tiny.pt"))


def test_images_are_checked(judge):
    broken = as_images(pictures())
    broken[0, 0, 0, 0] = math.nan
    for wrong in (broken, pictures(), torch.zeros(0, 3, 8, 8)):
        with pytest.raises(ValueError):
            judge.image_features(wrong)
    assert np.isfinite(ClipJudge.image_features(judge, as_images(pictures())).numpy()).all()
