"""Text to image in ONNX Runtime without PyTorch: the shipped model's images, the command, memory, what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from eval.export.ort import OrtPipeline
from eval.export.pipeline import export_pipeline
from eval.export.tokenise import load_tokeniser
from exported_models import CAPTIONS, small_generator, small_pipeline
from PIL import Image

from eval.export import ort
from eval.speed.memory import measure_memory_by_part
from eval.speed.workers import Loader
from iris import IrisPipeline
from iris.diffusion.flow import time_grid
from iris.errors import SettingError
from iris.latents import build_latent
from iris.model import TextToLatent
from iris.text import ClassLabels, Vocabulary, WordEncoder

pytestmark = pytest.mark.xdist_group("onnx_pipeline")  # one worker: what the module's fixtures make is shared

ROOT = Path(__file__).parents[3]
PROMPTS = [
    "a small red circle in the top left on a white background",
    "a large blue square in the centre",
    "the picture shows a green ring on a black background",
]
# Largest difference of a pixel, and root mean square over all, in 1/255. One rounding apart is 1.
TOLERANCES = {"fp32": (1, 0.05), "fp16": (8, 0.6), "int8": (64, 4.0)}


@pytest.fixture(scope="module")
def shipped():
    return IrisPipeline.from_pretrained(ROOT / "iris" / "weights" / "shapes")


@pytest.fixture(scope="module")
def folder(shipped, tmp_path_factory):
    """The shipped model, exported for two images at a time in all dtypes."""
    folder = tmp_path_factory.mktemp("shipped")
    export_pipeline(shipped, folder, ("fp32", "fp16", "int8"), batch=2)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A pipeline that is quick to export, and its folder."""
    folder = tmp_path_factory.mktemp("small")
    pipeline = small_pipeline(mixer="identity", iterations=1)
    export_pipeline(pipeline, folder)
    return pipeline, folder


def noise_for(count, shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_shipped_model_makes_the_same_images(shipped, folder, dtype):
    exported = OrtPipeline(folder, dtype)
    noise = noise_for(3, exported.shape)
    expected = np.stack([np.asarray(i) for i in shipped(PROMPTS, 4, guidance_scale=3.0, latents=noise).images])
    found = exported(PROMPTS, 4, 3.0, noise=noise.numpy())
    assert found.shape == expected.shape == (3, 32, 32, 3) and found.dtype == np.uint8
    difference = found.astype(int) - expected
    largest, rms = TOLERANCES[dtype]
    assert np.abs(difference).max() <= largest and np.sqrt(np.square(difference).mean()) <= rms
    assert expected.std() > 20, "three plain images would agree whatever they show"


def test_smaller_dtypes_make_other_images(folder):
    """What agrees to the last bit was not computed in another precision."""
    images = [OrtPipeline(folder, dtype).generate(PROMPTS) for dtype in TOLERANCES]
    assert (images[0] != images[1]).any() and (images[1] != images[2]).any()


@pytest.mark.parametrize(
    "arguments",
    [
        {"guidance": 1.0},
        {"steps": 2, "guidance": 2.0, "negative": "a red circle"},
        {"shift": 3.0},
        {"guidance_start": 0.4, "guidance_end": 0.8},
    ],
)
def test_sampling_settings_are_the_pipelines(small, arguments):
    pipeline, folder = small
    exported = OrtPipeline(folder)
    noise = noise_for(2, exported.shape)
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale", "negative": "negative_prompt"}
    theirs = {"guidance_scale": 3.0} | {names.get(name, name): value for name, value in arguments.items()}
    expected = np.stack([np.asarray(i) for i in pipeline(CAPTIONS[:2], latents=noise, **theirs).images])
    found = exported(CAPTIONS[:2], noise=noise.numpy(), **arguments)
    assert np.abs(found.astype(int) - expected).max() <= 1
    plain = exported(CAPTIONS[:2], noise=noise.numpy())
    assert (found != plain).any(), "the setting must change something"


def test_an_image_depends_on_its_seed_and_number_alone(small):
    exported = OrtPipeline(small[1])
    whole = exported.generate(CAPTIONS[:3], seed=4)
    assert whole.shape == (3, 16, 16, 3)
    np.testing.assert_array_equal(exported.generate(CAPTIONS[1:3], seed=4, first=1), whole[1:])
    assert (exported.generate(CAPTIONS[:3], seed=5) != whole).any()


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (4, 1.0), (7, 3.0)])
def test_times_are_the_pipelines(steps, shift):
    np.testing.assert_allclose(ort.time_grid(steps, shift), time_grid(steps, shift).numpy(), rtol=0, atol=2e-7)


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
    export_pipeline(pipeline, tmp_path / "out")
    exported = OrtPipeline(tmp_path / "out")
    captions = ["a red circle", "", "red " * 20]
    np.testing.assert_array_equal(exported.tokenise(captions), encoder.tokenise(captions).numpy())
    noise = noise_for(3, exported.shape)
    expected = np.stack([np.asarray(i) for i in pipeline(captions, 2, latents=noise).images])
    assert np.abs(exported(captions, 2, noise=noise.numpy()).astype(int) - expected).max() <= 1


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
    script = (
        "import sys; from eval.export.ort_measuring import load_for_measuring; "
        f"print(load_for_measuring({{'folder': {str(small[1])!r}}})().shape, 'torch' in sys.modules)"
    )
    done = python("-c", script)
    assert done.stdout.strip() == "(1, 16, 16, 3) False", done.stderr


def test_the_command_writes_an_image(small, tmp_path):
    out = tmp_path / "x.png"
    done = python("-m", "eval.export.ort", str(small[1]), "a red circle", "--out", str(out), "--seed", "3")
    assert done.returncode == 0, done.stderr
    expected = OrtPipeline(small[1])(["a red circle"], seed=3)[0]
    np.testing.assert_array_equal(np.asarray(Image.open(out)), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}", "a circle", "--dtype", "int4"], "text.int4.onnx is missing; export it with dtypes=int4"),
        (["{folder}/nothing", "a circle"], "pipeline.json is not what export_pipeline writes"),
        (["{folder}", "a circle", "--steps", "0"], "steps=0 must be at least 1"),
        (["{folder}", "a circle", "--threads", "0"], "threads=0 must be at least 1"),
        (["{folder}", "a circle", "--seed", "-1"], "argument --seed: -1 must be at least 0"),
        (["{folder}", "a circle", "--out", "/nowhere/x.png"], "argument --out: /nowhere/x.png cannot be written"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(small, arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        ort.main([argument.format(folder=small[1]) for argument in arguments])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


def test_a_call_says_what_it_cannot_use(small):
    exported = OrtPipeline(small[1])
    with pytest.raises(SettingError, match="captions must be a list"):
        exported("a red circle")
    with pytest.raises(SettingError, match="captions must be a list"):
        exported([])
    with pytest.raises(SettingError, match=r"noise must be \[1, 48, 4, 4\], got \[1, 3, 4, 4\]"):
        exported(["a circle"], noise=np.zeros((1, 3, 4, 4)))


def test_a_broken_file_is_named(small, tmp_path):
    for file in small[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "decoder.fp32.onnx").write_bytes(b"not a graph")
    with pytest.raises(SettingError, match="decoder.fp32.onnx cannot be loaded"):
        OrtPipeline(tmp_path)


def test_one_part_at_a_time_makes_the_same_images(small):
    exported = OrtPipeline(small[1], keep=())
    np.testing.assert_array_equal(exported(["a circle"]), OrtPipeline(small[1])(["a circle"]))
    assert list(exported._sessions) == ["decoder"], "each part must make room for the next"
    kept = OrtPipeline(small[1], keep=("generator",))
    kept(["a circle"])
    assert set(kept._sessions) == {"generator", "decoder"}


def test_memory_is_measured_in_a_process_without_pytorch(small):
    parts = measure_memory_by_part(Loader("eval.export.ort_measuring:load_for_measuring", {"folder": str(small[1])}))
    assert list(parts) == ["whole", "text", "generator", "decoder"]
    exported = OrtPipeline(small[1])
    for name in ("text", "generator", "decoder"):
        assert parts[name].memory.weights_mb == pytest.approx(exported.weights_bytes(name) / 1e6)
    whole = parts["whole"].memory
    assert whole.activations_mb is None and whole.device == "cpu"
    assert whole.import_mb < 200, "importing PyTorch takes more"
    assert whole.import_mb <= whole.loaded_mb <= whole.peak_memory_mb


def test_measuring_refuses_an_unknown_name(small):
    from eval.export.ort_measuring import load_for_measuring

    with pytest.raises(SettingError, match="the loader's argument='seed' is unknown"):
        load_for_measuring({"folder": str(small[1]), "seed": 1})
    with pytest.raises(SettingError, match="part='mixer' is unknown; allowed: text, generator, decoder"):
        load_for_measuring({"folder": str(small[1]), "part": "mixer"})
    parts = load_for_measuring({"folder": str(small[1]), "steps": 3}).parts
    assert {name: part.count for name, part in parts.items()} == {"text": 1, "generator": 6, "decoder": 1}
