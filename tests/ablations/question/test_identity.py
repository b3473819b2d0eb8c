"""What a key stands for: the same settings keep their key, and as long as RESULTS_VERSION stays, they give the same numbers.

Where one of these numbers changes and is meant to, raise ``ablations.question.grid.RESULTS_VERSION`` and record the new ones: results
of before are then not taken for those of now.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ablations.trial.model import build_latent_of, sampling_of
from test_grid import settings_from

from ablations.question.grid import RESULTS_VERSION
from ablations.question.plan import Plan, _example, make_plan
from iris.pipeline import IrisPipeline
from iris.randomness import initialise
from iris.training.optimiser import Optimisers, OptimiserSettings
from iris.training.vae_task import VAETask

ROOT = Path(__file__).parents[3]
KEYS = {
    "grfm": "491cb04250dc",
    "attention": "6e36f7761cee",
    "fourier": "c408b32b4c80",
    "recurrence": "52dea8b62a61",
    "spatial": "f83edc0f27b7",
}
LOSSES = {"grfm": 1.969679, "attention": 1.969826, "fourier": 1.969683, "recurrence": 1.969741, "spatial": 1.969749}
VAE_LOSS = 2.066497
PICTURE = [242.64, 186.79, 188.06]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(*settings_from("grid=mixers"))


def trained(task, settings: OptimiserSettings, steps: int = 4) -> float:
    """The loss after a few steps."""
    torch.set_num_threads(1)
    optimisers = Optimisers(task.module, settings)
    for step in range(steps):
        task.loss(step)[0].backward()
        optimisers.step(settings.learning_rate)
        task.module.zero_grad(set_to_none=True)
    return task.loss(steps)[0].item()


def test_the_default_trials_keep_their_keys(plan):
    assert RESULTS_VERSION == 1 and {trial.arm: trial.key for trial in plan.trials} == KEYS


@pytest.mark.parametrize("arm", KEYS)
def test_a_default_trial_trains_to_the_same_loss(plan, arm):
    settings = next(one.settings for one in plan.arms if one.name == arm)
    task = _example(settings, batch=8)
    train = settings["train"]
    loss = trained(task, OptimiserSettings(train["optimiser"], train["learning_rate"], train["weight_decay"]))
    assert loss == pytest.approx(LOSSES[arm], rel=1e-4)


def test_the_default_latent_trains_to_the_same_loss(plan):
    settings = plan.arms[0].settings
    latent, chosen = initialise(build_latent_of(settings), 0), settings["latent"]
    pixels = torch.randint(0, 256, (16, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    task = VAETask(latent, pixels, 8, chosen["seed"], chosen["kl_weight"], chosen["detail_weight"])
    assert trained(task, OptimiserSettings("adamw", chosen["learning_rate"])) == pytest.approx(VAE_LOSS, rel=1e-3)


def test_the_default_sampling_makes_the_same_picture(plan):
    pipeline = IrisPipeline.from_pretrained(ROOT / "iris" / "weights" / "shapes")
    image = pipeline.generate(
        ["a large red circle in the centre on a white background"], sampling_of(plan.arms[0].settings), 0
    )[0]
    assert image.float().mean((0, 1)).tolist() == pytest.approx(PICTURE, rel=1e-2)
