"""Autoencoders of diffusers as latents: diffusers' own numbers, frozen, and errors that name what to put where."""

import json
import time

import pytest
import torch

from iris.errors import SettingError
from iris.latents import build_latent

diffusers = pytest.importorskip("diffusers")

CHANNELS = {"AutoencoderKL": 5, "AutoencoderDC": 8, "AutoencoderTiny": 4}
FACTORS = {"AutoencoderKL": 4, "AutoencoderDC": 8, "AutoencoderTiny": 2}


def make(kind):
    """A tiny autoencoder with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "AutoencoderKL":
            autoencoder = diffusers.AutoencoderKL(
                block_out_channels=(8, 8, 16),
                norm_num_groups=4,
                latent_channels=5,
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
            )
        elif kind == "AutoencoderDC":
            blocks = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
            autoencoder = diffusers.AutoencoderDC(
                latent_channels=8,
                attention_head_dim=4,
                encoder_block_types=blocks,
                decoder_block_types=blocks,
                encoder_block_out_channels=(8, 8, 8, 16),
                decoder_block_out_channels=(8, 8, 8, 16),
                encoder_layers_per_block=(0, 1, 1, 1),
                decoder_layers_per_block=(1, 1, 1, 1),
                encoder_qkv_multiscales=((), (), (), (5,)),
                decoder_qkv_multiscales=((), (), (), (5,)),
            )
        else:
            autoencoder = diffusers.AutoencoderTiny(
                encoder_block_out_channels=(8, 8),
                decoder_block_out_channels=(8, 8),
                num_encoder_blocks=(1, 2),
                num_decoder_blocks=(2, 1),
            )
    return autoencoder.eval()


def images(count=2, h=16, w=24, seed=0):
    return torch.rand(count, 3, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each autoencoder beside the folder that it was saved to."""
    folder = tmp_path_factory.mktemp("autoencoders")
    made = {kind: make(kind) for kind in CHANNELS}
    for kind, autoencoder in made.items():
        autoencoder.save_pretrained(folder / kind)
    return {kind: (autoencoder, folder / kind) for kind, autoencoder in made.items()}


@pytest.mark.parametrize("kind", CHANNELS)
def test_latents_and_images_are_diffusers_own(saved, kind):
    autoencoder, folder = saved[kind]
    latent, x = build_latent("pretrained", source=str(folder)), images()
    assert (latent.channels, latent.factor) == (CHANNELS[kind], FACTORS[kind])
    with torch.no_grad():
        encoded = autoencoder.encode(x)
        raw = {
            "AutoencoderKL": lambda: encoded.latent_dist.mean,
            "AutoencoderDC": lambda: encoded.latent,
            "AutoencoderTiny": lambda: encoded.latents,
        }[kind]()
        z = latent.encode(x)
        assert z.shape == (2, CHANNELS[kind], *latent.grid(16, 24)) and raw.std() > 1e-3
        torch.testing.assert_close(z, raw, rtol=1e-5, atol=1e-6)
        y = autoencoder.decode(raw).sample
        torch.testing.assert_close(latent.synthesise(raw), y, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(latent.decode(z), y.clamp(-1, 1), rtol=1e-5, atol=1e-6)


def test_tiny_sees_images_as_taesd_does(saved):
    """TAESD's own networks take and give [0, 1]; the latent takes and gives [-1, 1]."""
    autoencoder, folder = saved["AutoencoderTiny"]
    latent, x = build_latent("pretrained", source=str(folder)), images()
    with torch.no_grad():
        z = autoencoder.encoder.layers((x + 1) / 2)
        torch.testing.assert_close(latent.encode(x), z, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(latent.encode(x), autoencoder.encoder.layers(x), atol=1e-3)
        y = autoencoder.decoder.layers(3 * torch.tanh(z / 3)) * 2 - 1
        torch.testing.assert_close(latent.synthesise(z), y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", CHANNELS)
def test_weights_are_frozen_and_latents_standardised(saved, kind):
    _, folder = saved[kind]
    latent, x = build_latent("pretrained", source=str(folder)), images(20)
    with torch.no_grad():
        plain = latent.decode(latent.encode(x))
    assert latent.frozen and not latent.trained
    assert list(latent.parameters()) and not any(parameter.requires_grad for parameter in latent.parameters())
    latent.standardise(x, batch=7)
    z = latent.encode(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(latent.channels), rtol=0, atol=1e-3)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(latent.channels), rtol=0, atol=1e-2)
    torch.testing.assert_close(latent.decode(z), plain, rtol=0, atol=1e-4)
    other = build_latent("pretrained", source=str(folder))
    other.load_state_dict(latent.state_dict())
    assert torch.equal(other.encode(x), z)


def test_gradients_reach_latents_through_frozen_weights(saved):
    latent = build_latent("pretrained", source=str(saved["AutoencoderKL"][1]))
    z = torch.randn(1, 5, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    latent.synthesise(z).square().mean().backward()
    assert z.grad.abs().max() > 0


def test_half_precision_files_are_held_in_float32(saved, tmp_path):
    make("AutoencoderTiny").half().save_pretrained(tmp_path)
    latent = build_latent("pretrained", source=str(tmp_path))
    assert {parameter.dtype for parameter in latent.parameters()} == {torch.float32}
    full = build_latent("pretrained", source=str(saved["AutoencoderTiny"][1]))
    torch.testing.assert_close(latent.encode(images()), full.encode(images()), rtol=0, atol=1e-3)


def test_a_whole_pipeline_has_its_autoencoder_in_vae(saved, tmp_path):
    saved["AutoencoderTiny"][0].save_pretrained(tmp_path / "vae")
    saved["AutoencoderKL"][0].save_pretrained(tmp_path / "other")
    (tmp_path / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderTiny"]}))
    assert build_latent("pretrained", source=str(tmp_path)).factor == FACTORS["AutoencoderTiny"]
    assert build_latent("pretrained", source=str(tmp_path), subfolder="other").factor == FACTORS["AutoencoderKL"]
    with pytest.raises(SettingError, match="latent.source=.* has no unet/config.json.*latent.subfolder"):
        build_latent("pretrained", source=str(tmp_path), subfolder="unet")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub's cache on disk, empty and without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("place", ["", "vae"])
def test_a_hub_name_is_found_in_the_cache(hub, saved, place):
    repository = hub / "models--someone--autoencoder"
    autoencoder, _ = saved["AutoencoderKL"]
    autoencoder.save_pretrained(repository / "snapshots" / ("0" * 40) / place)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    latent = build_latent("pretrained", source="someone/autoencoder")
    with torch.no_grad():
        expected = autoencoder.encode(images()).latent_dist.mean
        torch.testing.assert_close(latent.encode(images()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", ["nobody/nothing", "/no/such/folder", "not a name", "./here"])
def test_what_cannot_be_found_is_refused_at_once(hub, source):
    start = time.monotonic()
    with pytest.raises(SettingError, match=f"latent.source='{source}' cannot be found; .*save_pretrained.*hub name"):
        build_latent("pretrained", source=source)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("source", [None, ""])
def test_source_is_needed(source):
    with pytest.raises(SettingError, match="latent.source is missing.*save_pretrained"):
        build_latent("pretrained", source=source)


def test_other_folders_are_refused(tmp_path):
    def refuse(message):
        with pytest.raises(SettingError, match=message):
            build_latent("pretrained", source=str(tmp_path))

    refuse("latent.source=.* has no config.json nor vae/config.json .*save_pretrained")
    (tmp_path / "config.json").write_text("{")
    refuse("latent.source=.*config.json is not a configuration")
    (tmp_path / "config.json").write_text("[]")
    refuse("latent.source=.*config.json is not a configuration")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    refuse("latent.source=.*UNet2DModel; allowed: AutoencoderKL, AutoencoderDC, AutoencoderTiny")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "in_channels": 1}))
    refuse("latent.source=.*takes 1 channels")


def test_weights_that_are_missing_broken_or_another_size_are_refused(saved, tmp_path):
    def refuse(message):
        with pytest.raises(SettingError, match=f"latent.source=.*weights in .* {message}"):
            build_latent("pretrained", source=str(tmp_path))

    saved["AutoencoderTiny"][0].save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "diffusion_pytorch_model.safetensors"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"latent_channels": 7}))
    refuse("cannot be read")
    config.write_text(json.dumps(settings | {"num_encoder_blocks": [1, 3]}))  # diffusers would draw the third block
    refuse("lack encoder.layers")
    config.write_text(json.dumps(settings))
    weights.write_bytes(weights.read_bytes()[:999])
    refuse("cannot be read")
    weights.unlink()
    refuse("cannot be read")


@pytest.mark.parametrize("kind", CHANNELS)
def test_image_sizes_that_the_factor_does_not_divide_are_refused(saved, kind):
    latent = build_latent("pretrained", source=str(saved[kind][1]))
    with pytest.raises(SettingError, match=f"image size 17x24 .*factor {FACTORS[kind]}"):
        latent.encode(images(1, 17, 24))


def test_grids_may_be_odd(saved):
    for kind, (_, folder) in saved.items():
        latent = build_latent("pretrained", source=str(folder))
        x = images(1, 3 * latent.factor, 5 * latent.factor)
        z = latent.encode(x)
        assert z.shape == (1, latent.channels, 3, 5) and latent.decode(z).shape == x.shape, kind
