"""Predicted peaks of live tensors against those counted on a run."""

import pytest
import torch
from small_models import small_text

from eval.models.activations import MIXER_TENSORS, decoder_peak, generator_peak, mixer_peak
from eval.speed.probes import ActivationTracker
from iris.latents import build_latent
from iris.nn.generator import Generator, GeneratorConfig
from iris.nn.mixers import MIXERS, build_mixer
from iris.randomness import initialise

DTYPES = (torch.float32, torch.bfloat16)


@torch.inference_mode()
def counted(run):
    """Peak bytes of a run after one that makes the cached constants."""
    run()
    with ActivationTracker() as tracker:
        run()
    return tracker.peak


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_has_an_entry(name, dtype):
    mixer = initialise(build_mixer(name, 64, None, 2), 0).to(dtype)
    x = torch.randn(2, 32, 32, 64).to(dtype)
    predicted = mixer_peak(name, 1024, 64, batch=2, itemsize=dtype.itemsize)
    assert counted(lambda: mixer(x)) == pytest.approx(predicted, rel=0.06)


def test_a_mixer_from_elsewhere_has_none():
    assert set(MIXER_TENSORS) == set(MIXERS)
    assert mixer_peak("my_module:MyMixer", 64, 16) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"mixer": "attention"}, {"mixer": "conv3"}, {"iterations": 1, "coda": 1}, {"core": 3}, {"ffn_ratio": 4.0}],
    ids=str,
)
@pytest.mark.parametrize("grid", [(16, 16), (24, 30)], ids=str)
def test_a_generators_peak(changes, grid, dtype):
    settings = {
        "channels": 4,
        "text_width": 12,
        "dim": 64,
        "heads": 2,
        "prelude": 1,
        "core": 1,
        "coda": 2,
        "iterations": 3,
        "ffn_ratio": 2.0,
        "mixer": "grfm",
    } | changes
    config = GeneratorConfig(**settings)
    model = initialise(Generator(config), 0).to(dtype)
    z, t, text = torch.randn(2, 4, *grid).to(dtype), torch.full((2,), 0.5), small_text(2, 20)
    predicted = generator_peak(config, *grid, 20, batch=2, itemsize=dtype.itemsize)
    assert counted(lambda: model(z, t, text)) == pytest.approx(predicted, rel=0.06)


def test_a_generators_peak_does_not_grow_with_the_passes():
    config = GeneratorConfig(
        channels=4,
        text_width=12,
        dim=32,
        heads=2,
        prelude=1,
        core=1,
        coda=1,
        iterations=2,
        ffn_ratio=2.0,
        mixer="attention",
    )
    model = initialise(Generator(config), 0)
    z, t, text = torch.randn(1, 4, 16, 16), torch.full((1,), 0.5), small_text(1)
    few, many = (counted(lambda n=n: model(z, t, text, n)) for n in (2, 12))
    assert many - few < 16 * 16 * 32 * 4  # a state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"decoder": "phone", "stages": 2},
        {"decoder": "standard", "stages": 2},
        {"decoder": "phone", "levels": 2},
        {"decoder": "standard", "width": 8, "levels": 1},
        {"decoder": "phone", "stages": 3, "width": 64},
    ],
    ids=str,
)
def test_a_decoders_peak(options, dtype):
    latent = initialise(build_latent("wavelet_vae", **{"channels": 8, "width": 32} | options), 0).to(dtype)
    z = torch.randn(2, 8, 12, 10).to(dtype)
    predicted = decoder_peak(latent, 12, 10, batch=2, itemsize=dtype.itemsize)
    assert counted(lambda: latent.decode(z)) == pytest.approx(predicted, rel=0.06)


def test_latents_without_a_decoder_network_have_no_formula():
    assert decoder_peak(build_latent("haar", levels=2), 8, 8) is None
