"""Haar against PyWavelets, the lossless latents, standardisation, and what the registry refuses."""

import pytest
import torch
from torch.nn.functional import pixel_unshuffle

from iris.errors import SettingError
from iris.latents import LATENTS, build_latent, latent_options
from iris.latents.haar import dwt, idwt

SIZES = [(8, 8), (4, 12), (16, 8)]


def images(count=2, h=16, w=16, seed=0, dtype=torch.float32):
    return torch.rand(count, 3, h, w, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


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
def test_all_levels_are_pywavelets_packets(levels):
    pywt = pytest.importorskip("pywt")
    x = images(2, 16, 24)
    packet = pywt.WaveletPacket2D(x.double().numpy(), "haar", axes=(-2, -1), maxlevel=levels)
    bands = [""]
    for _ in range(levels):  # the latest level's band changes slowest
        bands = [earlier + latest for latest in "ahvd" for earlier in bands]
    expected = torch.cat([torch.from_numpy(packet[band].data) for band in bands], 1)
    torch.testing.assert_close(dwt(x, levels), expected.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("levels", [1, 2])
def test_haar_is_an_orthonormal_mix_of_unshuffled_pixels(levels):
    size = 2**levels
    units = torch.eye(size**2, dtype=torch.float64).view(-1, 1, size, size)
    mix = dwt(units, levels).flatten(1).T  # bands x pixels of one block
    torch.testing.assert_close(mix @ mix.T, torch.eye(size**2, dtype=torch.float64), rtol=0, atol=1e-12)
    x = images(2, 8, 12, dtype=torch.float64)
    pixels = pixel_unshuffle(x, size).unflatten(1, (3, -1))  # each colour's pixels
    expected = torch.einsum("bp,ncphw->nbchw", mix, pixels).flatten(1, 2)
    torch.testing.assert_close(dwt(x, levels), expected, rtol=0, atol=1e-12)


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


@pytest.mark.parametrize("patch", [1, 2, 4, 5])
def test_pixel_latent_is_patches(patch):
    latent = build_latent("pixel", patch=patch)
    x = images(2, 4 * patch, 3 * patch)
    z = latent.encode(x)
    assert z.shape == (2, 3 * patch**2, 4, 3) == (2, latent.channels, *latent.grid(4 * patch, 3 * patch))
    assert latent.factor == patch and not latent.trained
    for row, column in [(0, 0), (3, 1)]:
        square = x[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        assert torch.equal(z[:, :, row, column], square.flatten(1))
    assert torch.equal(latent.decode(z), x)


def test_pixel_latent_has_patch_4_and_is_standardised():
    latent, x = build_latent("pixel"), images(40) * 0.3 + 0.2
    assert latent.factor == 4
    latent.standardise(x, batch=16)
    z = latent.encode(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(48), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(48), rtol=0, atol=1e-2)
    torch.testing.assert_close(latent.decode(z), x, rtol=0, atol=1e-6)


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


def test_unknown_latents_and_options_are_refused():
    with pytest.raises(SettingError) as error:
        build_latent("jpeg")
    assert all(name in str(error.value) for name in LATENTS)
    with pytest.raises(SettingError, match="depth.*allowed: levels"):
        build_latent("haar", depth=2)


SIZED = {"pixel": {}, "haar": {}, "wavelet_vae": {"width": 16, "stages": 2}, "conv_vae": {"width": 16, "stages": 2}}


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("change", [(1, 0), (0, 2)])
def test_image_sizes_that_the_factor_does_not_divide_are_refused(name, change):
    latent = build_latent(name, **SIZED[name])
    height, width = 2 * latent.factor + change[0], 3 * latent.factor + change[1]
    x = images(1, height, width)
    for refuse in (latent.encode, latent.standardise, lambda x: latent.grid(height, width)):
        with pytest.raises(SettingError, match=f"image size {height}x{width} .*factor {latent.factor}"):
            refuse(x)
    assert latent.grid(2 * latent.factor, 3 * latent.factor) == (2, 3)


@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (5, 3)])
@pytest.mark.parametrize("name", SIZED)
def test_odd_and_non_square_grids(name, grid):
    latent = build_latent(name, **SIZED[name])
    x = images(1, *(side * latent.factor for side in grid))
    z = latent.encode(x)
    assert z.shape == (1, latent.channels, *grid)
    assert latent.decode(z).shape == x.shape


def test_options_by_name():
    assert latent_options("pixel") == ("patch",)
    assert latent_options("haar") == ("levels",)
    assert latent_options("wavelet_vae") == ("levels", "stages", "channels", "width", "blocks", "decoder")
    assert latent_options("conv_vae") == (*latent_options("wavelet_vae"), "front")
    assert latent_options("pretrained") == ("source", "subfolder")
    with pytest.raises(SettingError, match="jpeg.*allowed: pixel, haar"):
        latent_options("jpeg")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pixel", {"patch": 0}, "latent.patch=0"),
        ("haar", {"levels": 0}, "latent.levels=0"),
        ("wavelet_vae", {"levels": 0}, "latent.levels=0"),
        ("wavelet_vae", {"stages": -1}, "latent.stages=-1"),
        ("wavelet_vae", {"channels": 0}, "latent.channels=0"),
        ("wavelet_vae", {"blocks": -1}, "latent.blocks=-1"),
        ("wavelet_vae", {"width": 20}, "latent.width=20.*8"),
        ("wavelet_vae", {"width": 0}, "latent.width=0.*8"),
        ("conv_vae", {"width": 20}, "latent.width=20.*8"),
        ("wavelet_vae", {"decoder": "mobile"}, "latent.decoder='mobile'.*allowed: standard, phone"),
        ("conv_vae", {"decoder": "mobile"}, "latent.decoder='mobile'.*allowed: standard, phone"),
        ("conv_vae", {"front": "fft"}, "latent.front='fft'.*allowed: conv, unshuffle"),
    ],
)
def test_values_that_cannot_be_used_are_refused(name, options, message):
    with pytest.raises(SettingError, match=message):
        build_latent(name, **options)
