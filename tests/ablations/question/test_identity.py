"""What a key stands for: the same settings keep their keys, and as long as a stage's version stays they give the same numbers.

Where one of these numbers changes and is meant to, raise the ``version`` of the stage whose code changed and record the new
ones: results of before are then not taken for those of now.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planned import chain_from

from ablations.question.costs import EXAMPLE, example_task
from iris.pipeline import IrisPipeline
from iris.randomness import initialise
from iris.stages.flow import SAMPLING
from iris.stages.parts import latent_of, sampling_of
from iris.training.optimiser import Optimisers, OptimiserSettings
from iris.training.settings import Training
from iris.training.vae_task import VAETask

ROOT = Path(__file__).parents[3]
KEYS = {
    "data shapes, train": "data-afb071a3d9fe",
    "data shapes, validation": "data-178264ca7a53",
    "latent wavelet_vae": "latent-4051f3eec7d4",
    "encoded train": "encoded-6d0e1d0f4202",
    "encoded validation": "encoded-80aeb1c20655",
    "text": "text-7832bf75359a",
    "images": "images-aee780b659f1",
    "judge shapes: images": "features-db0cd9fcde2d",
    "judge shapes: real images of validation": "reference-040b87f5892f",
    "quality": "quality-b97745278f8a",
    "alignment": "alignment-299346b5c588",
    "images of held-out combinations": "images-bddf76c8ff1a",
    "skills": "skills-45515cee66e1",
}
TRIALS = {
    "grfm": "35f4dac9482a",
    "attention": "5a2bebcaf944",
    "fourier": "3aaf35416bc1",
    "recurrence": "8cbe4693415a",
    "spatial": "e8bedb486f9c",
}
LOSSES = {"grfm": 1.969679, "attention": 1.969826, "fourier": 1.969683, "recurrence": 1.969741, "spatial": 1.969749}
VAE_LOSS = 2.066497
PICTURE = [242.64, 186.79, 188.06]


def trained(task: Any, settings: Training, steps: int = 4) -> float:
    """The loss after a few steps."""
    torch.set_num_threads(1)
    optimisers = Optimisers(
        task.module, OptimiserSettings(settings.optimiser, settings.learning_rate, settings.weight_decay)
    )
    for step in range(steps):
        task.loss(step)[0].backward()
        optimisers.step(settings.learning_rate)
        task.module.zero_grad(set_to_none=True)
    return task.loss(steps)[0].item()


def test_the_stages_of_the_default_trial_keep_their_keys():
    assert {stage.label: stage.key for stage in chain_from().stages} == KEYS


def test_default_trials_keep_their_keys():
    assert {mixer: chain_from(f"model.mixer={mixer}").key for mixer in TRIALS} == TRIALS


@pytest.mark.parametrize("mixer", LOSSES)
def test_a_default_trial_trains_to_the_same_loss(mixer):
    settings = chain_from(f"model.mixer={mixer}").settings
    assert trained(example_task(settings, batch=8), settings.train) == pytest.approx(LOSSES[mixer], rel=1e-4)


def test_the_default_latent_trains_to_the_same_loss():
    settings = chain_from().settings
    latent = initialise(latent_of(settings), 0)
    pixels = torch.randint(0, 256, (16, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    task = VAETask(latent, pixels, 8, 0, settings.vae.kl_weight, settings.vae.detail_weight)
    assert trained(task, settings.vae) == pytest.approx(VAE_LOSS, rel=1e-3)


def test_the_default_sampling_makes_the_same_picture():
    pipeline = IrisPipeline.from_pretrained(ROOT / "iris" / "weights" / "shapes")
    image = pipeline.generate([EXAMPLE], sampling_of(chain_from().settings, SAMPLING), 0)[0]
    assert image.float().mean((0, 1)).tolist() == pytest.approx(PICTURE, rel=1e-2)
