"""The phone decoder: its budget, the signal through it, and that it has nothing that a phone would mind."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from iris.latents import build_latent
from iris.latents.convolutions import ScaledConv2d
from iris.latents.phone import SeparableBlock, phone_decoder
from iris.randomness import initialise

DOCUMENT = {"levels": 1, "stages": 3, "channels": 16}  # 256x256x3 -> 16x16x16


def latents(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decoder(channels=16, bands=12, stages=3, width=64, seed=0):
    return initialise(phone_decoder(channels, bands, stages, width), seed)


def rms(x):
    return x.square().mean().sqrt().item()


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", ["wavelet_vae", "conv_vae"])
@pytest.mark.parametrize("width", [64, 96, 128, 256])
def test_at_most_one_and_a_half_million_parameters(name, width):
    model = build_latent(name, **DOCUMENT, width=width, decoder="phone")
    assert parameters(model.decoder) <= 1_500_000
    standard = build_latent(name, **DOCUMENT, width=width)
    assert parameters(model.decoder) < 0.45 * parameters(standard.decoder)
    assert parameters(model.encoder) == parameters(standard.encoder)


def test_parameters_and_operations_at_the_documents_set_up():
    counts = {}
    for name in ("phone", "standard"):
        model = build_latent("wavelet_vae", **DOCUMENT, decoder=name)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.decoder(latents(1, 16, 4, 4))
        counts[name] = parameters(model.decoder), counter.get_total_flops() // 2 * 16  # of a 16x16 grid
    assert counts == {"phone": (264_524, 895_074_304), "standard": (755_788, 2_512_650_240)}


def test_only_convolutions_and_pointwise_layers():
    kinds = {type(layer) for layer in decoder().modules() if not list(layer.children())}
    assert all(issubclass(kind, nn.Conv2d) or kind.__name__ in ("Bound", "Upsample") for kind in kinds), kinds
    upsampling = [layer for layer in decoder().modules() if isinstance(layer, nn.Upsample)]
    assert [layer.mode for layer in upsampling] == ["nearest"] * 3


@pytest.mark.parametrize("stages", [0, 1, 3, 5])
@pytest.mark.parametrize("width", [16, 64])
def test_the_signal_keeps_its_size_through_every_layer_at_the_start(stages, width):
    """Also with blocks awake, which as drawn start as the identity."""
    for awake in (False, True):
        model, sizes = decoder(stages=stages, width=width), []
        for layer in model[1:]:
            if awake and isinstance(layer, SeparableBlock):
                nn.init.normal_(layer.project.weight, std=(2 * width) ** -0.5 / 4)
            layer.register_forward_hook(lambda layer, inputs, output: sizes.append(rms(output)))
        with torch.no_grad():
            bands = model(latents(2, 16, 4, 4))
        assert min(sizes[:-1]) > 0.4 and max(sizes[:-1]) < 2.5, sizes
        assert 0.03 < bands.std() < 0.3  # a small first image, as the standard decoder's


@pytest.mark.parametrize("stages", [1, 3])
def test_gradients_keep_their_size_through_every_stage(stages):
    model, z = decoder(stages=stages), latents(2, 16, 4, 4).requires_grad_()
    bands = model(z)
    bands.backward(latents(*bands.shape, seed=1))
    # Each value of the latent reaches 4^stages positions of every band, through the last gain of 0.1.
    expected = 0.1 * (12 * 4**stages / 16) ** 0.5
    assert 0.3 < rms(z.grad) / expected < 3


def test_latents_far_out_are_bounded():
    model = decoder()
    with torch.no_grad():
        torch.testing.assert_close(model(torch.full((1, 16, 2, 2), 50.0)), model(torch.full((1, 16, 2, 2), 1e4)))
        z = latents(1, 16, 2, 2)
        torch.testing.assert_close(model[0](z), 3 * torch.tanh(z / 3))


def test_it_tiles():
    """Inside a tile the image is that of the whole: nothing looks at all positions at once, as a norm would."""
    model = initialise(phone_decoder(4, 12, 1, 16), 0)
    for layer in model.modules():
        if isinstance(layer, SeparableBlock):
            nn.init.normal_(layer.project.weight, std=0.1)
    z = latents(1, 4, 24, 24)
    with torch.no_grad():
        whole, tile = model(z), model(z[:, :, :16, :16])
    torch.testing.assert_close(tile[:, :, :16, :16], whole[:, :, :16, :16], rtol=0, atol=1e-5)
    assert (tile[:, :, -1, -1] - whole[:, :, 31, 31]).abs().max() > 1e-4  # at its edge the tile lacks neighbours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, z = decoder(stages=1, width=16), latents(1, 16, 4, 4)
    with torch.no_grad():
        full, half = model(z), model.to(dtype)(z.to(dtype))
    torch.testing.assert_close(half.float(), full, rtol=0, atol=0.01)


@pytest.mark.parametrize(("gain", "groups"), [(1.0, 1), (2**0.5, 1), (0.1, 1), (1.0, 32)])
def test_scaled_convolutions_keep_the_mean_square(gain, groups):
    layer = initialise(ScaledConv2d(32, 32, 3, padding=1, gain=gain, groups=groups), 0)
    for x in (latents(8, 32, 16, 16), latents(8, 32, 1, 1).expand(8, 32, 16, 16)):  # white, and constant over space
        with torch.no_grad():
            y = layer(x)[:, :, 1:-1, 1:-1]
        ratio = rms(y) / rms(x) / gain
        assert 0.75 < ratio < 1.25
    assert not layer.bias.any()
