"""Judge dinov2, on the small network with random weights in the formats of Meta's and timm's files."""

import math

import numpy as np
import pytest
import timm
import torch
from cleanfid.resize import make_resizer
from safetensors.torch import save_file

from eval.judges import describe, load_judge
from eval.judges import dinov2 as dinov2_module
from eval.judges.dinov2 import SIZES, published, resized_positions
from eval.judges.weights import MissingWeights, file_sha256
from iris.errors import SettingError


@pytest.fixture(scope="module")
def network():
    """timm's small network at the 518 x 518 that it was trained at, with values of a trained one's size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = timm.create_model("vit_small_patch14_dinov2", pretrained=False).eval().requires_grad_(False)
        for name, value in made.named_parameters():
            if name.endswith("gamma"):
                value.fill_(0.3)
            elif name in ("pos_embed", "cls_token"):
                value.normal_(std=0.5)
    return made


@pytest.fixture(scope="module")
def meta_file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("meta") / "dinov2_vits14_pretrain.pth"
    torch.save(network.state_dict() | {"mask_token": torch.zeros(1, 384)}, path)
    return path


@pytest.fixture(scope="module")
def judge(meta_file):
    return load_judge("dinov2", weights=str(meta_file), model="small")


def pictures(count=3, height=120, width=80, seed=0):
    """Smooth random pictures uint8 [count, height, width, 3]."""
    coarse = torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (fine.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def as_images(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def cubic(x, a=-0.75):
    """The cubic convolution kernel (Keys 1981) that torch interpolates with where it does not antialias."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def test_positions_are_sampled_where_meta_samples_them():
    """Sample i lies at (i + 0.5) * 37 / 16.1 - 0.5, not at the 37 / 16 of an exact resize."""
    table = torch.randn(1, 1 + 37 * 37, 2, generator=torch.Generator().manual_seed(0))
    weights = np.zeros((16, 37))
    for i in range(16):
        at = (i + 0.5) * 37 / 16.1 - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            weights[i, min(max(j, 0), 36)] += cubic(at - j)
    grid = table[0, 1:].reshape(37, 37, 2).double().numpy()
    expected = np.einsum("ai,bj,ijd->abd", weights, weights, grid).reshape(256, 2)
    made = resized_positions(table, 16)
    assert made.shape == (1, 257, 2) and torch.equal(made[:, 0], table[:, 0])
    np.testing.assert_allclose(made[0, 1:].numpy(), expected, atol=1e-5)
    assert resized_positions(made, 16) is made


def test_features_are_the_networks(judge, network):
    """PIL resizes, as in dgm-eval; timm's network runs at 224 x 224 with the positions put in by hand."""
    pixels = pictures()
    resize = make_resizer("PIL", False, "bicubic", (224, 224))
    batch = torch.stack([torch.from_numpy(resize(picture)).permute(2, 0, 1) / 255 for picture in pixels])
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    at_224 = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=224).eval()
    at_224.load_state_dict(network.state_dict() | {"pos_embed": resized_positions(network.pos_embed, 16)})
    with torch.inference_mode():
        expected = at_224.forward_features((batch - mean) / std)[:, 0]
    features = judge.image_features(as_images(pixels))
    assert features.shape == (3, 384) and features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(features[0], features[1], rtol=1e-2)


def test_timms_file_and_its_folder_hold_the_same(judge, network, tmp_path):
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, tmp_path / "model.safetensors")
    images = as_images(pictures(2))
    for place in (tmp_path / "model.safetensors", tmp_path):
        same = load_judge("dinov2", weights=str(place), model="small")
        assert torch.equal(same.image_features(images), judge.image_features(images))
        assert same.sha256 == file_sha256(tmp_path / "model.safetensors")


def test_features_do_not_depend_on_the_batch(judge, monkeypatch):
    images = as_images(pictures(7, 32, 32))
    features = judge.image_features(images)
    monkeypatch.setattr(dinov2_module, "BATCH", 3)
    torch.testing.assert_close(judge.image_features(images), features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(judge.image_features(images[5:]), features[5:], rtol=1e-4, atol=1e-5)


def test_the_description_is_the_judges(judge, meta_file, monkeypatch):
    found = describe("dinov2", weights=str(meta_file), model="small")
    for name in ("sha256", "metric_name", "resize", "feature_width", "verified", "has_text", "name"):
        assert found[name] == getattr(judge, name), name
    assert (found["feature_width"], found["resize"], found["has_text"]) == (384, "bicubic-antialias-224", False)
    assert found["metric_name"] == "FD-DINOv2 (small, unverified weights)"
    monkeypatch.setitem(SIZES, "small", dinov2_module.Size("s", 384, found["sha256"]))
    assert describe("dinov2", weights=str(meta_file), model="small")["metric_name"] == "FD-DINOv2 (small)"
    monkeypatch.setitem(SIZES, "small", dinov2_module.Size("s", 384, "0" * 64))
    monkeypatch.setitem(SIZES, "large", dinov2_module.Size("l", 1024, found["sha256"]))
    assert describe("dinov2", weights=str(meta_file))["metric_name"] == "FD-DINOv2"


def test_sizes_are_timms():
    for model, size in SIZES.items():
        with torch.device("meta"):
            network = timm.create_model(f"vit_{model}_patch14_dinov2", pretrained=False)
        assert network.num_features == size.width
        entry = timm.get_pretrained_cfg(f"vit_{model}_patch14_dinov2.lvd142m")
        assert published(model).url == entry.url and published(model).hub[0][0] == entry.hf_hub_id
        assert (entry.mean, entry.std) == (dinov2_module.IMAGENET_MEAN, dinov2_module.IMAGENET_STD)


def test_a_cached_file_is_found_and_its_hash_checked(meta_file, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / meta_file.name
    cached.parent.mkdir(parents=True)
    cached.symlink_to(meta_file)
    with pytest.raises(ValueError, match="a broken download. Delete it"):
        describe("dinov2", model="small")
    monkeypatch.setitem(SIZES, "small", dinov2_module.Size("s", 384, file_sha256(meta_file)))
    assert describe("dinov2", model="small")["verified"]
    with pytest.raises(MissingWeights, match="dinov2_vitl14_pretrain.pth"):
        describe("dinov2")


def test_weights_that_do_not_fit_are_refused(meta_file, tmp_path, monkeypatch):
    with pytest.raises(SettingError, match="judge.model='huge' is unknown; allowed: small, base, large, giant"):
        describe("dinov2", model="huge")
    with pytest.raises(ValueError, match="does not hold the base network"):
        load_judge("dinov2", weights=str(meta_file), model="base")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "half.safetensors").write_bytes(b"12345678{}")
    for name, words in (
        ("other.pth", "does not hold the small network"),
        ("list.pth", "holds no table of tensors"),
        ("text.pth", "holds no weights"),
        ("half.safetensors", "holds no weights"),
    ):
        with pytest.raises(ValueError, match=f"judge dinov2: .*{name} {words}"):
            load_judge("dinov2", weights=str(tmp_path / name), model="small")
    with pytest.raises(MissingWeights, match="model.safetensors is no file"):
        describe("dinov2", weights=str(tmp_path))
    monkeypatch.setitem(SIZES, "base", dinov2_module.Size("b", 768, file_sha256(meta_file)))
    with pytest.raises(SettingError, match="is of size base, judge.model=small"):
        describe("dinov2", weights=str(meta_file), model="small")


def test_images_and_captions_are_checked(judge):
    broken = as_images(pictures())
    broken[2, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="1 of 3 hold pixels that are not finite"):
        judge.image_features(broken)
    with pytest.raises(SettingError, match="judge dinov2 reads no captions"):
        judge.text_features(["a red circle"])
