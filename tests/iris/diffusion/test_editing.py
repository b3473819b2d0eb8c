"""Editing with the weights that generate: image-to-image, inpainting, and a changed prompt at inverted noise."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import CAPTIONS, small_model

from iris.diffusion.editing import Picture, read_images, read_mask
from iris.diffusion.flow import integrate, time_grid
from iris.diffusion.sampling import GuidedVelocity, SamplingSettings, invert
from iris.errors import SettingError
from iris.latents import build_latent
from iris.pipeline import IrisPipeline

SIZE, PROMPT, OTHER = 8, CAPTIONS[0], CAPTIONS[1]


def draws(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe():
    latent = build_latent("haar", levels=1)
    return IrisPipeline(small_model(awake=True, channels=latent.channels), latent, "haar", {"levels": 1}, SIZE)


@pytest.fixture(scope="module")
def photo():
    """uint8 [8, 8, 3]."""
    return torch.randint(0, 256, (SIZE, SIZE, 3), generator=draws(0)).to(torch.uint8).numpy()


def mask_of(rows, columns):
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[rows, columns] = True
    return mask


def pixels(output):
    return np.asarray(output.images[0]).astype(int)


class TestImageToImage:
    def test_strength_0_is_the_reconstruction(self, pipe, photo):
        assert np.array_equal(pixels(pipe(PROMPT, image=photo, strength=0)), photo)  # Haar is lossless

    def test_strength_1_ignores_the_image(self, pipe, photo):
        assert np.array_equal(pixels(pipe(PROMPT, image=photo, strength=1)), pixels(pipe(PROMPT)))

    def test_between_it_starts_from_the_noised_image(self, pipe, photo):
        strength, noise = 0.4, torch.randn(1, 12, 4, 4, generator=draws(1))
        got = pipe(
            PROMPT, 3, guidance_scale=1.0, image=photo, strength=strength, latents=noise, output_type="latent"
        ).images
        clean = pipe.latent.encode(torch.from_numpy(photo).permute(2, 0, 1)[None] / 127.5 - 1)
        text = pipe.model.text(pipe.model.text.tokenise([PROMPT]))
        with torch.no_grad():
            z = (1 - strength) * clean + strength * noise
            for t in (0.4, 0.4 * 2 / 3, 0.4 / 3):  # every step counts, whatever the strength
                z = z - 0.4 / 3 * pipe.model.generator(z, torch.full((1,), t), text)
        torch.testing.assert_close(got, z, rtol=1e-4, atol=1e-4)

    def test_the_default_keeps_something(self, pipe, photo):
        default, given = (pixels(pipe(PROMPT, image=photo, **strength)) for strength in ({}, {"strength": 0.6}))
        assert np.array_equal(default, given)
        assert not np.array_equal(default, photo) and not np.array_equal(default, pixels(pipe(PROMPT)))

    def test_one_image_serves_all_prompts_or_each_has_its_own(self, pipe, photo):
        other = 255 - photo
        shared = pipe([PROMPT, OTHER], image=photo, strength=0, num_images_per_prompt=2).images
        assert [np.array_equal(np.asarray(image), photo) for image in shared] == [True] * 4
        each = pipe([PROMPT, OTHER], image=[photo, other], strength=0, num_images_per_prompt=2).images
        expected = [photo, photo, other, other]
        assert all(np.array_equal(np.asarray(got), want) for got, want in zip(each, expected, strict=True))
        with pytest.raises(SettingError, match="image: 2 pictures for 3 prompts"):
            pipe([PROMPT] * 3, image=[photo, other])

    @pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
    def test_other_strengths_are_refused(self, pipe, photo, strength):
        with pytest.raises(SettingError, match="strength="):
            pipe(PROMPT, image=photo, strength=strength)


class TestInpainting:
    MASK = mask_of(slice(2, 5), slice(3, 8))  # neither its rows nor its columns are those of latent blocks

    def test_kept_pixels_are_the_original(self, pipe, photo):
        got, mask = pixels(pipe(PROMPT, image=photo, mask_image=self.MASK)), self.MASK.numpy()
        assert np.array_equal(got[~mask], photo[~mask])
        assert (got[mask] != photo[mask]).any(-1).all()

    def test_the_known_part_is_noised_to_the_time_of_each_step(self, pipe, photo):
        noise, seen = torch.randn(1, 12, 4, 4, generator=draws(1)), {}

        def callback(pipe, step, t, kwargs):
            seen[step] = kwargs["latents"]

        pipe(PROMPT, 4, image=photo, mask_image=self.MASK, latents=noise, callback_on_step_end=callback)
        clean = pipe.latent.encode(torch.from_numpy(photo).permute(2, 0, 1)[None] / 127.5 - 1)
        known = torch.ones(4, 4, dtype=torch.bool)
        known[1:3, 1:4] = False  # blocks that hold a pixel of rows 2 … 4, columns 3 … 7
        for step, t in enumerate((0.75, 0.5, 0.25, 0.0)):
            expected = (1 - t) * clean + t * noise
            torch.testing.assert_close(seen[step][..., known], expected[..., known], rtol=1e-5, atol=1e-5)
            assert (seen[step] - expected).abs().amax((0, 1))[~known].min() > 1e-3

    def test_the_repainted_part_sees_the_rest(self, pipe, photo):
        mask = self.MASK.numpy()
        with_photo, with_other = (pixels(pipe(PROMPT, image=x, mask_image=self.MASK)) for x in (photo, 255 - photo))
        assert np.abs(with_photo[mask] - with_other[mask]).max() > 1

    def test_masks_of_one_colour(self, pipe, photo):
        black, white = np.zeros((SIZE, SIZE)), np.ones((SIZE, SIZE))
        assert np.array_equal(pixels(pipe(PROMPT, image=photo, mask_image=black)), photo)
        assert np.array_equal(pixels(pipe(PROMPT, image=photo, mask_image=white)), pixels(pipe(PROMPT)))
        weak = pixels(pipe(PROMPT, image=photo, mask_image=white, strength=0.3))
        assert np.array_equal(weak, pixels(pipe(PROMPT, image=photo, strength=0.3)))

    def test_forms_of_a_mask(self):
        mask = self.MASK.numpy()
        forms = [
            mask,
            mask.astype(float),
            mask.astype(np.uint8) * 255,
            self.MASK,
            self.MASK[None].float(),
            [self.MASK],
            Image.fromarray(mask.astype(np.uint8) * 255),
        ]
        for form in forms:
            got = read_mask(form, SIZE, SIZE)
            assert got.dtype == torch.bool and torch.equal(got, self.MASK[None, None])
        assert torch.equal(read_mask(np.ones((3, 3)), SIZE, SIZE), torch.ones(1, 1, SIZE, SIZE, dtype=torch.bool))
        assert len(read_mask(torch.stack([self.MASK, self.MASK])[:, None], SIZE, SIZE)) == 2


class TestInversion:
    """The flow of Gaussian data N(mu, s^2) has an exact velocity, and leads z_0 to (z_0 - mu) / s."""

    MU, S = 0.7, 0.3

    def velocity(self, z, t):
        t = t.double()
        variance = (1 - t) ** 2 * self.S**2 + t**2
        return (t - (1 - t) * self.S**2) * (z - (1 - t) * self.MU) / variance - self.MU

    def error(self, sampler, steps):
        clean = torch.linspace(-0.5, 2, 24, dtype=torch.float64).view(1, 1, 4, 6)
        noise = invert(self.velocity, clean, SamplingSettings(steps, sampler))
        return (noise - (clean - self.MU) / self.S).abs().max().item()

    @pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
    def test_it_finds_the_noise(self, sampler, order):
        coarse, fine = self.error(sampler, 128), self.error(sampler, 256)
        assert fine < 0.05 and coarse / fine > 0.9 * 2**order  # midpoint's is of third order here

    def test_part_of_the_way(self):
        clean, settings = torch.full((1, 1, 2, 2), 1.5, dtype=torch.float64), SamplingSettings(200, "midpoint")
        there = invert(self.velocity, clean, settings, strength=0.5)
        back = integrate(self.velocity, there, time_grid(200, start=0.5), "midpoint")
        torch.testing.assert_close(back, clean, rtol=0, atol=1e-4)
        assert (there - invert(self.velocity, clean, settings)).abs().min() > 0.1

    def test_noise_cannot_be_taken_back(self, pipe, photo):
        with pytest.raises(SettingError, match="stochastic.*midpoint"):
            pipe.edit(photo, PROMPT, OTHER, sampler="stochastic")


@pytest.fixture(scope="module")
def smooth():
    """In float64, its field the same at all times: at random weights, time's fast sinusoids would need tiny steps."""
    latent = build_latent("haar", levels=1)
    model = small_model(awake=True, channels=latent.channels)
    model.generator.time.inner.weight.data.zero_()
    return IrisPipeline(model, latent, "haar", {"levels": 1}, SIZE).to(torch.float64)


class TestEdit:
    def error(self, pipe, photo, sampler, steps):
        """Of the latents, which are not clipped."""
        clean = pipe.latent.encode(read_images(photo, SIZE, SIZE).double())
        got = pipe.edit(photo, PROMPT, PROMPT, steps, guidance_scale=1.0, sampler=sampler, output_type="latent").images
        return (got - clean).abs().mean().item()

    @pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("midpoint", 2)])
    def test_the_same_prompt_gives_the_image_back(self, smooth, photo, sampler, order):
        coarse, fine = (self.error(smooth, photo, sampler, steps) for steps in (8, 32))
        assert fine < 0.05 and coarse / fine > 0.7 * 4**order

    def test_midpoint_is_closer_than_euler_at_equal_cost(self, smooth, photo):
        assert self.error(smooth, photo, "midpoint", 8) < 0.2 * self.error(smooth, photo, "euler", 16)

    def test_it_starts_from_the_noise_that_the_source_prompt_makes_the_image_of(self, smooth, photo):
        edited = smooth.edit(photo, PROMPT, OTHER, 4, output_type="latent").images
        text = smooth.model.text(smooth.model.text.tokenise([PROMPT]))
        z = clean = smooth.latent.encode(read_images(photo, SIZE, SIZE).double())
        with torch.no_grad():
            for t in (0.0, 0.25, 0.5, 0.75):
                slope = smooth.model.generator(z, torch.full((1,), t), text)
                z = z + smooth.model.generator(z + slope / 8, torch.full((1,), t + 0.125), text) / 4
        expected = smooth(OTHER, 4, sampler="midpoint", latents=z, output_type="latent").images
        torch.testing.assert_close(edited, expected, rtol=1e-6, atol=1e-6)
        assert (edited - clean).abs().mean() > 0.1

    def test_what_the_call_takes(self, smooth, photo):
        arguments = {"negative_prompt": "two stars", "output_type": "latent", "height": 12}
        assert smooth.edit([photo, photo], PROMPT, OTHER, 2, **arguments).images.shape == (2, 12, 6, 4)


class TestReading:
    def test_forms_of_an_image(self, photo):
        tensor = torch.from_numpy(photo).permute(2, 0, 1)
        expected = tensor[None] / 127.5 - 1
        forms = [
            photo,
            photo / 255,
            photo[None],
            Image.fromarray(photo),
            [Image.fromarray(photo)],
            tensor,
            tensor[None] / 255,
        ]
        for form in forms:
            torch.testing.assert_close(read_images(form, SIZE, SIZE), expected, rtol=0, atol=1e-6)

    def test_what_a_pipeline_returns_can_be_given_back(self, pipe):
        for kind in ("pil", "np", "pt"):
            images = pipe(PROMPT, output_type=kind).images
            again = pipe(PROMPT, image=images, strength=0, output_type="pt").images
            tolerance = 0.5 / 255 if kind == "pil" else 1e-5
            torch.testing.assert_close(again, pipe(PROMPT, output_type="pt").images, rtol=0, atol=tolerance + 1e-5)

    def test_transparency_and_grey_become_rgb(self, photo):
        grey = Image.fromarray(photo).convert("L")
        assert read_images(grey, SIZE, SIZE).shape == (1, 3, SIZE, SIZE)
        assert read_images(Image.fromarray(photo).convert("RGBA"), SIZE, SIZE).shape == (1, 3, SIZE, SIZE)

    def test_other_sizes_are_resized(self):
        ramp = np.linspace(0, 1, 32)[None, :, None].repeat(16, 0).repeat(3, 2)
        got = read_images(ramp, 4, 8)
        assert got.shape == (1, 3, 4, 8) and got.min() >= -1 and got.max() <= 1
        assert (got[0, 0, 0].diff() > 0).all() and got[0, 0, 0, 3:5].mean().abs() < 1e-3

    @pytest.mark.parametrize(
        ("image", "named"),
        [
            ("photo.png", "image must be.*str"),
            (np.zeros((8, 8, 4)), "three channels"),
            ([], "image must be"),
            (np.zeros((8, 8, 3)) - 1, r"\[0, 1\]"),
            (torch.full((3, 8, 8), float("nan")), r"\[0, 1\]"),
            (torch.zeros(8, 8, 3), "three channels"),
            ([np.zeros((8, 8, 3)), np.zeros((4, 8, 3))], "same size"),
        ],
    )
    def test_what_is_no_image_is_told(self, image, named):
        with pytest.raises(SettingError, match=named):
            read_images(image, SIZE, SIZE)

    def test_a_mask_of_zeros_and_ones_as_bytes_is_refused(self):
        with pytest.raises(SettingError, match="mask_image.*bool or float"):
            read_mask(np.eye(8, dtype=np.uint8), SIZE, SIZE)


def test_a_picture_without_a_mask_keeps_nothing(photo):
    images = read_images(photo, SIZE, SIZE)
    picture = Picture(images, torch.zeros(1, 12, 4, 4), 0.5)
    assert picture.keep(torch.zeros(1, 12, 4, 4)) is None and picture.finish(-images) is not images


def test_guidance_needs_something_to_lead_away_from(pipe):
    text = pipe.model.text(pipe.model.text.tokenise([PROMPT]))
    with pytest.raises(SettingError, match="guidance_scale=2"):
        GuidedVelocity(pipe.model.generator, text, guidance=SamplingSettings(1, guidance=2.0).guide)
