"""Haar against PyWavelets, standardisation, and the wavelet VAE's shapes and losses."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from iris.errors import SettingError
from iris.latents import LATENTS, build_latent
from iris.latents.haar import dwt, idwt
from iris.latents.wavelet_vae import WaveletVAE, psnr, vae_loss
from iris.randomness import initialise

SIZES = [(8, 8), (4, 12), (16, 8)]


def images(count=2, h=16, w=16, seed=0, dtype=torch.float32):
    return torch.rand(count, 3, h, w, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def vae(seed=0, **options):
    return initialise(WaveletVAE(**({"width": 16} | options)), seed)


def by_pywavelets(x):
    pywt = pytest.importorskip("pywt")
    average, details = pywt.dwt2(x.numpy(), "haar", axes=(-2, -1))
    return torch.cat([torch.from_numpy(band) for band in (average, *details)], 1)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_one_level_is_pywavelets(size):
    x = images(2, *size, dtype=torch.float64)
    torch.testing.assert_close(dwt(x), by_pywavelets(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(dwt(x.float()), by_pywavelets(x).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_two_levels_transform_every_band_again(size):
    x = images(2, *size, dtype=torch.float64)
    y = dwt(x, 2)
    assert y.shape == (2, 48, size[0] // 4, size[1] // 4)
    torch.testing.assert_close(y, by_pywavelets(by_pywavelets(x)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_round_trip_and_energy(levels):
    x = images(2, 16, 24)
    y = dwt(x, levels)
    torch.testing.assert_close(idwt(y, levels), x, rtol=0, atol=1e-6)
    torch.testing.assert_close(y.square().sum(), x.square().sum(), rtol=1e-5, atol=0)
    z = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(dwt(idwt(z, levels), levels), z, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "levels"), [((7, 8), 1), ((8, 7), 1), ((6, 8), 2), ((8, 6), 2)])
def test_odd_sizes_are_refused(size, levels):
    with pytest.raises(SettingError, match=f"{size[0]}x{size[1]} must be a multiple of .*{2**levels}"):
        dwt(images(1, *size), levels)


@pytest.mark.parametrize("levels", [0, -1])
def test_levels_below_one_are_refused(levels):
    for refuse in (lambda: dwt(images(), levels), lambda: idwt(dwt(images()), levels)):
        with pytest.raises(SettingError, match=f"levels={levels}"):
            refuse()


def test_channels_that_are_no_bands_are_refused():
    with pytest.raises(SettingError, match="6 channels"):
        idwt(torch.zeros(1, 6, 4, 4))


@pytest.mark.parametrize("levels", [1, 2])
def test_haar_latent_is_lossless_and_standardised(levels):
    latent = build_latent("haar", levels=levels)
    x = images(40) * 0.3 + 0.2
    latent.standardise(x, batch=7)
    z = latent.encode(x)
    assert z.shape == (40, latent.channels, 16 // latent.factor, 16 // latent.factor)
    assert latent.channels == 3 * 4**levels and latent.factor == 2**levels and not latent.trained
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(latent.channels), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(latent.channels), rtol=0, atol=1e-2)
    torch.testing.assert_close(latent.decode(z), x, rtol=0, atol=1e-5)


def test_standardisation_survives_the_state_dict():
    latent, other = build_latent("haar"), build_latent("haar")
    latent.standardise(images(10) * 0.5 - 0.4)
    other.load_state_dict(latent.state_dict())
    assert torch.equal(other.encode(images()), latent.encode(images()))
    assert not torch.equal(build_latent("haar").encode(images()), latent.encode(images()))


def test_bands_that_never_vary_are_not_blown_up():
    latent = build_latent("haar", levels=1)
    flat = images(20, 1, 1).expand(20, 3, 8, 8)
    latent.standardise(flat)
    z = latent.encode(flat)
    assert z[:, :3].std() > 0.9
    assert z[:, 3:].abs().max() < 1e-2


def test_decoded_images_stay_in_range():
    latent = build_latent("haar", levels=1)
    y = latent.decode(torch.full((1, 12, 4, 4), 9.0))
    assert y.min() >= -1 and y.max() == 1


@pytest.mark.parametrize(("levels", "stages", "channels"), [(1, 1, 8), (2, 1, 5), (1, 2, 4), (2, 0, 6)])
def test_wavelet_vae_shapes(levels, stages, channels):
    model = vae(levels=levels, stages=stages, channels=channels)
    x = images(2, 16, 24)
    assert model.factor == 2 ** (levels + stages) and model.trained
    mean, log_variance = model.posterior(x)
    assert mean.shape == log_variance.shape == (2, channels, 16 // model.factor, 24 // model.factor)
    torch.testing.assert_close(model.encode(x), mean)
    y = model.decode(mean)
    assert y.shape == x.shape and y.abs().max() <= 1


def test_wavelet_vae_latents_are_standardised():
    model, x = vae(), images(30)
    model.standardise(x)
    with torch.no_grad():
        z = model.encode(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-3)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(8), rtol=0, atol=1e-2)


def test_kl_is_that_of_torchs_distributions():
    model, x = vae(), images()
    mean, log_variance = model.posterior(x)
    posterior = Normal(mean, (log_variance / 2).exp())
    expected = kl_divergence(posterior, Normal(torch.zeros_like(mean), torch.ones_like(mean))).mean()
    _, extra = vae_loss(model, x, torch.randn(mean.shape), kl_weight=1.0, detail_weight=0.0)
    torch.testing.assert_close(extra["kl"], expected.detach(), rtol=1e-5, atol=1e-6)
    assert expected > 1e-3


def test_terms_of_the_vae_loss():
    model, x = vae(), images()
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
        details = by_pywavelets(difference)[:, 3:].abs().mean()
        torch.testing.assert_close(loss(detail_weight=0.5)[0] - plain, 0.5 * details, rtol=1e-4, atol=1e-6)


def test_every_weight_of_the_vae_gets_a_gradient():
    model, x = vae(), images()
    # The second convolution of each block starts at zero, so its first one gets its gradient from the second step on.
    for name, parameter in model.named_parameters():
        if "second" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    loss, _ = vae_loss(model, x, torch.randn(model.posterior(x)[0].shape), kl_weight=1e-3, detail_weight=0.5)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_width_that_groups_do_not_divide_is_refused():
    with pytest.raises(SettingError, match="latent.width=20.*8"):
        WaveletVAE(width=20)


def test_unknown_latents_and_options_are_refused():
    with pytest.raises(SettingError) as error:
        build_latent("jpeg")
    assert all(name in str(error.value) for name in LATENTS)
    with pytest.raises(SettingError, match="depth.*allowed: levels"):
        build_latent("haar", depth=2)


def test_psnr():
    assert psnr(4.0) == pytest.approx(0)
    assert psnr(0.04) == pytest.approx(20)
