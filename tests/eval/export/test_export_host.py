"""Text to image without PyTorch: the images are the pipeline's, by every sampler; the command, memory, what is refused."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_models import CAPTIONS, small_generator, small_pipeline
from PIL import Image

from eval.export.host import __main__ as command
from eval.export.host.pipeline import ExportedPipeline, size_of, unit_noise
from eval.export.host.sampling import SAMPLERS, Sampling
from eval.export.host.tokenise import load_tokeniser
from eval.export.measuring import load_for_measuring
from eval.export.model import export_model
from eval.speed.memory import measure_memory_by_part
from eval.speed.workers import Loader
from iris import IrisPipeline
from iris.diffusion import flow
from iris.diffusion.guidance import Guidance
from iris.diffusion.sampling import SamplingSettings, addressed_noise
from iris.errors import SettingError
from iris.latents import build_latent
from iris.model import TextToLatent
from iris.text import ClassLabels, Vocabulary, WordEncoder

pytestmark = pytest.mark.xdist_group("export_host")  # one worker: what the module's fixtures make is shared

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "iris" / "weights" / "shapes"
PROMPTS = [
    "a small red circle in the top left on a white background",
    "a large blue square in the centre",
    "the picture shows a green ring on a black background",
]
# Largest difference of a pixel, and root mean square over all, in 1/255. One rounding apart is 1.
TOLERANCES = {"fp32": (1, 0.05), "fp16": (8, 0.6), "int8": (64, 4.0)}
SETTINGS = [
    {"guidance": 1.0},
    {"sampler": "heun", "steps": 3, "shift": 3.0},
    {"sampler": "midpoint", "steps": 2, "guidance": 0.0},
    {"sampler": "stochastic", "steps": 3},
    {"guidance_start": 0.4, "guidance_end": 0.8},
    {"guidance": 4.0, "guidance_rescale": 0.7, "sampler": "heun"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The shipped model, exported for two images at a time in all precisions, each in a folder."""
    root = tmp_path_factory.mktemp("shipped")
    for dtype in TOLERANCES:
        export_model(SHIPPED, root / dtype, "onnx", dtype, batch=2)
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A pipeline that is quick to export, and its folder."""
    folder = tmp_path_factory.mktemp("small")
    pipeline = small_pipeline(mixer="identity", iterations=1)
    export_model(pipeline, folder, "onnx", "fp32", batch=2)
    return pipeline, folder


def torch_noise(seed, shape):
    """The pipeline's noise for the host."""
    return lambda rows, step: addressed_noise(seed, rows.start)((len(rows), *shape), step).numpy()


@pytest.mark.long
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_shipped_model_makes_the_same_images(folder, dtype):
    exported = ExportedPipeline(folder / dtype)
    expected = IrisPipeline.from_pretrained(SHIPPED).generate(PROMPTS, SamplingSettings(4, guidance=3.0), 5).numpy()
    found = exported(PROMPTS, Sampling(4, guidance=3.0), noise=torch_noise(5, exported.shape))
    assert found.shape == expected.shape == (3, 32, 32, 3) and found.dtype == np.uint8
    difference = found.astype(int) - expected
    largest, rms = TOLERANCES[dtype]
    assert np.abs(difference).max() <= largest and np.sqrt(np.square(difference).mean()) <= rms
    assert expected.std() > 20, "three plain images would agree whatever they show"


@pytest.mark.long
def test_smaller_dtypes_make_other_images(folder):
    """What agrees to the last bit was not computed in another precision."""
    images = [ExportedPipeline(folder / dtype)(PROMPTS) for dtype in TOLERANCES]
    assert (images[0] != images[1]).any() and (images[1] != images[2]).any()


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_sampling_is_the_pipelines(small, given, monkeypatch):
    """All of it: three images, by two at a time, before rounding to 8 bits."""
    monkeypatch.setattr("iris.pipeline.to_pixels", lambda images: images)
    pipeline, folder = small
    exported, sampling = ExportedPipeline(folder), Sampling(**given)
    settings = {name: value for name, value in dataclasses.asdict(sampling).items() if value is not None}
    expected = pipeline.generate(CAPTIONS[:3], SamplingSettings(**settings), seed=4, first=7).numpy()
    found = exported.images(CAPTIONS[:3], sampling, noise=torch_noise(4, exported.shape), first=7)
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)
    assert sampling.evaluations == SamplingSettings(**settings).evaluations
    plain = exported.images(CAPTIONS[:3], noise=torch_noise(4, exported.shape), first=7)
    assert np.linalg.norm(found - plain) > 1e-2 * np.linalg.norm(plain), "the setting must change something"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_are_those_of_the_flow(sampler):
    """On a velocity that depends on latent and time, which no average of a model could hide."""
    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = flow.integrate(lambda z, t: z * t + z.sin(), z, flow.time_grid(5, 2.0), sampler, lambda step: z * step)
    settings = Sampling(5, sampler, shift=2.0)
    found = settings.follow(lambda z, t: z * t + np.sin(z), z.numpy(), lambda step: z.numpy() * step)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)
    assert set(SAMPLERS) == set(flow.SAMPLERS)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_guidance_is_that_of_the_flow(t, rescale):
    z, conditional, unconditional = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    guidance, t = Guidance(3.0, 0.2, 1.0, rescale), torch.tensor(t)
    expected = guidance.velocity(
        lambda z, t, both: torch.cat([conditional, unconditional]) if both else conditional, z, t
    )
    sampling, time = Sampling(guidance=3.0, guidance_start=0.2, guidance_rescale=rescale), np.float32(t)
    assert sampling.active(time) == guidance.active(t)
    found = conditional.numpy()
    if sampling.active(time):
        found = sampling.guide(found, unconditional.numpy(), z.numpy(), time)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_defaults_are_the_pipelines():
    assert vars(Sampling()) == vars(SamplingSettings.resolved(None))
    assert [field.name for field in dataclasses.fields(Sampling)] == [
        field.name for field in dataclasses.fields(SamplingSettings)
    ]


def test_a_negative_prompt_is_what_guidance_leads_away_from(small):
    pipeline, folder = small
    exported = ExportedPipeline(folder)
    noise = addressed_noise(0)((1, *exported.shape), None)
    expected = pipeline(CAPTIONS[0], 2, negative_prompt=CAPTIONS[1], latents=noise, output_type="pt").images.numpy()
    made = exported.images(CAPTIONS[:1], Sampling(2), negative=CAPTIONS[1], noise=lambda rows, step: noise)
    np.testing.assert_allclose((made + 1) / 2, expected, atol=1e-5)


def test_an_image_depends_on_its_noise_and_number_alone(small):
    exported = ExportedPipeline(small[1])
    noise = unit_noise(exported.shape, 4)
    whole = exported(CAPTIONS[:3], noise=noise)
    assert whole.shape == (3, 16, 16, 3)
    np.testing.assert_array_equal(exported(CAPTIONS[1:3], noise=noise, first=1), whole[1:])
    assert (exported(CAPTIONS[:3], noise=unit_noise(exported.shape, 5)) != whole).any()


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (4, 1.0), (7, 3.0)])
def test_times_are_the_pipelines(steps, shift):
    expected = flow.time_grid(steps, shift).numpy()
    np.testing.assert_allclose(Sampling(steps, shift=shift).times(), expected, rtol=0, atol=2e-7)


STRANGE = ["", "A RED, circle!", "unknown words 7", "a " * 50, "red\tcircle\nblue"]


def test_words_are_tokenised_as_the_encoder_does():
    encoder = WordEncoder(Vocabulary.from_captions(CAPTIONS, 6), 12)
    tokenise = load_tokeniser(encoder.to_dict(), Path())
    np.testing.assert_array_equal(tokenise(CAPTIONS + STRANGE), encoder.tokenise(CAPTIONS + STRANGE).numpy())


def test_labels_are_tokenised_as_the_encoder_does():
    encoder = ClassLabels(CAPTIONS, 12)
    tokenise = load_tokeniser(encoder.to_dict(), Path())
    np.testing.assert_array_equal(tokenise(["", *CAPTIONS]), encoder.tokenise(["", *CAPTIONS]).numpy())
    with pytest.raises(SettingError, match="'a dog' is not one of the 4 classes"):
        tokenise(["a dog"])


@pytest.mark.long
def test_a_clip_is_exported_with_its_words(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    from iris.text import CLIPText

    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    words = [*letters, "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=9,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPTextModel(config).save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "clip" / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    encoder = CLIPText(str(tmp_path / "clip"))
    latent = build_latent("haar")
    generator = small_generator(latent.channels, mixer="identity", iterations=1)
    pipeline = IrisPipeline(TextToLatent(encoder, generator), latent, "haar", {}, 16)
    export_model(pipeline, tmp_path / "out", "onnx", "fp32", batch=1)
    exported = ExportedPipeline(tmp_path / "out")
    captions = ["a red circle", "", "red " * 20]
    np.testing.assert_array_equal(exported.tokenise(captions), encoder.tokenise(captions).numpy())
    expected = pipeline.generate(captions, SamplingSettings(2, guidance=3.0), seed=1).numpy()
    found = exported(captions, Sampling(2), noise=torch_noise(1, exported.shape))
    assert np.abs(found.astype(int) - expected).max() <= 1


def python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_it_never_imports_pytorch(small):
    """And the runtime before it loads anything, as the memory of imports is told apart."""
    script = (
        "import sys; from eval.export.measuring import load_for_measuring as load; "
        f"given = {{'folder': {str(small[1])!r}}}; load.imports(given); print('onnxruntime' in sys.modules, end=' '); "
        "print(load(given)().shape, 'torch' in sys.modules)"
    )
    done = python("-c", script)
    assert done.stdout.strip() == "True (1, 16, 16, 3) False", done.stderr


def test_the_command_writes_an_image(small, tmp_path):
    out = tmp_path / "x.png"
    done = python("-m", "eval.export.host", str(small[1]), "a red circle", "--out", str(out), "--seed", "3")
    assert done.returncode == 0, done.stderr
    exported = ExportedPipeline(small[1])
    expected = exported(["a red circle"], noise=unit_noise(exported.shape, 3))[0]
    np.testing.assert_array_equal(np.asarray(Image.open(out)), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/nothing", "a circle"], "pipeline.json is not what export_model writes"),
        (["{folder}", "a circle", "--steps", "0"], "sample.steps=0 must be at least 1"),
        (["{folder}", "a circle", "--sampler", "ddim"], "sample.sampler='ddim' is unknown"),
        (["{folder}", "a circle", "--iterations", "3"], "exported with 1, which its onnx file fixes; allowed: 1"),
        (["{folder}", "a circle", "--threads", "0"], "threads=0 must be at least 1"),
        (["{folder}", "a circle", "--seed", "-1"], "argument --seed: -1 must be at least 0"),
        (["{folder}", "a circle", "--out", "/nowhere/x.png"], "argument --out: /nowhere/x.png cannot be written"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(small, arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([argument.format(folder=small[1]) for argument in arguments])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guidance": float("inf")}, "sample.guidance=inf must be finite"),
        ({"shift": 0}, "sample.shift=0 must be finite and above 0"),
        ({"iterations": 0}, "sample.iterations=0 must be at least 1, or null"),
        ({"guidance_start": 0.5, "guidance_end": 0.4}, "sample.guidance_start=0.5 must be at least 0 and at most"),
        ({"guidance_end": 1.5}, "sample.guidance_end=1.5 must be at most 1"),
        ({"guidance_rescale": 2}, "sample.guidance_rescale=2 must be from 0 to 1"),
    ],
)
def test_numbers_outside_their_range_are_named(given, message):
    with pytest.raises(SettingError, match=message):
        Sampling(**given)


def test_a_call_says_what_it_cannot_use(small):
    exported = ExportedPipeline(small[1])
    for captions in ("a red circle", []):
        with pytest.raises(SettingError, match="captions must be a list"):
            exported(captions)
    with pytest.raises(SettingError, match=r"noise must be \[1, 48, 4, 4\], got \[1, 3, 4, 4\]"):
        exported(["a circle"], noise=lambda rows, step: np.zeros((1, 3, 4, 4)))
    with pytest.raises(SettingError, match="resident='some' is unknown; allowed: all, one part"):
        ExportedPipeline(small[1], resident="some")
    with pytest.raises(ValueError, match="the generator gave values that are not finite in fp32"):
        exported(["a circle"], noise=lambda rows, step: np.full((1, 48, 4, 4), np.nan))


def test_one_part_at_a_time_makes_the_same_images(small):
    exported = ExportedPipeline(small[1], resident="one part")
    np.testing.assert_array_equal(exported(["a circle"]), ExportedPipeline(small[1])(["a circle"]))
    assert list(exported._open) == ["decoder"], "each part must make room for the next"


def test_memory_is_measured_in_a_process_without_pytorch(small):
    parts = measure_memory_by_part(Loader("eval.export.measuring:load_for_measuring", {"folder": str(small[1])}))
    assert list(parts) == ["whole", "text", "generator", "decoder"]
    for name, entry in ExportedPipeline(small[1]).about["parts"].items():
        assert parts[name].memory.weights_mb == pytest.approx(size_of(entry) / 1e6)
    whole = parts["whole"].memory
    assert whole.activations_mb is None and whole.device == "cpu"
    assert whole.import_mb < 200, "importing PyTorch takes more"
    assert whole.import_mb <= whole.loaded_mb <= whole.peak_memory_mb


def test_measuring_counts_the_runs_of_each_part(small):
    given = {"folder": str(small[1]), "steps": 3, "guidance_end": 0.5, "batch": 5}
    generate = load_for_measuring(given)
    assert {name: part.count for name, part in generate.parts.items()} == {
        "text": 3 + 1,  # of the empty caption, once
        "generator": 3 * (3 + 1),  # of three steps, one is guided
        "decoder": 3,
    }
    assert generate().shape == (5, 16, 16, 3)
    for name, part in generate.parts.items():
        alone = load_for_measuring(given | {"part": name})
        assert alone.weights_bytes == part.weights_bytes and alone.count == part.count
    assert generate.parts["generator"]().shape == (2, 48, 4, 4)
    assert load_for_measuring(given | {"resident": "one part"})().shape == (5, 16, 16, 3)


def test_measuring_refuses_an_unknown_name(small):
    with pytest.raises(SettingError, match="the loader's argument='seed' is unknown"):
        load_for_measuring({"folder": str(small[1]), "seed": 1})
    with pytest.raises(SettingError, match="part='mixer' is unknown; allowed: text, generator, decoder"):
        load_for_measuring({"folder": str(small[1]), "part": "mixer"})
