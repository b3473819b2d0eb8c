"""Text in, images out: repeatable, independent of batching, called as in diffusers, the same after saving."""

import json
import time

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from small_clip import WIDTH as CLIP_WIDTH
from small_clip import save_clip
from small_models import CAPTIONS, small_config, small_model, wake

from iris.diffusion.flow import SAMPLERS, time_grid
from iris.diffusion.sampling import addressed_noise
from iris.errors import SettingError
from iris.io.pixels import to_pixels
from iris.io.tensors import load_tensors, save_tensors
from iris.latents import build_latent
from iris.model import CONFIG, LATENT_WEIGHTS, WEIGHTS, TextToLatent
from iris.nn.condition import TextCondition
from iris.nn.depth import Depth
from iris.nn.generator import Generator
from iris.pipeline import IrisPipeline, SamplingSettings
from iris.randomness import image_noise, initialise
from iris.text import ClassLabels, CLIPText, WordEncoder

SIZE = 8
SETTINGS = SamplingSettings(steps=3, guidance=2.0)
# A consistency student's, and the arguments that ask for the same.
OWN = SamplingSettings(2, "stochastic", shift=3.0)
EXPLICIT = {"num_inference_steps": 2, "sampler": "stochastic", "guidance_scale": 1.0, "shift": 3.0}
PROMPT = CAPTIONS[0]


def make(latent="haar", mixer="grfm", depth=Depth(), **options):
    options = options or {"levels": 1}
    space = initialise(build_latent(latent, **options), 0)
    images = torch.rand(16, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    space.standardise(images)
    model = small_model(awake=True, channels=space.channels, mixer=mixer, depth=depth)
    return IrisPipeline(model, space, latent, options, SIZE)


def with_text(encoder):
    """A pipeline around a text encoder."""
    space = build_latent("haar", levels=1)
    generator = wake(initialise(Generator(small_config(channels=space.channels, text_width=encoder.width)), 0))
    return IrisPipeline(TextToLatent(encoder, generator), space, "haar", {"levels": 1}, SIZE)


def difference(one, other):
    return (one.int() - other.int()).abs().max().item()


def images_of(folder):
    """What the pipeline saved in ``folder`` makes."""
    return IrisPipeline.from_pretrained(folder).generate(CAPTIONS, SETTINGS)


def draws(seed):
    return torch.Generator().manual_seed(seed)


def latents_of(pipeline, prompt=PROMPT, **arguments):
    return pipeline(prompt, **{"output_type": "latent"} | arguments).images


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and a hub cache of its own."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_images_are_uint8_and_repeat(sampler, guidance):
    settings = SamplingSettings(steps=2, sampler=sampler, guidance=guidance)
    images = make().generate(CAPTIONS, settings, seed=1)
    assert images.dtype == torch.uint8 and images.shape == (4, SIZE, SIZE, 3)
    assert images.float().std() > 10
    assert torch.equal(make().generate(CAPTIONS, settings, seed=1), images)
    assert not torch.equal(make().generate(CAPTIONS, settings, seed=2), images)


@pytest.mark.parametrize("sampler", ["euler", "stochastic"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_an_image_does_not_depend_on_the_batch_size(batch, sampler):
    pipeline, settings = make(), SamplingSettings(steps=3, guidance=2.0, sampler=sampler)
    whole = pipeline.generate(CAPTIONS, settings)
    assert difference(pipeline.generate(CAPTIONS, settings, batch=batch), whole) <= 1  # sums in another order
    later = pipeline.generate(CAPTIONS[2:], settings, first=2)
    assert difference(later, whole[2:]) <= 1
    assert difference(pipeline.generate(CAPTIONS[2:], settings), whole[2:]) > 10


def test_captions_guidance_and_iterations_matter():
    pipeline = make()
    images = pipeline.generate(CAPTIONS, SETTINGS)
    assert difference(pipeline.generate(CAPTIONS[::-1], SETTINGS), images) > 1
    for changes in (
        {"guidance": 1.0},
        {"iterations": 5},
        {"steps": 4},
        {"shift": 3.0},
        {"sampler": "heun"},
        {"guidance_end": 0.5},
        {"guidance_start": 0.5},
        {"guidance_rescale": 0.7},
    ):
        settings = SamplingSettings(**({"steps": 3, "guidance": 2.0} | changes))
        assert difference(pipeline.generate(CAPTIONS, settings), images) > 1, changes


def test_guidance_extrapolates_from_the_empty_caption():
    """One Euler step from noise lands at noise - v, with v = v(empty) + guidance (v(caption) - v(empty))."""
    pipeline, guidance = make(), 2.5
    torch.nn.init.normal_(pipeline.model.generator.output.weight, std=0.02, generator=draws(0))
    images = pipeline.generate(CAPTIONS[:1], SamplingSettings(steps=1, guidance=guidance))
    noise = image_noise(0, 0, 1, (12, 4, 4))
    with torch.no_grad():
        text, empty = (
            pipeline.model(noise, torch.ones(1), pipeline.model.text.tokenise([caption]))
            for caption in (CAPTIONS[0], "")
        )
        expected = pipeline.latent.decode(noise - (empty + guidance * (text - empty)))
    expected = ((expected + 1) * 127.5).round().permute(0, 2, 3, 1)
    assert (images.float() - expected).abs().max() <= 1
    unguided = pipeline.generate(CAPTIONS[:1], SamplingSettings(steps=1))
    assert (images.float() - unguided.float()).abs().max() > 3


def by_hand(pipeline, noise, negative, steps, guidance, interval=(0.0, 1.0)):
    """Euler steps with each half of guidance evaluated alone, its state carried if the model's is."""
    model, carry = pipeline.model, pipeline.model.generator.config.depth.carry
    z, states = noise, {}
    for i in range(steps):
        t, following = 1 - i / steps, 1 - (i + 1) / steps
        inside = interval[0] <= t <= interval[1]
        velocity, before = {}, dict(states)
        for prompt in (PROMPT, negative) if inside else (PROMPT,):
            text = TextCondition(
                *(
                    part.to(z) if part.is_floating_point() else part
                    for part in model.text(model.text.tokenise([prompt]))
                )
            )
            carried = before.get(prompt, before.get(PROMPT)) if carry else None
            made = model.generator.evaluate(z, torch.full((1,), t), text, carried=carried)
            velocity[prompt], states[prompt] = made.velocity, made.state
        if not inside:
            states.pop(negative, None)
        v = velocity[PROMPT]
        if inside:
            v = velocity[negative] + guidance * (v - velocity[negative])
        z = z + (following - t) * v
    return z


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.6), (0.6, 1.0)], ids=str)
@torch.no_grad()
def test_a_call_is_its_steps_written_out(carry, interval):
    pipeline = make(depth=Depth(carry=carry)).to(torch.float64)
    noise = torch.randn(1, 12, 4, 4, dtype=torch.float64, generator=draws(0))
    start, end = interval
    got = latents_of(
        pipeline,
        latents=noise,
        num_inference_steps=5,
        guidance_scale=2.5,
        negative_prompt=CAPTIONS[1],
        guidance_start=start,
        guidance_end=end,
    )
    assert got.dtype == torch.float64
    expected = by_hand(pipeline, noise, CAPTIONS[1], 5, 2.5, interval)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # times are float32
    plain = make().to(torch.float64)
    assert carry == bool((by_hand(plain, noise, CAPTIONS[1], 5, 2.5, interval) - expected).abs().max() > 1e-2)


def test_the_carried_state_of_one_call_does_not_reach_the_next():
    pipeline = make(depth=Depth(carry=True))
    first, second = (latents_of(pipeline) for _ in range(2))
    assert torch.equal(first, second)


def test_noise_is_addressed_by_image_and_step():
    noise, later = addressed_noise(3), addressed_noise(3, first=1)
    assert torch.equal(noise((2, 1, 4, 4), None), image_noise(3, 0, 2, (1, 4, 4)))
    drawn = {step: noise((2, 1, 4, 4), step) for step in (None, 0, 1)}
    for step, values in drawn.items():
        assert torch.equal(later((1, 1, 4, 4), step)[0], values[1])
    different = [values[row] for values in drawn.values() for row in range(2)]
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(different) for b in different[:i])


@pytest.mark.parametrize(("sampler", "guidance", "count"), [("euler", 1.0, 4), ("heun", 1.0, 7), ("midpoint", 2.0, 16)])
def test_evaluations(sampler, guidance, count):
    assert SamplingSettings(4, sampler, guidance).evaluations == count


def test_evaluations_within_an_interval_are_those_made():
    settings = SamplingSettings(4, guidance=2.0, guidance_end=0.5)
    pipeline, rows = make(), []
    pipeline.model.generator.input.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    pipeline.generate([PROMPT], settings)
    assert rows == [1, 1, 2, 2] and settings.evaluations == sum(rows)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sampler": "ddim"}, "ddim.*euler"),
        ({"steps": 0}, "steps=0"),
        ({"shift": 0.0}, "shift=0"),
        ({"iterations": 0}, "iterations=0"),
        ({"guidance": -1.0}, "guidance=-1"),
        ({"guidance_start": 0.9, "guidance_end": 0.1}, "guidance_start=0.9"),
        ({"guidance_rescale": 2.0}, "rescale=2"),
    ],
)
def test_settings_that_cannot_be_used_are_named(changes, named):
    with pytest.raises(SettingError, match=named):
        SamplingSettings(**{"steps": 2} | changes)


class TestCall:
    """What users of diffusers' pipelines expect."""

    def test_forms_of_output(self):
        pipeline = make()
        arguments = {"num_inference_steps": 3, "guidance_scale": 2.0}
        pictures = pipeline(CAPTIONS, **arguments).images
        assert all(isinstance(picture, Image.Image) and picture.size == (SIZE, SIZE) for picture in pictures)
        stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
        assert torch.equal(stacked, pipeline.generate(CAPTIONS, SETTINGS))
        tensor, array, latents = (
            pipeline(CAPTIONS, **arguments, output_type=kind).images for kind in ("pt", "np", "latent")
        )
        assert tensor.shape == (4, 3, SIZE, SIZE) and 0 <= tensor.min() < 0.2 and 0.8 < tensor.max() <= 1
        assert isinstance(array, np.ndarray) and np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
        assert torch.equal((tensor * 255).round().byte().permute(0, 2, 3, 1), stacked)
        assert latents.shape == (4, 12, 4, 4)
        assert torch.equal(to_pixels(pipeline.latent.decode(latents)), stacked)
        assert pipeline(CAPTIONS, **arguments)[0][0].tobytes() == pictures[0].tobytes()  # as a tuple, too

    def test_latents_may_be_gone_on_with(self):
        latents = latents_of(make())
        assert latents.clone().requires_grad_(True).square().sum().requires_grad  # no inference tensor

    def test_prompts_and_images_for_each(self):
        pipeline = make()
        noise = image_noise(0, 0, 4, (12, 4, 4))
        both = latents_of(pipeline, CAPTIONS[:2], num_images_per_prompt=2, latents=noise)
        for row in range(4):
            alone = latents_of(pipeline, CAPTIONS[row // 2], latents=noise[row : row + 1])
            torch.testing.assert_close(both[row], alone[0], rtol=1e-4, atol=1e-4)
        assert (both[0] - latents_of(pipeline, CAPTIONS[1], latents=noise[:1])).abs().max() > 0.1

    def test_the_negative_prompt_takes_the_place_of_the_empty_one(self):
        pipeline = make()
        plain, empty, negative = (latents_of(pipeline, negative_prompt=text) for text in (None, "", CAPTIONS[2]))
        assert torch.equal(plain, empty)
        assert (plain - negative).abs().max() > 0.1
        # Guidance 0 leaves the negative prompt alone.
        alone = latents_of(pipeline, CAPTIONS[2], guidance_scale=1.0)
        none = latents_of(pipeline, negative_prompt=CAPTIONS[2], guidance_scale=0.0)
        torch.testing.assert_close(none, alone, rtol=1e-4, atol=1e-4)
        each = latents_of(pipeline, CAPTIONS[:2], negative_prompt=["", CAPTIONS[2]])
        torch.testing.assert_close(each[0], plain[0], rtol=1e-4, atol=1e-4)
        without = latents_of(pipeline, guidance_scale=1.0)
        assert torch.equal(latents_of(pipeline, guidance_scale=1.0, negative_prompt=CAPTIONS[2]), without)

    @pytest.mark.parametrize("sampler", ["euler", "stochastic"])
    def test_a_generator_decides(self, sampler):
        pipeline = make()
        first, again, other = (latents_of(pipeline, generator=draws(seed), sampler=sampler) for seed in (3, 3, 4))
        assert torch.equal(first, again) and not torch.equal(first, other)
        source = draws(3)
        one, two = (latents_of(pipeline, generator=source, sampler=sampler) for _ in range(2))
        assert torch.equal(one, first) and not torch.equal(two, first)  # it moves on, as in diffusers

    def test_its_noise_is_torchs(self):
        noise = torch.randn(1, 12, 4, 4, generator=draws(3))
        pipeline = make()
        assert torch.equal(latents_of(pipeline, latents=noise), latents_of(pipeline, generator=draws(3)))

    def test_without_a_generator_the_seed_decides(self):
        pipeline = make()
        assert torch.equal(latents_of(pipeline), latents_of(pipeline, seed=0))
        assert not torch.equal(latents_of(pipeline), latents_of(pipeline, seed=1))

    def test_any_multiple_of_the_factor(self):
        pipeline = make(levels=2)
        assert pipeline(PROMPT, height=4, width=20).images[0].size == (20, 4)
        assert pipeline(PROMPT, height=12).images[0].size == (SIZE, 12)

    def test_steps_are_reported_and_latents_replaced(self):
        pipeline, seen = make(), []

        def callback(pipe, step, t, kwargs):
            seen.append((pipe, step, round(float(t), 4), kwargs["latents"].shape))
            return {"latents": torch.zeros_like(kwargs["latents"])} if step == 2 else None

        latents = latents_of(pipeline, callback_on_step_end=callback, num_inference_steps=3, shift=2.0)
        times = [round(float(t), 4) for t in time_grid(3, 2.0)]
        assert seen == [(pipeline, step, times[step], (1, 12, 4, 4)) for step in range(3)]
        assert latents.abs().max() == 0

    def test_half_precision_keeps_latents_in_float32(self):
        pipeline = make()
        exact = latents_of(pipeline)
        assert pipeline.to(torch.bfloat16) is pipeline and pipeline.dtype == torch.bfloat16
        rough = latents_of(pipeline)
        assert rough.dtype == torch.float32 and 0 < (rough - exact).abs().max() < 0.1 * exact.abs().max()
        assert pipeline(PROMPT, output_type="pt").images.isfinite().all()

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({"output_type": "jpg"}, "output_type='jpg'.*pil"),
            ({"num_inference_steps": 0}, "steps=0"),
            ({"num_iterations": 0}, "iterations=0"),
            ({"height": 7}, "height=7.*multiple of 2"),
            ({"width": 0}, "width=0"),
            ({"latents": torch.zeros(1, 3, 4, 4)}, r"latents must be \[1, 12, 4, 4\]"),
            ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
            ({"prompt": []}, "prompt must be"),
            ({"prompt": [1]}, "prompt must be"),
            ({"negative_prompt": ["a", "b"]}, "negative_prompt: 2 texts for 1"),
            ({"strength": 0.5}, "strength needs an image"),
            ({"mask_image": np.ones((8, 8))}, "mask_image needs an"),
        ],
    )
    def test_what_cannot_be_used_is_named(self, arguments, named):
        with pytest.raises(SettingError, match=named):
            make()(**{"prompt": PROMPT} | arguments)


class TestOwnSampling:
    """A model is sampled as its folder says, unless a call says otherwise."""

    @pytest.fixture
    def student(self, tmp_path):
        """A saved student with guidance 2.5 in its weights, loaded."""
        IrisPipeline(*make().parts[:5], OWN, 2.5).save(tmp_path / "student")
        return IrisPipeline.from_pretrained(tmp_path / "student")

    def test_a_call_without_arguments_is_the_students_own(self, student):
        images, explicit = latents_of(student), latents_of(student, **EXPLICIT)
        assert torch.equal(images, explicit)
        for argument in EXPLICIT.keys() - {"guidance_scale"}:
            others = {name: value for name, value in EXPLICIT.items() if name != argument}
            assert not torch.equal(latents_of(make(), **others), explicit), argument
        assert torch.equal(student.generate(CAPTIONS), student.generate(CAPTIONS, OWN))

    def test_what_is_given_counts(self, student):
        assert student.sampling_settings(steps=1, iterations=3) == SamplingSettings(
            1, "stochastic", shift=3.0, iterations=3
        )
        images = latents_of(student, num_inference_steps=1, num_iterations=3)
        assert torch.equal(images, latents_of(student, **EXPLICIT | {"num_inference_steps": 1}, num_iterations=3))
        assert not torch.equal(images, latents_of(student))

    def test_it_is_saved_again(self, student, tmp_path):
        assert (student.sampling, student.distilled_guidance) == (OWN, 2.5)
        student.save(tmp_path / "again")
        assert (tmp_path / "again" / CONFIG).read_bytes() == (tmp_path / "student" / CONFIG).read_bytes()

    def test_guidance_of_a_student_is_refused_with_the_reason(self, student):
        why = "sample.guidance=3.0: this model is a student with guidance 2.5 distilled into its weights.*allowed: 1"
        photo = np.zeros((SIZE, SIZE, 3))
        for call in (
            lambda: student(PROMPT, guidance_scale=3.0),
            lambda: student.generate(CAPTIONS, SamplingSettings(2, guidance=3.0)),
            lambda: student.edit(photo, PROMPT, PROMPT, guidance_scale=3.0, sampler="euler"),
        ):
            with pytest.raises(SettingError, match=why):
                call()

    def test_a_consistency_student_has_no_way_back(self, student):
        with pytest.raises(SettingError, match="stochastic.*cannot be reversed"):
            student.edit(np.zeros((SIZE, SIZE, 3)), PROMPT, PROMPT)

    def test_a_model_that_says_nothing_takes_four_guided_steps(self, tmp_path):
        pipeline = make()
        explicit = {"num_inference_steps": 4, "guidance_scale": 3.0, "sampler": "euler", "shift": 1.0}
        assert torch.equal(latents_of(pipeline), latents_of(pipeline, **explicit))
        pipeline.save(tmp_path)
        assert not {"sampling", "distilled_guidance"} & json.loads((tmp_path / CONFIG).read_text()).keys()

    @pytest.mark.parametrize(
        ("sampling", "named"),
        [({"steps": 0}, "steps=0"), ({"steps": 2, "magic": 1}, "sampling=.*magic"), (4, "sampling=4")],
    )
    def test_an_entry_that_cannot_be_used_is_refused(self, student, sampling, named, tmp_path):
        config = json.loads((tmp_path / "student" / CONFIG).read_text())
        (tmp_path / "student" / CONFIG).write_text(json.dumps(config | {"sampling": sampling}))
        with pytest.raises(SettingError, match=f"model={tmp_path}.*{named}"):
            IrisPipeline.from_pretrained(tmp_path / "student")


@pytest.mark.parametrize(
    ("latent", "options"),
    [("haar", {"levels": 1}), ("haar", {"levels": 2}), ("wavelet_vae", {"channels": 4, "width": 8})],
)
@pytest.mark.parametrize("mixer", ["grfm", "attention", "grfm[fourier,spatial]"])
def test_save_and_load_give_the_same_images(latent, options, mixer, tmp_path):
    pipeline = make(latent, mixer, **options)
    pipeline.save(tmp_path / "model")
    loaded = IrisPipeline.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.generate(CAPTIONS, SETTINGS), pipeline.generate(CAPTIONS, SETTINGS))
    loaded.save(tmp_path / "again")
    for name in (CONFIG, WEIGHTS, LATENT_WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_save_pretrained_adds_a_card(tmp_path):
    pipeline = make()
    pipeline.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS, LATENT_WEIGHTS, "README.md"}
    data = huggingface_hub.ModelCard(card).data
    assert data.library_name == "iris" and data.pipeline_tag == "text-to-image" and data.license == "apache-2.0"
    count = sum(p.numel() for p in pipeline.model.generator.parameters())
    assert f"| generator | grfm, dim 16 | {count:,} |" in card and "IrisPipeline.from_pretrained(" in card
    loaded = IrisPipeline.from_pretrained(str(tmp_path), torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and loaded.size == SIZE


@pytest.fixture
def uploaded(monkeypatch):
    """What would have gone to the hub: repository -> path -> content."""
    sent = {}

    def upload_folder(api, *, repo_id, folder_path, **rest):
        files = [path for path in folder_path.rglob("*") if path.is_file()]
        sent[repo_id] = {str(path.relative_to(folder_path)): path.read_bytes() for path in files}
        return "url of the commit"

    def create_repo(api, repo_id, **rest):
        return huggingface_hub.RepoUrl(f"https://hf.co/{repo_id}")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return sent


def test_pushing_uploads_what_is_saved(tmp_path, uploaded):
    pipeline = make()
    assert pipeline.push_to_hub("someone/shapes", private=True) == "url of the commit"
    files = uploaded["someone/shapes"]
    assert 'from_pretrained("someone/shapes")' in files["README.md"].decode()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(images_of(tmp_path), pipeline.generate(CAPTIONS, SETTINGS))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_labels_as_text(guidance, tmp_path):
    pipeline = with_text(initialise(ClassLabels(["cat", "dog"], 12), 0))
    arguments = {"guidance_scale": guidance, "num_inference_steps": 2}
    images = latents_of(pipeline, ["dog", "cat"], **arguments)
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(latents_of(IrisPipeline.from_pretrained(tmp_path), ["dog", "cat"], **arguments), images)
    with pytest.raises(SettingError, match="'bird'.*cat, dog"):
        pipeline("bird")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of a small CLIP."""
    return save_clip(tmp_path_factory.mktemp("source") / "clip")


class TestClip:
    """A pretrained text encoder is named by default and copied on demand."""

    def test_by_reference(self, source, tmp_path, offline):
        pipeline = with_text(CLIPText(source))
        images = latents_of(pipeline, ["red", "red", "cir"])
        assert not torch.equal(images[0], images[1])  # one encoding, different noise
        pipeline.save(tmp_path / "model")
        assert {path.name for path in (tmp_path / "model").iterdir()} == {CONFIG, WEIGHTS, LATENT_WEIGHTS}
        config = json.loads((tmp_path / "model" / CONFIG).read_text())["text"]
        assert config["name"] == "clip" and config["source"] == str(source)
        assert torch.equal(latents_of(IrisPipeline.from_pretrained(tmp_path / "model"), ["red", "red", "cir"]), images)
        source.rename(tmp_path / "moved")
        try:
            with pytest.raises(SettingError, match=f"model=.*text_source='{source}'"):
                IrisPipeline.from_pretrained(tmp_path / "model")
        finally:
            (tmp_path / "moved").rename(source)

    def test_copied(self, source, tmp_path, offline):
        pipeline = with_text(CLIPText(source))
        pipeline.save_pretrained(tmp_path / "model", include_text_encoder=True)
        assert (tmp_path / "model" / "text_encoder" / "model.safetensors").exists()
        assert (tmp_path / "model" / "tokenizer").is_dir()
        source.rename(tmp_path / "moved")
        try:
            (tmp_path / "model").rename(tmp_path / "elsewhere")
            loaded = IrisPipeline.from_pretrained(tmp_path / "elsewhere")
        finally:
            (tmp_path / "moved").rename(source)
        assert torch.equal(latents_of(loaded, ["red", "cir"]), latents_of(pipeline, ["red", "cir"]))
        pipeline.save_pretrained(tmp_path / "plain")
        assert not (tmp_path / "plain" / "text_encoder").exists()

    def test_pushed_with_a_local_text_encoder(self, source, uploaded):
        with_text(CLIPText(source)).push_to_hub("someone/shapes")
        files = set(uploaded["someone/shapes"])
        assert {"text_encoder/model.safetensors", "tokenizer/tokenizer.json", CONFIG, WEIGHTS, "README.md"} <= files

    def test_each_caption_is_encoded_once(self, source):
        pipeline, rows = with_text(CLIPText(source)), []
        pipeline.model.text.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
        latents_of(pipeline, ["red", "cir", "red"])
        assert rows == [3]  # red, cir and the empty caption
        assert pipeline.model.generator.config.text_width == CLIP_WIDTH


def test_a_pretrained_latent_is_named_and_not_copied(tmp_path, offline):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ).save_pretrained(tmp_path / "taesd")
    pipeline = make("pretrained", source=str(tmp_path / "taesd"))
    pipeline.save(tmp_path / "model")
    assert set(load_tensors(tmp_path / "model" / LATENT_WEIGHTS)[0]) == {"mean", "std"}
    assert torch.equal(images_of(tmp_path / "model"), pipeline.generate(CAPTIONS, SETTINGS))
    with pytest.raises(SettingError, match="latent.source=.*taesd is a folder of this machine"):
        pipeline.push_to_hub("someone/shapes")
    (tmp_path / "taesd").rename(tmp_path / "moved")
    with pytest.raises(SettingError, match="model=.*latent.source=.*taesd"):
        IrisPipeline.from_pretrained(tmp_path / "model")


def test_a_folder_of_an_earlier_version_is_read(tmp_path):
    """Before there were other text encoders, mixer options and depth settings, config.json named none."""
    pipeline = make()
    pipeline.save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    del config["generator"]["mixers"], config["generator"]["depth"], config["text"]["name"]
    assert set(config["text"]) == {"words", "length", "width", "layers", "heads"}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert torch.equal(images_of(tmp_path), pipeline.generate(CAPTIONS, SETTINGS))


@pytest.mark.parametrize("name", ["someone/model", "model"])
def test_a_hub_name_that_cannot_be_had_is_told_at_once(name, offline):
    started = time.monotonic()
    with pytest.raises(SettingError, match=f"model='{name}'.*HF_HUB_OFFLINE"):
        IrisPipeline.from_pretrained(name)
    assert time.monotonic() - started < 5


def test_a_hub_that_does_not_answer_leaves_the_cache(monkeypatch, tmp_path):
    def no_answer(api, *arguments, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_answer)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    snapshot = tmp_path / "models--someone--shapes" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    reference = snapshot.parents[1] / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text(snapshot.name)
    pipeline = make()
    pipeline.save(snapshot)
    loaded = IrisPipeline.from_pretrained("someone/shapes", cache_dir=tmp_path)
    assert torch.equal(loaded.generate(CAPTIONS, SETTINGS), pipeline.generate(CAPTIONS, SETTINGS))
    with pytest.raises(SettingError, match="someone/other.*no route"):
        IrisPipeline.from_pretrained("someone/other", cache_dir=tmp_path)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, LATENT_WEIGHTS])
def test_a_missing_file_is_named(name, tmp_path):
    make().save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(SettingError, match=f"{name} is missing"):
        IrisPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("path", ["nowhere", "a/path/nowhere", "./nowhere"])
def test_a_missing_folder_is_named(path, tmp_path):
    with pytest.raises(SettingError, match="nowhere"):
        IrisPipeline.from_pretrained(tmp_path / path if path == "nowhere" else path)


@pytest.mark.parametrize("name", [WEIGHTS, LATENT_WEIGHTS])
def test_truncated_weights_are_refused(name, tmp_path):
    make().save(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-5])
    with pytest.raises(SettingError, match=name):
        IrisPipeline.from_pretrained(tmp_path)


def test_a_missing_statistic_of_the_latent_is_refused(tmp_path):
    pipeline = make()
    pipeline.save(tmp_path)
    save_tensors(tmp_path / LATENT_WEIGHTS, {"mean": pipeline.latent.mean}, {})
    with pytest.raises(SettingError, match="(?s)model=.*std"):
        IrisPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["", '{"generator": ', "{}", "[]", '{"text": 1}'])
def test_an_unreadable_configuration_is_refused(content, tmp_path):
    make().save(tmp_path)
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(SettingError, match=CONFIG):
        IrisPipeline.from_pretrained(tmp_path)


def test_an_unknown_part_is_named(tmp_path):
    make().save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["generator"]["mixer"] = "telepathy"
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(SettingError, match=f"model={tmp_path}.*telepathy"):
        IrisPipeline.from_pretrained(tmp_path)


def test_heads_of_the_text_encoder_are_saved(tmp_path):
    pipeline = make()
    encoder = WordEncoder(pipeline.model.text.vocabulary, pipeline.model.text.width, layers=1, heads=2)
    encoder.load_state_dict(pipeline.model.text.state_dict())
    other = IrisPipeline(TextToLatent(encoder, pipeline.model.generator), pipeline.latent, "haar", {"levels": 1}, SIZE)
    other.save(tmp_path)
    numbers = encoder.tokenise(CAPTIONS)
    loaded = IrisPipeline.from_pretrained(tmp_path).model.text
    torch.testing.assert_close(loaded(numbers).pooled, encoder(numbers).pooled)


def test_weights_of_another_model_are_refused(tmp_path):
    make().save(tmp_path / "a")
    make(mixer="attention").save(tmp_path / "b")
    (tmp_path / "a" / WEIGHTS).write_bytes((tmp_path / "b" / WEIGHTS).read_bytes())
    with pytest.raises(SettingError, match="model="):
        IrisPipeline.from_pretrained(tmp_path / "a")
