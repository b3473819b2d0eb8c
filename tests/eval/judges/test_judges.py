"""What all judges promise, and judge inception; tests/eval/judges/test_judges_clip.py and _dinov2.py have the others."""

import hashlib
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from cleanfid import features as cleanfid_features
from cleanfid import fid as cleanfid
from cleanfid.downloads_helper import inception_url
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from judge_files import INCEPTION_FEATURES, inception_archive
from PIL import Image

from eval.judges import JUDGES, Judge, MissingWeights, describe, load_judge
from eval.judges import inception as inception_module
from eval.judges.images import check_batch, resized
from eval.judges.weights import Published, file_sha256, find, given, is_torchscript
from eval.metrics.fid import frechet_distance
from iris.errors import SettingError

FILE = "inception-2015-12-05.pt"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return inception_archive(tmp_path_factory.mktemp("inception") / FILE)


@pytest.fixture(scope="module")
def inception(archive):
    return load_judge("inception", weights=str(archive))


@pytest.fixture
def empty_caches(monkeypatch, tmp_path):
    """No weights anywhere that libraries look."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(inception_module, "CLEANFID", tmp_path / "cleanfid")
    (tmp_path / "cleanfid").mkdir()
    return tmp_path


def pictures(count, seed, height=96, width=96):
    """Smooth random pictures uint8 [count, height, width, 3]."""
    coarse = torch.rand(count, 3, 7, 7, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (fine.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def as_images(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def save(pixels, folder):
    folder.mkdir(parents=True)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i:04}.png")
    return str(folder)


# clean-fid


@pytest.mark.parametrize("shape", [(32, 32), (96, 96), (299, 299), (512, 512), (200, 340)])
def test_resizing_is_clean_fids(shape):
    pixels = pictures(1, 0, *shape)
    ours = (resized(as_images(pixels), 299) + 1) * 127.5
    theirs = build_resizer("clean")(pixels[0]).transpose(2, 0, 1)
    assert np.abs(ours[0].numpy() - theirs).max() < 2e-3  # of 255 levels


def test_the_archive_stands_for_the_real_one(archive):
    """clean-fid itself takes it."""
    network = InceptionV3W(str(archive.parent), download=False)
    out = network(torch.zeros(2, 3, 299, 299))
    assert out.shape == (2, 2048) and (out[:, INCEPTION_FEATURES:] == 0).all() and out[:, :INCEPTION_FEATURES].any()


def test_fid_is_clean_fids(inception, archive, tmp_path):
    """From pictures to FID, clean-fid's own functions with the same file; dead features add nothing to a distance."""
    sets = pictures(60, 1), pictures(70, 2) // 2 + 40
    network = InceptionV3W(str(archive.parent), download=False)
    theirs = [
        cleanfid.get_folder_features(
            save(pixels, tmp_path / str(i)), network, num_workers=0, verbose=False, device=torch.device("cpu")
        )
        for i, pixels in enumerate(sets)
    ]
    ours = [inception.image_features(as_images(pixels)) for pixels in sets]
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == torch.float32
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
        assert not b[:, INCEPTION_FEATURES:].any()
    with pytest.warns(match="samples of 2048"):
        value = frechet_distance(*ours)
    expected = cleanfid.fid_from_feats(*(b[:, :INCEPTION_FEATURES] for b in theirs))
    assert expected > 1e-3 and value == pytest.approx(expected, rel=1e-4)


def test_clean_fid_keeps_its_file_where_the_judge_looks(monkeypatch):
    looked = []

    class Spy(torch.nn.Identity):
        def __init__(self, path, **_):
            looked.append(path)
            super().__init__()

    monkeypatch.setattr(cleanfid_features, "InceptionV3W", Spy)
    cleanfid_features.build_feature_extractor("clean", torch.device("cpu"), use_dataparallel=False)
    assert looked == [str(inception_module.CLEANFID)]
    assert inception_url == inception_module.URL


# What is called FID


def test_only_the_published_file_gives_what_is_called_fid(archive, monkeypatch):
    found = describe("inception", weights=str(archive))
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert (found["sha256"], found["verified"]) == (sha256, False)
    assert found["metric_name"] == "FD-Inception (unverified weights)"
    assert (found["resize"], found["feature_width"], found["worlds"]) == ("clean-fid-clean-299", 2048, [])
    monkeypatch.setattr(inception_module, "SHA256", sha256)
    assert describe("inception", weights=str(archive))["metric_name"] == "FID"


def test_a_cached_file_must_be_the_published_one(empty_caches, monkeypatch):
    for folder in ("cleanfid", "torch/hub/checkpoints"):
        (empty_caches / folder).mkdir(parents=True, exist_ok=True)
        path = inception_archive(empty_caches / folder / FILE)
        with pytest.raises(ValueError, match="has f58cb9b6.*a broken download. Delete it"):
            describe("inception")
        with monkeypatch.context() as patched:
            patched.setattr(inception_module, "SHA256", file_sha256(path))
            judge = load_judge("inception")
            assert (judge.metric_name, judge.verified) == ("FID", True)
            assert judge.image_features(torch.zeros(1, 3, 8, 8)).shape == (1, 2048)
        path.unlink()


def test_files_that_are_no_inception_are_refused(archive, tmp_path):
    half = tmp_path / "half.pt"
    half.write_bytes(archive.read_bytes()[:5000])
    state = tmp_path / "state.pt"
    torch.save({"weight": torch.zeros(3)}, state)
    for path in (half, state):
        with pytest.raises(ValueError, match=f"{path.name} is not a TorchScript archive"):
            load_judge("inception", weights=str(path))
    with pytest.raises(ValueError, match=r"features \[N, 2048\]"):
        load_judge("inception", weights=str(inception_archive(tmp_path / "narrow.pt", width=64)))
    other = tmp_path / "other.pt"
    with pytest.warns(FutureWarning):
        torch.jit.script(torch.nn.Linear(2, 2)).save(other)
    with pytest.raises(ValueError, match="through `layers`"):
        load_judge("inception", weights=str(other))


# All judges


def test_features_do_not_depend_on_the_batch(inception):
    images = as_images(pictures(inception_module.BATCH + 3, 3, 24, 24))
    features = inception.image_features(images)
    assert torch.allclose(features[-5:], inception.image_features(images[-5:]), rtol=1e-4, atol=1e-6)
    assert not features.requires_grad and not torch.allclose(features[0], features[1])


def test_images_that_cannot_be_judged_are_named(inception):
    good = torch.zeros(2, 3, 8, 8)
    broken = good.clone()
    broken[1, 0, 3, 3] = math.nan
    for judge in (inception, load_judge("shapes")):
        for wrong, words in (
            (good.to(torch.uint8), r"float images \[B, 3, H, W\]"),
            (good[0], r"\(3, 8, 8\)"),
            (good.permute(0, 2, 3, 1), r"\(2, 8, 8, 3\)"),
            (broken, "1 of 2 hold pixels that are not finite"),
            (good * math.inf, "2 of 2"),
            (good + 200, r"\[-1, 1\], found 200"),
            (good[:0], "at least 1"),
            (good[..., :0], "no pixels"),
        ):
            with pytest.raises(ValueError, match=words):
                judge.image_features(wrong)
    check_batch(good + 1.0005)  # a decoder's rounding


def test_a_judge_without_text_says_which_have_it(inception):
    for ask in (
        lambda: inception.text_features(["a red circle"]),
        lambda: inception.similarity(torch.zeros(1, 3, 8, 8), ["a red circle"]),
    ):
        with pytest.raises(SettingError, match="judge inception reads no captions.*shapes, clip_vit_b32, clip$"):
            ask()


def test_settings_that_a_judge_has_not_are_refused():
    with pytest.raises(SettingError, match="judge inception takes no judge.model; its settings: judge.weights$"):
        describe("inception", model="large")
    with pytest.raises(SettingError, match="judge shapes takes no judge.weights; its settings: none"):
        load_judge("shapes", weights="x.safetensors")
    with pytest.raises(SettingError, match="judge dinov2 takes no judge.prefix"):
        describe("dinov2", prefix="A photo depicts ")
    with pytest.raises(SettingError, match=f"judge must be one of {', '.join(JUDGES)}, not 'oracle'"):
        describe("oracle")


def test_description_and_judge_agree(inception, archive):
    for judge, options in ((inception, {"weights": str(archive)}), (load_judge("shapes"), {})):
        assert isinstance(judge, Judge)
        found = describe(judge.name, **options)
        for name in ("sha256", "metric_name", "resize", "feature_width", "verified", "has_text", "name"):
            assert found[name] == getattr(judge, name), name
        assert found["worlds"] == list(judge.worlds)
        assert all(found[key] == value for key, value in judge.record.items() if key != "worlds")
        assert judge.image_features(torch.zeros(1, 3, 32, 32)).shape == (1, judge.feature_width)


def test_describing_loads_no_network_and_no_library_of_one(archive):
    program = (
        "import sys; from eval.judges import MissingWeights, describe; import torch; torch.jit.load = None\n"
        "def missing(name):\n"
        "    try: describe(name)\n"
        "    except MissingWeights: pass\n"
        f"describe('shapes'); describe('inception', weights={str(archive)!r}); missing('clip_vit_b32'); "
        "print(sorted({'open_clip', 'timm', 'cleanfid', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HOME": str(archive.parent), "HF_HUB_CACHE": str(archive.parent)},
    )
    assert done.stdout.strip() == "[]"


# Missing weights


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("inception", {}, [inception_module.URL, f"cleanfid/{FILE}", f"torch/hub/checkpoints/{FILE}"]),
        (
            "clip_vit_b32",
            {},
            [
                "ViT-B-32-quickgelu",
                "/ViT-B-32.pt",
                ".cache/clip/ViT-B-32.pt",
                "hf download timm/vit_base_patch32_clip_224.openai open_clip_model.safetensors",
            ],
        ),
        (
            "clip",
            {"model": "ViT-B-32", "weights": "laion2b_s34b_b79k"},
            ["hf download laion/CLIP-ViT-B-32-laion2B-s34B-b79K"],
        ),
        (
            "dinov2",
            {},
            [
                "dinov2_vitl14_pretrain.pth",
                "torch/hub/checkpoints/dinov2_vitl14_pretrain.pth",
                "hf download timm/vit_large_patch14_dinov2.lvd142m model.safetensors",
            ],
        ),
    ],
)
def test_missing_weights_say_what_to_put_where(empty_caches, monkeypatch, name, options, words):
    def no_network(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    for ask in (describe, load_judge):
        with pytest.raises(MissingWeights) as caught:
            ask(name, **options)
        assert isinstance(caught.value, SettingError) and isinstance(caught.value, FileNotFoundError)
        for word in [f"judge {name}", "judge.weights", *words]:
            assert word in str(caught.value), word


@pytest.mark.parametrize("name", ["inception", "clip_vit_b32", "dinov2"])
def test_a_path_to_no_file_is_named(empty_caches, name):
    with pytest.raises(MissingWeights, match=f"judge {name}: judge.weights=.*none.pt is no file"):
        load_judge(name, weights=str(empty_caches / "none.pt"))


# Weights files


def test_hashes_are_computed_once_and_follow_the_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    with monkeypatch.context() as patched:
        patched.setattr(hashlib, "file_digest", None)
        assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    time.sleep(0.01)
    path.write_bytes(b"two")
    assert file_sha256(path) == hashlib.sha256(b"two").hexdigest()


def test_the_hub_vouches_for_its_copies(empty_caches):
    """The Hub's cache names a copy by its hash: the right content is the published file, another a broken download."""
    published = Published("Tiny", hub=(("owner/tiny", "model.safetensors"),))
    repository = empty_caches / "hub" / "models--owner--tiny"
    content = b"weights"
    blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
    snapshot = repository / "snapshots" / ("c" * 40) / "model.safetensors"
    for folder in (blob.parent, snapshot.parent, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("c" * 40)
    blob.write_bytes(content)
    snapshot.symlink_to(blob)
    for file in (find("tiny", published), given("tiny", snapshot, published)):
        assert (file.path, file.sha256, file.verified) == (snapshot, blob.name, True)
    assert not given("tiny", snapshot, Published("Other", hub=(("owner/other", "model.safetensors"),))).verified
    blob.write_bytes(b"weigh")
    with pytest.raises(ValueError, match=f"has sha256 .* Tiny has {blob.name}"):
        find("tiny", published)


def test_torchscript_is_told_from_a_state_dict(archive, tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "state.pt")
    (tmp_path / "text.pt").write_text("hello")
    assert is_torchscript(archive)
    assert not is_torchscript(tmp_path / "state.pt") and not is_torchscript(tmp_path / "text.pt")
