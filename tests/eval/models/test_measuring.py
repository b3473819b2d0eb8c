"""What measuring processes load: the whole model, its parts, one part at a time."""

import gc
import weakref

import pytest
import torch
from small_models import CAPTIONS, small_model

from eval.models.loading import Given, load_for_measuring, load_mixer
from eval.models.parts import size_of
from eval.models.sources import Drawn, Saved
from iris.diffusion.sampling import SamplingSettings
from iris.errors import SettingError
from iris.latents import build_latent
from iris.nn.generator import Generator
from iris.pipeline import IrisPipeline
from iris.randomness import initialise

OPTIONS = {"levels": 1, "stages": 1, "channels": 3, "width": 8, "blocks": 1}
DRAWN = {
    "dim": 16,
    "heads": 2,
    "core": 1,
    "prelude": 1,
    "coda": 1,
    "iterations": 2,
    "text_width": 16,
    "channels": 3,
    "size": 16,
    "latent_options": OPTIONS,
}
F32, CPU = torch.float32, torch.device("cpu")


@pytest.fixture
def saved(tmp_path):
    """A small pipeline whose every part has drawn weights, and its folder."""
    latent = initialise(build_latent("wavelet_vae", **OPTIONS), 0)
    latent.standardise(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    with torch.no_grad():
        for parameter in latent.decoder.parameters():
            parameter.add_(0.1)
    pipeline = IrisPipeline(small_model(awake=True), latent, "wavelet_vae", OPTIONS, 16)
    pipeline.save(tmp_path)
    return pipeline, tmp_path


def given(folder, **values):
    return {"folder": str(folder), "caption": CAPTIONS[0], "steps": 2, **values}


@pytest.mark.parametrize("sampling", [{}, {"guidance": 3.0}, {"sampler": "stochastic", "iterations": 3}], ids=str)
def test_one_part_at_a_time_makes_the_same_image(saved, sampling, monkeypatch):
    for module in ("iris.pipeline", "eval.models.loading"):  # before rounding to 8 bits, which hides most differences
        monkeypatch.setattr(f"{module}.to_pixels", lambda images: images)
    pipeline, folder = saved
    expected = pipeline.generate(CAPTIONS[:1] * 2, SamplingSettings(2, **sampling))
    for resident in ("all", "one part"):
        generate = load_for_measuring(given(folder, batch=2, resident=resident, **sampling))
        assert torch.equal(generate(), expected), resident
    assert generate.weights_bytes == 0 and not hasattr(generate, "parts")


@pytest.mark.parametrize("resident", ["all", "one part"])
def test_a_student_is_measured_as_it_says(saved, resident, tmp_path):
    student = IrisPipeline(*saved[0].parts[:5], SamplingSettings(3, "stochastic", shift=2.0), 2.5)
    student.save(tmp_path / "student")
    generate = load_for_measuring({"folder": str(tmp_path / "student"), "caption": CAPTIONS[0], "resident": resident})
    assert torch.equal(generate(), student.generate(CAPTIONS[:1]))


def test_what_is_measured_is_one_image_of_the_saved_model(saved):
    pipeline, folder = saved
    generate = load_for_measuring(given(folder, guidance=3.0))
    assert torch.equal(generate(), pipeline.generate(CAPTIONS[:1], SamplingSettings(2, guidance=3.0)))
    assert load_for_measuring(given(folder, steps=1))().shape == (1, 16, 16, 3)
    assert generate.weights_bytes == size_of(pipeline.model) + size_of(pipeline.latent)


def test_one_part_at_a_time_lets_go_of_each(saved, monkeypatch):
    _, folder = saved
    made, alive = [], []
    for name in ("text", "generator", "latent"):
        make = getattr(Saved, name)

        def noted(self, make=make):
            gc.collect()
            alive.append(sum(ref() is not None for ref in made))
            part = make(self)
            made.append(weakref.ref(part))
            return part

        monkeypatch.setattr(Saved, name, noted)
    load_for_measuring(given(folder, resident="one part"))()
    gc.collect()
    assert alive == [0, 0, 0] and all(ref() is None for ref in made) and len(made) == 3


def test_parts_compute_what_the_model_does(saved):
    pipeline, folder = saved
    parts = load_for_measuring(given(folder, guidance=2.0, iterations=3, batch=2)).parts
    assert {name: (part.count, part.within) for name, part in parts.items()} == {
        "text": (1, None),
        "generator": (4, None),
        "iteration": (12, "generator"),
        "mixer": (12, "iteration"),
        "decoder": (1, None),
    }
    text, null = parts["text"]()
    assert text.tokens.shape == null.tokens.shape == (2, 6, 12)
    assert torch.equal(text.tokens, pipeline.model.text(pipeline.model.text.tokenise(CAPTIONS[:1] * 2)).tokens)
    assert parts["generator"]().shape == (2, 3, 4, 4) and parts["decoder"]().shape == (2, 3, 16, 16)
    assert parts["iteration"]().shape == parts["mixer"]().shape == (2, 4, 4, 16)


def test_an_iteration_is_the_last_pass_of_an_evaluation(saved):
    _, folder = saved
    parts = load_for_measuring(given(folder, part="generator", iterations=3))
    generator = parts.parts["iteration"].prepare().func.__self__
    states = []
    with torch.inference_mode():
        original = generator._read
        generator._read = lambda state, *others: states.append(state) or original(state, *others)
        parts()
    assert torch.equal(parts.parts["iteration"](), states[0])


def test_weights_of_parts_are_those_of_the_modules(saved):
    pipeline, folder = saved
    parts = load_for_measuring(given(folder)).parts
    model = pipeline.model
    assert parts["text"].weights_bytes == size_of(model.text)
    assert parts["generator"].weights_bytes == size_of(model.generator)
    assert parts["iteration"].weights_bytes == size_of(model.generator.core)
    alone = load_for_measuring(given(folder, part="decoder"))
    assert alone.weights_bytes == parts["decoder"].weights_bytes == size_of(pipeline.latent.decoder) + 4 * 2 * 3


@pytest.mark.parametrize("part", ["text", "generator", "decoder"])
def test_a_part_alone_is_the_models(saved, part):
    _, folder = saved
    together, alone = load_for_measuring(given(folder)).parts[part], load_for_measuring(given(folder, part=part))
    for one, other in zip(together(), alone(), strict=True):
        if one is not None:
            torch.testing.assert_close(one, other)
    assert alone.weights_bytes == together.weights_bytes and alone.activations_bytes == together.activations_bytes


def test_a_preset_is_drawn_in_the_precision_that_is_wanted():
    generate = load_for_measuring({"preset": "tiny", "changes": DRAWN, "steps": 1, "dtype": "bfloat16", "batch": 2})
    assert generate().shape == (2, 16, 16, 3)
    full = load_for_measuring({"preset": "tiny", "changes": DRAWN, "part": "generator"})
    assert generate.parts["generator"].weights_bytes * 2 == full.weights_bytes
    in_turn = load_for_measuring(
        {"preset": "tiny", "changes": DRAWN, "steps": 1, "dtype": "bfloat16", "resident": "one part"}
    )
    assert torch.equal(in_turn(), generate()[:1])


def test_drawn_parts_hold_nothing_in_another_precision():
    source = Drawn("tiny", DRAWN, torch.bfloat16, CPU)
    for part in (source.text(), source.generator(), source.decoder()):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    assert source.text_length == source.text().length and source.grid == (4, 4)
    assert not any("encoder" in name for name, _ in source.decoder().named_parameters())


def test_drawn_captions_are_told_apart():
    encoder = Drawn("tiny", DRAWN, F32, CPU).text()
    numbers = encoder.tokenise(["a", "b", "a"])
    assert numbers.shape == (3, 77) and torch.equal(numbers[0], numbers[2]) and not torch.equal(numbers[0], numbers[1])
    assert Given(preset="tiny", batch=2).captions(encoder)[1] != Given(preset="tiny").captions(encoder)[0]


def test_mixers_run_on_the_grids_that_are_named():
    run = load_mixer({"mixer": "grfm", "dim": 16, "heads": 2, "sides": [2, 4], "batch": 3})
    assert {name: tuple(part().shape) for name, part in run.parts.items()} == {"4": (3, 2, 2, 16), "16": (3, 4, 4, 16)}
    assert run().shape == (3, 2, 2, 16) and run.weights_bytes == run.parts["16"].weights_bytes > 0


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"folder": "nowhere"}, "model=nowhere"),
        ({}, "folder=, of a saved pipeline, or preset="),
        ({"preset": "tiny", "folder": "x"}, "either folder="),
        ({"preset": "huge"}, "preset='huge' .* tiny, small, base"),
        ({"preset": "tiny", "dtype": "int4"}, "dtype='int4'"),
        ({"preset": "tiny", "part": "encoder"}, "part='encoder'"),
        ({"preset": "tiny", "batch": 0}, "batch=0"),
        ({"preset": "tiny", "stps": 4}, "'stps'.* steps"),
        ({"preset": "tiny", "resident": "some"}, "resident='some'"),
        ({"preset": "tiny", "steps": 0}, "steps=0"),
    ],
)
def test_bad_arguments(values, named):
    with pytest.raises(SettingError, match=named):
        load_for_measuring(values)


def test_damaged_weights_are_refused(saved, tmp_path):
    _, folder = saved
    other = small_model(mixer="attention")
    (tmp_path / "other").mkdir()
    IrisPipeline(other, build_latent("wavelet_vae", **OPTIONS), "wavelet_vae", OPTIONS, 16).save(tmp_path / "other")
    (folder / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(SettingError, match="model.safetensors does not hold this model's weights"):
        load_for_measuring(given(folder, part="generator"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(SettingError, match="model.safetensors"):
        load_for_measuring(given(folder, part="generator"))


def test_recording_leaves_the_generator_as_it_was(saved):
    _pipeline, folder = saved
    parts = load_for_measuring(given(folder, part="generator"))
    parts.parts["iteration"]()
    generator = parts.parts["iteration"].prepare().func.__self__
    assert isinstance(generator, Generator) and "_pass" not in vars(generator)
