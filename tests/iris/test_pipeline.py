"""Text in, images out: repeatable, independent of batching, and the same after saving and loading."""

import pytest
import torch
from small_models import CAPTIONS, small_model

from iris.errors import SettingError
from iris.flow import SAMPLERS
from iris.latents import build_latent
from iris.pipeline import CONFIG, LATENT_WEIGHTS, WEIGHTS, Pipeline, SamplingSettings, load_for_measuring
from iris.randomness import image_noise, initialise
from iris.text import WordEncoder
from iris.training.tasks import TextToLatent

SIZE = 8
SETTINGS = SamplingSettings(steps=3, guidance=2.0)


def make(latent="haar", mixer="grfm", **options):
    options = options or {"levels": 1}
    space = initialise(build_latent(latent, **options), 0)
    images = torch.rand(16, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    space.standardise(images)
    model = small_model(awake=True, channels=space.channels, mixer=mixer)
    return Pipeline(model, space, latent, options, SIZE)


def difference(one, other):
    return (one.int() - other.int()).abs().max().item()


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_images_are_uint8_and_repeat(sampler, guidance):
    settings = SamplingSettings(steps=2, sampler=sampler, guidance=guidance)
    images = make().generate(CAPTIONS, settings, seed=1)
    assert images.dtype == torch.uint8 and images.shape == (4, SIZE, SIZE, 3)
    assert images.float().std() > 10
    assert torch.equal(make().generate(CAPTIONS, settings, seed=1), images)
    assert not torch.equal(make().generate(CAPTIONS, settings, seed=2), images)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_an_image_does_not_depend_on_the_batch_size(batch):
    pipeline = make()
    whole = pipeline.generate(CAPTIONS, SETTINGS)
    assert difference(pipeline.generate(CAPTIONS, SETTINGS, batch=batch), whole) <= 1  # sums in another order
    later = pipeline.generate(CAPTIONS[2:], SETTINGS, first=2)
    assert difference(later, whole[2:]) <= 1
    assert difference(pipeline.generate(CAPTIONS[2:], SETTINGS), whole[2:]) > 10


def test_captions_guidance_and_iterations_matter():
    pipeline = make()
    images = pipeline.generate(CAPTIONS, SETTINGS)
    assert difference(pipeline.generate(CAPTIONS[::-1], SETTINGS), images) > 1
    for changes in ({"guidance": 1.0}, {"iterations": 5}, {"steps": 4}, {"shift": 3.0}, {"sampler": "heun"}):
        settings = SamplingSettings(**({"steps": 3, "guidance": 2.0} | changes))
        assert difference(pipeline.generate(CAPTIONS, settings), images) > 1, changes


def test_guidance_extrapolates_from_the_empty_caption():
    """One Euler step from noise lands at noise - v, with v = v(empty) + guidance (v(caption) - v(empty))."""
    pipeline, guidance = make(), 2.5
    torch.nn.init.normal_(pipeline.model.generator.output.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    images = pipeline.generate(CAPTIONS[:1], SamplingSettings(steps=1, guidance=guidance))
    noise = image_noise(0, 0, 1, (12, 4, 4))
    with torch.no_grad():
        text, empty = (
            pipeline.model(noise, torch.ones(1), pipeline.model.text.vocabulary.encode([caption]))
            for caption in (CAPTIONS[0], "")
        )
        expected = pipeline.latent.decode(noise - (empty + guidance * (text - empty)))
    expected = ((expected + 1) * 127.5).round().permute(0, 2, 3, 1)
    assert (images.float() - expected).abs().max() <= 1
    unguided = pipeline.generate(CAPTIONS[:1], SamplingSettings(steps=1))
    assert (images.float() - unguided.float()).abs().max() > 3


@pytest.mark.parametrize(("sampler", "guidance", "count"), [("euler", 1.0, 4), ("heun", 1.0, 7), ("midpoint", 2.0, 16)])
def test_evaluations(sampler, guidance, count):
    assert SamplingSettings(4, sampler, guidance).evaluations == count


def test_an_unknown_sampler_is_refused():
    with pytest.raises(SettingError, match="ddim.*euler"):
        make().generate(CAPTIONS, SamplingSettings(2, "ddim"))


@pytest.mark.parametrize(
    ("latent", "options"),
    [("haar", {"levels": 1}), ("haar", {"levels": 2}), ("wavelet_vae", {"channels": 4, "width": 8})],
)
@pytest.mark.parametrize("mixer", ["grfm", "attention", "grfm[fourier,spatial]"])
def test_save_and_load_give_the_same_images(latent, options, mixer, tmp_path):
    pipeline = make(latent, mixer, **options)
    pipeline.save(tmp_path / "model")
    loaded = Pipeline.load(tmp_path / "model")
    assert torch.equal(loaded.generate(CAPTIONS, SETTINGS), pipeline.generate(CAPTIONS, SETTINGS))
    loaded.save(tmp_path / "again")
    for name in (CONFIG, WEIGHTS, LATENT_WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, LATENT_WEIGHTS])
def test_a_missing_file_is_named(name, tmp_path):
    make().save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(SettingError, match=f"{name} is missing"):
        Pipeline.load(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(SettingError, match="nowhere"):
        Pipeline.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [WEIGHTS, LATENT_WEIGHTS])
def test_truncated_weights_are_refused(name, tmp_path):
    make().save(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-5])
    with pytest.raises(SettingError, match=name):
        Pipeline.load(tmp_path)


@pytest.mark.parametrize("content", ["", '{"generator": ', "{}"], ids=["empty", "half", "without keys"])
def test_an_unreadable_configuration_is_refused(content, tmp_path):
    make().save(tmp_path)
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(SettingError, match=CONFIG):
        Pipeline.load(tmp_path)


def test_heads_of_the_text_encoder_are_saved(tmp_path):
    pipeline = make()
    encoder = WordEncoder(pipeline.model.text.vocabulary, pipeline.model.text.width, layers=1, heads=2)
    encoder.load_state_dict(pipeline.model.text.state_dict())
    other = Pipeline(TextToLatent(encoder, pipeline.model.generator), pipeline.latent, "haar", {"levels": 1}, SIZE)
    other.save(tmp_path)
    numbers = encoder.vocabulary.encode(CAPTIONS)
    torch.testing.assert_close(Pipeline.load(tmp_path).model.text(numbers).pooled, encoder(numbers).pooled)


def test_weights_of_another_model_are_refused(tmp_path):
    make().save(tmp_path / "a")
    make(mixer="attention").save(tmp_path / "b")
    (tmp_path / "a" / WEIGHTS).write_bytes((tmp_path / "b" / WEIGHTS).read_bytes())
    with pytest.raises(SettingError, match="model="):
        Pipeline.load(tmp_path / "a")


def test_what_is_measured_is_one_image_of_the_saved_model(tmp_path):
    pipeline = make()
    pipeline.save(tmp_path)
    generate = load_for_measuring({"folder": str(tmp_path), "caption": CAPTIONS[0], "steps": 2, "guidance": 3.0})
    assert torch.equal(generate(), pipeline.generate(CAPTIONS[:1], SamplingSettings(2, guidance=3.0)))
    held = sum(p.numel() for p in pipeline.model.parameters()) + 2 * pipeline.latent.channels  # mean and deviation
    assert generate.weights_bytes == 4 * held
    assert load_for_measuring({"folder": str(tmp_path), "steps": 1})().shape == (1, SIZE, SIZE, 3)
