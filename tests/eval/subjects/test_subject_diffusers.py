"""A text-to-image pipeline of diffusers: what its images depend on, its parts, and what is no such pipeline."""

import json
import shutil

import pytest
from small_diffusers import SIZE, save_diffusers

from eval.subjects import Sample, open_subject
from eval.subjects.diffusers_measuring import load_for_measuring
from iris.errors import SettingError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_diffusers(tmp_path_factory.mktemp("diffusers") / "tiny-sd")


def opened(place, kind=None, **sample):
    return open_subject(str(place), kind, Sample(**sample), "float32", "cpu")


def test_every_value_of_its_sampling_is_resolved(folder):
    subject = opened(folder, steps=2)
    assert subject.size == (SIZE, SIZE) and opened(folder, height=16).size == (16, SIZE)
    names = {"pipeline": "StableDiffusionPipeline", "scheduler": "DDIMScheduler"}
    found = dict(subject.sampling)
    assert found.pop("diffusers") and found == names | {"steps": 2, "guidance": 7.5, "height": SIZE, "width": SIZE}


def test_its_images_depend_on_seed_and_number_alone(folder):
    captions = [f"a red circle {i}" for i in range(6)]
    whole = opened(folder, steps=1).generate(captions, 0, 0)
    part = opened(folder, steps=1, batch=2).generate(captions[3:], 0, 3)
    assert int((whole[3:].int() - part.int()).abs().max()) <= 1  # batch sizes round differently
    other = opened(folder, steps=1).generate(captions, 1, 0)
    assert float((whole.float() - other.float()).abs().mean()) > 1


def test_its_networks_are_its_parts(folder):
    loader = opened(folder, steps=3).loader("a red circle", parts=True)
    generate = load_for_measuring(loader.given(batch=2).argument)
    assert {name: part.count for name, part in generate.parts.items()} == {"text_encoder": 2, "unet": 3, "vae": 1}
    assert generate.weights_bytes == sum(part.weights_bytes for part in generate.parts.values())
    assert generate.parts["vae"]()[0].shape == (2, 3, SIZE, SIZE) and generate().shape == (2, SIZE, SIZE, 3)


def test_other_weights_are_another_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "moved")
    assert opened(tmp_path / "moved").fingerprint == opened(folder).fingerprint
    assert opened(save_diffusers(tmp_path / "other", seed=1)).fingerprint != opened(folder).fingerprint


def test_what_is_no_pipeline_or_setting_of_it_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    for place, kind, expected in (
        (tmp_path, None, "not a pipeline that diffusers can load"),
        ("owner/name", None, "kind=iris or kind=diffusers"),
        ("owner/name", "diffusers", "model=owner/name: neither a folder nor a pipeline"),
        (folder.parent, "diffusers", "model_index.json is missing"),
    ):
        with pytest.raises(SettingError, match=expected):
            opened(place, kind)
    with pytest.raises(
        SettingError, match="sample.sampler means nothing for kind=diffusers; its settings: sample.steps"
    ):
        opened(folder, sampler="euler")
