"""The wavelet VAE and its rival without the wavelet: shapes, budget, losses, PSNR by band, and that they learn."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from iris.errors import SettingError
from iris.latents import build_latent
from iris.latents.haar import dwt, idwt
from iris.latents.losses import band_psnr, psnr, vae_loss
from iris.latents.wavelet_vae import WaveletVAE
from iris.randomness import initialise

KINDS = [("wavelet_vae", {}), ("conv_vae", {"front": "conv"}), ("conv_vae", {"front": "unshuffle"})]
DECODERS = ["standard", "phone"]
DOCUMENT = {"levels": 1, "stages": 3, "channels": 16}  # 256x256x3 -> 16x16x16

every_kind = pytest.mark.parametrize(("name", "options"), KINDS, ids=["wavelet", "conv", "unshuffle"])


def images(count=2, h=16, w=16, seed=0):
    return torch.rand(count, 3, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def smooth_images(count, size, seed):
    """A plane of colour with a soft disc on it."""
    draws = torch.rand(count, 12, 1, 1, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    plane = 0.4 * (draws[:, :3] + draws[:, 3:6] * x + draws[:, 6:9] * y)
    disc = torch.exp(-4 * ((x - 0.5 * draws[:, 9:10]) ** 2 + (y - 0.5 * draws[:, 10:11]) ** 2))
    return (plane + disc * draws[:, [11, 0, 4]]).clamp(-1, 1)


def build(name="wavelet_vae", seed=0, **options):
    return initialise(build_latent(name, **({"width": 16} | options)), seed)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def bands_by_pywavelets(x):
    """cA, cH, cV, cD of [B, C, H, W], stacked on a new first axis."""
    pywt = pytest.importorskip("pywt")
    average, details = pywt.dwt2(x.numpy(), "haar", axes=(-2, -1))
    return torch.stack([torch.from_numpy(band) for band in (average, *details)])


@every_kind
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("levels", "stages", "channels"), [(1, 1, 8), (2, 1, 5), (1, 2, 4), (2, 0, 6)])
def test_shapes(name, options, decoder, levels, stages, channels):
    model = build(name, levels=levels, stages=stages, channels=channels, decoder=decoder, **options)
    x = images(2, 16, 24)
    assert model.factor == 2 ** (levels + stages) and model.channels == channels and model.trained and not model.frozen
    mean, log_variance = model.posterior(x)
    assert mean.shape == log_variance.shape == (2, channels, 16 // model.factor, 24 // model.factor)
    assert torch.equal(model.encode(x), mean)
    y = model.decode(mean)
    assert y.shape == x.shape and y.abs().max() <= 1


@every_kind
def test_the_documents_set_up_holds_48_times_fewer_numbers(name, options):
    model, x = build(name, **DOCUMENT, **options), images(1, 256, 256)
    with torch.no_grad():
        z = model.encode(x)
        assert z.shape == (1, 16, 16, 16) and x.numel() == 48 * z.numel()
        assert model.decode(z).shape == x.shape


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    "options", [{}, DOCUMENT, DOCUMENT | {"width": 128, "blocks": 2}, {"levels": 2, "stages": 0, "width": 96}], ids=str
)
def test_without_the_wavelet_the_budget_is_the_same(options, decoder):
    wavelet, conv, unshuffle = (
        parameters(build_latent(name, **options, **front, decoder=decoder)) for name, front in KINDS
    )
    assert unshuffle == wavelet
    assert 1 < conv / wavelet < 1.03
    if options == DOCUMENT and decoder == "standard":
        assert (wavelet, conv) == (1_258_092, 1_258_584)


@pytest.mark.parametrize("seed", [0, 7])
def test_shared_parts_start_equal_with_and_without_the_wavelet(seed):
    wavelet = build("wavelet_vae", seed).state_dict()
    for front in ("conv", "unshuffle"):
        other = build("conv_vae", seed, front=front).state_dict()
        assert wavelet.keys() <= other.keys()
        assert all(torch.equal(other[key], wavelet[key]) for key in wavelet)


def test_default_wavelet_vae_is_that_of_finished_trials():
    """Names, draws and outputs recorded when the first trials ran."""
    model = initialise(WaveletVAE(), 3)
    assert list(model.state_dict())[:6] == [
        "mean",
        "std",
        "encoder.0.weight",
        "encoder.0.bias",
        "encoder.1.norms.0.weight",
        "encoder.1.norms.0.bias",
    ]
    assert list(model.state_dict())[-2:] == ["decoder.5.weight", "decoder.5.bias"]
    assert len(model.state_dict()) == 46 and parameters(model) == 529_372
    x = images(2, 32, 48, seed=1)
    with torch.no_grad():
        z = model.encode(x)
        y = model.decode(z)
    torch.testing.assert_close(z[0, :4, 0, 0], torch.tensor([0.0823, -0.0362, 0.1635, 0.0930]), rtol=0, atol=1e-4)
    torch.testing.assert_close(y[0, :, 5, 9], torch.tensor([-0.0308, -0.0157, -0.0253]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("levels", [1, 2])
def test_the_learned_front_end_can_be_the_haar_transform(levels):
    model, x = build("conv_vae", levels=levels), images(2, 16, 24)
    mix = dwt(torch.eye(4).view(4, 1, 2, 2)).flatten(1).T  # bands x pixels of a 2x2 block
    with torch.no_grad():
        for layer in model.front:
            size = layer.in_channels
            layer.weight.zero_()
            for channel in range(size):
                layer.weight[channel::size, channel, 1:, 1:] = mix.view(4, 2, 2)
        for layer in (layer for layer in model.back if hasattr(layer, "weight")):
            size = layer.in_channels // 4
            layer.weight.zero_()
            for channel in range(size):
                layer.weight[4 * channel : 4 * channel + 4, channel::size, 0, 0] = mix.T
        bands = model.to_bands(x)
        torch.testing.assert_close(bands, dwt(x, levels), rtol=0, atol=1e-6)
        noise = torch.randn(bands.shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(model.from_bands(noise), idwt(noise, levels), rtol=0, atol=1e-6)


@pytest.mark.parametrize("levels", [1, 2])
def test_the_learned_front_end_keeps_the_signals_energy(levels):
    model, x = build("conv_vae", levels=levels), smooth_images(32, 32, 0)
    with torch.no_grad():
        bands = model.to_bands(x)
        ratio = bands.square().mean() / x.square().mean()
        back = model.from_bands(bands).square().mean() / bands.square().mean()
    assert 0.3 < ratio < 3 and 0.3 < back < 3


@every_kind
def test_latents_are_standardised(name, options):
    model, x = build(name, **options), images(30)
    model.standardise(x)
    with torch.no_grad():
        z = model.encode(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-3)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(8), rtol=0, atol=1e-2)


@every_kind
def test_kl_is_that_of_torchs_distributions(name, options):
    model, x = build(name, **options), images()
    mean, log_variance = model.posterior(x)
    posterior = Normal(mean, (log_variance / 2).exp())
    expected = kl_divergence(posterior, Normal(torch.zeros_like(mean), torch.ones_like(mean))).mean()
    _, extra = vae_loss(model, x, torch.randn(mean.shape), kl_weight=1.0, detail_weight=0.0)
    torch.testing.assert_close(extra["kl"], expected.detach(), rtol=1e-5, atol=1e-6)
    assert expected > 1e-3


@every_kind
@pytest.mark.parametrize("decoder", DECODERS)
def test_terms_of_the_loss(name, options, decoder):
    model, x = build(name, decoder=decoder, **options), images()
    noise = torch.randn(model.posterior(x)[0].shape, generator=torch.Generator().manual_seed(0))

    def loss(**weights):
        return vae_loss(model, x, noise, **({"kl_weight": 0.0, "detail_weight": 0.0} | weights))

    with torch.no_grad():
        mean, log_variance = model.posterior(x)
        difference = model.synthesise(mean + torch.exp(0.5 * log_variance) * noise) - x
        plain, extra = loss()
        torch.testing.assert_close(plain, difference.abs().mean() + difference.square().mean())
        torch.testing.assert_close(extra["mse"], difference.square().mean())
        torch.testing.assert_close(loss(kl_weight=2.0)[0] - plain, 2 * extra["kl"], rtol=1e-4, atol=1e-6)
        details = bands_by_pywavelets(difference)[1:].abs().mean()
        torch.testing.assert_close(loss(detail_weight=0.5)[0] - plain, 0.5 * details, rtol=1e-4, atol=1e-6)


def test_a_squared_error_of_equally_weighted_bands_is_the_pixels_but_an_absolute_one_is_not():
    difference = smooth_images(8, 32, 1).double() - smooth_images(8, 32, 2).double()
    bands = bands_by_pywavelets(difference)
    torch.testing.assert_close(dwt(difference), bands.transpose(0, 1).flatten(1, 2), rtol=0, atol=1e-12)
    torch.testing.assert_close(bands.square().mean(), difference.square().mean(), rtol=1e-12, atol=0)
    assert bands.abs().mean() < 0.7 * difference.abs().mean()


def test_psnr():
    assert psnr(4.0) == pytest.approx(0)
    assert psnr(0.04) == pytest.approx(20)


def test_psnr_by_band():
    x = smooth_images(4, 16, 0)
    reconstruction = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    reconstruction += torch.tensor([0.2, -0.2]).repeat(8)  # columns alternate: cV alone
    measured = band_psnr(x, reconstruction)
    errors = (bands_by_pywavelets(reconstruction) - bands_by_pywavelets(x)).double().square().flatten(1).mean(1)
    for name, error in zip(("cA", "cH", "cV", "cD"), errors.tolist(), strict=True):
        assert measured[name] == pytest.approx(10 * torch.log10(torch.tensor(4 / error)).item(), abs=1e-3), name
    assert list(measured) == ["cA", "cH", "cV", "cD"]
    assert measured["cV"] < min(measured[name] for name in ("cA", "cH", "cD")) - 5
    mean_error = sum(10 ** (-value / 10) * 4 for value in measured.values()) / 4
    assert psnr(mean_error) == pytest.approx(psnr((reconstruction - x).square().mean().item()), abs=1e-3)


@every_kind
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_weight_gets_a_gradient(name, options, decoder):
    model, x = build(name, decoder=decoder, **options), images()
    # What ends a residual block starts at zero, so that what lies before it gets its gradient from the second step on.
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    loss, _ = vae_loss(model, x, torch.randn(model.posterior(x)[0].shape), kl_weight=1e-3, detail_weight=0.5)
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, key


@every_kind
@pytest.mark.parametrize("decoder", DECODERS)
def test_it_learns(name, options, decoder):
    model = build(name, decoder=decoder, levels=1, stages=1, channels=4, **options)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    held_out = smooth_images(32, 16, seed=10_000)

    def quality():
        with torch.no_grad():
            return psnr((model.decode(model.encode(held_out)) - held_out).square().mean().item())

    before, steps = quality(), 80
    for step in range(steps):
        x = smooth_images(16, 16, step)
        noise = torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(step))
        loss, _ = vae_loss(model, x, noise, kl_weight=1e-4, detail_weight=0.5)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    assert quality() > before + 5, (before, quality())


def test_image_sizes_are_refused_before_any_compute():
    model = build(stages=2)
    model.encoder = None
    with pytest.raises(SettingError, match="image size 16x20 .*factor 8"):
        model.posterior(images(1, 16, 20))
