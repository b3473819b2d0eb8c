"""What ``iris`` exports: each name is the object of the module that it lives in, and nothing is imported before."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import iris
from iris import dwt, idwt

PARTS = {
    "Depth": "iris.nn.depth",
    "GRFM": "iris.nn.mixers.grfm",
    "Generator": "iris.nn.generator",
    "GeneratorConfig": "iris.nn.generator",
    "Guidance": "iris.diffusion.guidance",
    "GuidedVelocity": "iris.diffusion.sampling",
    "IrisModel": "iris.model",
    "IrisPipeline": "iris.pipeline",
    "LATENTS": "iris.latents",
    "MIXERS": "iris.nn.mixers",
    "MixerOptions": "iris.nn.mixers",
    "SAMPLERS": "iris.diffusion.flow",
    "SamplingSettings": "iris.diffusion.sampling",
    "TextCondition": "iris.nn.condition",
    "TimeSampling": "iris.diffusion.flow",
    "WaveletVAE": "iris.latents.wavelet_vae",
    "build_latent": "iris.latents",
    "build_mixer": "iris.nn.mixers",
    "create_iris_base": "iris.presets",
    "create_iris_small": "iris.presets",
    "create_iris_tiny": "iris.presets",
    "dwt": "iris.latents.haar",
    "idwt": "iris.latents.haar",
    "initialise": "iris.randomness",
    "integrate": "iris.diffusion.flow",
    "interpolate": "iris.diffusion.flow",
    "linear_scan": "iris.nn.scan",
    "time_grid": "iris.diffusion.flow",
    "velocity_loss": "iris.diffusion.flow",
}


@pytest.mark.parametrize("name", PARTS)
def test_a_name_is_what_it_says(name):
    value = getattr(iris, name)
    assert value is getattr(importlib.import_module(PARTS[name]), name)
    if not isinstance(value, dict):
        assert (value.__name__, value.__module__) == (name, PARTS[name])
        assert inspect.getdoc(value)


def test_these_are_all_names():
    assert iris.__all__ == sorted(PARTS) and set(PARTS) <= set(dir(iris))
    with pytest.raises(AttributeError, match="telepathy"):
        iris.telepathy  # noqa: B018


def test_editors_see_the_same_names():
    block = next(node for node in ast.parse(Path(iris.__file__).read_text()).body if isinstance(node, ast.If))
    seen = {alias.name: line.module for line in block.body for alias in line.names}
    assert seen == iris._PLACES


def test_the_parts_work_together():
    """A generator of one's own, from noise to an image."""
    config = iris.GeneratorConfig(
        channels=12, text_width=8, dim=16, heads=2, prelude=1, core=1, coda=1, iterations=2, ffn_ratio=2.0, mixer="grfm"
    )
    generator, latent = iris.initialise(iris.Generator(config), 0), iris.build_latent("haar", levels=1)
    text = iris.TextCondition(torch.ones(2, 3, 8), torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 8))
    velocity = iris.GuidedVelocity(generator, text)
    noise = torch.randn(2, 12, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = iris.integrate(velocity, noise, iris.time_grid(2))
    assert torch.equal(z, noise)  # the output layer starts at zero
    assert latent.decode(z).shape == (2, 3, 8, 8)
    assert torch.allclose(idwt(dwt(z)), z, atol=1e-6)


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import iris", {"torch", "numpy", "huggingface_hub", "PIL"}),
        ("from iris import IrisPipeline", {"transformers", "diffusers", "eval", "ablations"}),
    ],
)
def test_importing_imports_nothing_heavy(statement, heavy):
    code = f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
