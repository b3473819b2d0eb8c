"""A saved model of IRIS: how it is sampled, what it is known by, and which captions it reads."""

import json
import shutil

import pytest
import torch
from evaluations import SHIPPED
from small_clip import save_clip

from eval.subjects import Sample, open_subject
from iris.diffusion.sampling import SamplingSettings
from iris.errors import SettingError
from iris.latents import build_latent
from iris.model import TextToLatent
from iris.nn.generator import Generator, GeneratorConfig
from iris.pipeline import IrisPipeline
from iris.text import ClassLabels, CLIPText

SHAPE = {
    "dim": 16,
    "heads": 2,
    "prelude": 1,
    "core": 1,
    "coda": 1,
    "iterations": 1,
    "ffn_ratio": 2.0,
    "mixer": "identity",
}


def opened(place, kind=None, **sample):
    return open_subject(str(place), kind, Sample(**sample), "float32", "cpu")


# -- how it is sampled ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The shipped model's weights as those of a consistency student."""
    folder = tmp_path_factory.mktemp("student")
    IrisPipeline(*IrisPipeline.from_pretrained(SHIPPED).parts[:5], SamplingSettings(2, "stochastic"), 2.5).save(folder)
    return folder


def test_a_student_makes_the_images_of_its_own_sampling(student):
    subject = opened(student)
    assert subject.settings == SamplingSettings(2, "stochastic") and subject.sampling["guidance"] == 1
    captions = ["a red circle", "a blue square"]
    assert torch.equal(subject.generate(captions, 0, 0), IrisPipeline.from_pretrained(student).generate(captions))
    assert subject.loader("a red circle").argument["sampler"] == "stochastic"
    assert opened(student, steps=1).settings == SamplingSettings(1, "stochastic")


def test_guidance_of_a_student_is_refused(student):
    with pytest.raises(SettingError, match="sample.guidance=3.*guidance 2.5 distilled into its weights"):
        opened(student, guidance=3.0)


def test_a_model_that_says_nothing_takes_four_guided_steps():
    assert opened(SHIPPED).settings == SamplingSettings(4, guidance=3.0)


# -- what it is known by ----------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path):
    """A model whose CLIP and autoencoder lie in folders of their own, named by its config.json."""
    from diffusers import AutoencoderKL

    def save(seed):
        save_clip(tmp_path / "clip", seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            AutoencoderKL(
                block_out_channels=(8, 8),
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=4,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
            ).save_pretrained(tmp_path / "vae")

    save(0)
    text, latent = CLIPText(str(tmp_path / "clip")), build_latent("pretrained", source=str(tmp_path / "vae"))
    model = TextToLatent(text, Generator(GeneratorConfig(channels=4, text_width=16, **SHAPE)))
    IrisPipeline(model, latent, "pretrained", {"source": str(tmp_path / "vae")}, 16).save(tmp_path / "model")
    return save


def test_parts_that_lie_elsewhere_count_by_what_they_are(parts, tmp_path):
    def known():
        return opened(tmp_path / "model").fingerprint

    first = known()
    for part in ("clip", "vae"):  # where they lie does not count
        shutil.copytree(tmp_path / part, tmp_path / f"moved {part}")
    save_clip(tmp_path / "clip", seed=1)
    other = known()
    parts(1)
    assert len({first, other, known()}) == 3
    for name in ("clip", "vae"):
        shutil.rmtree(tmp_path / name)
        shutil.copytree(tmp_path / f"moved {name}", tmp_path / name)
    assert known() == first


def test_a_model_is_known_by_its_files_wherever_they_lie(tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "moved")
    assert opened(tmp_path / "moved").fingerprint == opened(SHIPPED).fingerprint
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    config["generator"]["iterations"] += 1
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config))
    assert opened(tmp_path / "moved").fingerprint != opened(SHIPPED).fingerprint


# -- captions ---------------------------------------------------------------------------------------------------------


def test_a_model_of_classes_reads_their_names_alone(tmp_path):
    model = TextToLatent(ClassLabels(["cat", "dog"], 8), Generator(GeneratorConfig(channels=12, text_width=8, **SHAPE)))
    IrisPipeline(model, build_latent("haar", levels=1), "haar", {"levels": 1}, 32).save(tmp_path)
    classes = opened(tmp_path)
    classes.check(["dog", "cat"])
    with pytest.raises(SettingError, match="not one of the 2 classes"):
        classes.check(["dog", "a dog"])
    assert classes.example() == "cat" and opened(SHIPPED).example() == "a picture"


# -- bad input --------------------------------------------------------------------------------------------------------


def test_what_is_no_saved_model_or_setting_of_it_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for place, kind, expected in (
        (tmp_path, None, "model.safetensors is missing; expected a folder written by save_pretrained"),
        (tmp_path.parent, "iris", "config.json is missing"),
    ):
        with pytest.raises(SettingError, match=expected):
            opened(place, kind)
    with pytest.raises(SettingError, match="sample.height means nothing for kind=iris; its settings: sample.steps"):
        opened(SHIPPED, height=64)
    with pytest.raises(SettingError, match="sample.sampler='ddim' is unknown; allowed: euler"):
        opened(SHIPPED, sampler="ddim")
