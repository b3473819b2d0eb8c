"""Modules have usable weights as soon as they are built, and ``initialise`` draws those that its seed addresses."""

import importlib
import math
import pkgutil
from dataclasses import fields

import pytest
import torch
from conformance import choices, latent_cases, mixer_cases, text_cases
from small_models import CAPTIONS, TEXT_WIDTH, small_config, small_generator
from torch import nn

import iris
from iris.latents import LATENTS, build_latent
from iris.latents.discriminator import AdversarialVAE, PatchDiscriminator
from iris.model import IrisModel, TextToLatent
from iris.nn.depth import Depth
from iris.nn.generator import Generator
from iris.nn.layers import ScalarEmbedding
from iris.nn.mixers import build_mixer
from iris.nn.mixers.recurrence import RGLRU
from iris.nn.student import StudentTime, ZeroEmbedding
from iris.randomness import initialise
from iris.text import TEXT_ENCODERS, ClassLabels, Vocabulary, WordEncoder
from iris.training.distill_settings import DistillSettings
from iris.training.distill_task import Distillation

DEPTH_NUMBERS = {"backprop": (1,)}
LARGEST = 10.0


def depths():
    """Every value of every depth option, beside the defaults of the others."""
    for field in fields(Depth):
        if isinstance(field.default, bool):
            values = (True, False)
        elif isinstance(field.default, str):
            values = choices(lambda value, name=field.name: Depth(**{name: value}))
        else:
            values = DEPTH_NUMBERS[field.name]
        for value in values:
            yield {field.name: value}


def phone_vae():
    return build_latent("wavelet_vae", width=8, channels=4, decoder="phone")


def text_to_latent():
    encoder = WordEncoder(Vocabulary.from_captions(CAPTIONS, 6), TEXT_WIDTH, layers=1)
    return TextToLatent(encoder, Generator(small_config()))


# What no registry names: a function that builds a small one.
OTHERS = {
    "discriminator": lambda: PatchDiscriminator(8, 2),
    "adversarial": lambda: AdversarialVAE(phone_vae(), PatchDiscriminator(8, 1)),
    "student_time": lambda: StudentTime(ScalarEmbedding(16), ("step", "guidance")),
    "zero_embedding": lambda: ZeroEmbedding(16),
    "text_to_latent": text_to_latent,
    "iris_model": lambda: IrisModel(small_config(channels=12), "haar", {"levels": 1}, 16),
    "distillation": lambda: Distillation(text_to_latent(), DistillSettings(guidance_max=4.0), 0),
}

BUILDERS = (
    {f"mixer {case}": case.build for case in mixer_cases([])}
    | {f"latent {case}": lambda case=case: case.build(None) for case in latent_cases() if not LATENTS[case.name].frozen}
    | {
        f"text {case}": lambda case=case: case.build(None)
        for case in text_cases()
        if case.name in TEXT_ENCODERS and not TEXT_ENCODERS[case.name].frozen
    }
    | {
        f"generator {change}": lambda change=change: Generator(small_config(depth=Depth(**change)))
        for change in depths()
    }
    | OTHERS
)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that is allocated and not written holds NaN."""
    allocate = torch.empty

    def empty(*size, **options):
        tensor = allocate(*size, **options)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", empty)


def usable(parameter):
    """Finite, of a size that arithmetic bears, and drawn, or else all zeros or ones."""
    values = parameter.detach().flatten()
    if not values.isfinite().all() or values.abs().max() >= LARGEST:
        return False
    return bool((values != values[0]).any()) or values[0].item() in (0, 1)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_module_is_usable_when_it_is_built(poisoned, name):
    unusable = [place for place, parameter in BUILDERS[name]().named_parameters() if not usable(parameter)]
    assert not unusable


@pytest.mark.parametrize("name", BUILDERS)
def test_it_is_built_on_the_meta_device_without_weights(name):
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in BUILDERS[name]().parameters())


@pytest.mark.parametrize("decay", ["paper", "code"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_decays_finite(dtype, decay):
    """Near one, where half precision has few numbers: enough channels that some would be rounded to it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        module = RGLRU(256, 32, decay)
    finally:
        torch.set_default_dtype(before)
    assert usable(module.decay)
    assert module.decay.dtype == dtype and usable(initialise(module, 0).decay)


def test_what_is_forgotten_is_noticed(poisoned):
    class Forgotten(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.empty(2))

    assert not usable(Forgotten().scale)
    assert not usable(torch.full((2,), 0.5)) and not usable(torch.tensor([0.0, LARGEST]))


def module_classes():
    """The public module classes of ``iris`` that are built themselves: none derived from them, and not pretrained."""
    found = {}
    for module in pkgutil.walk_packages(iris.__path__, "iris."):
        if not module.name.endswith("__main__"):
            found |= {
                kind: name
                for name, kind in vars(importlib.import_module(module.name)).items()
                if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == module.name
            }
    parents = {parent for kind in found for parent in kind.__mro__[1:]}
    return {
        kind
        for kind, name in found.items()
        if kind not in parents and name[0] != "_" and not getattr(kind, "frozen", False)
    }


def test_every_module_class_is_built_here():
    built = {type(part) for build in BUILDERS.values() for part in build().modules()}
    forgotten = sorted(f"{kind.__module__}.{kind.__name__}" for kind in module_classes() - built)
    assert not forgotten, f"give OTHERS of {__file__} a function that builds {', '.join(forgotten)}"


def checksum(module):
    """A sum of all parameters in which each has its own weight: other draws, or another order, change it by far."""
    values = torch.cat([parameter.detach().double().flatten() for parameter in module.parameters()])
    return float(values @ torch.arange(len(values), dtype=torch.float64).cos())


# Measured when modules did not draw their own weights yet. Results of trials depend on these draws.
DRAWS = {
    "mixer": (lambda: build_mixer("grfm", 16, heads=2), -2.1287960),
    "generator": (lambda: Generator(small_config()), -20.1889099),
    "latent": (phone_vae, -4.2485802),
    "labels": (lambda: ClassLabels(["circle", "square"], 12), -3.3871351),
}


@pytest.mark.parametrize("name", DRAWS)
def test_initialise_draws_the_same_weights_as_ever(name):
    build, expected = DRAWS[name]
    assert checksum(initialise(build(), 3)) == pytest.approx(expected, abs=1e-4)


def test_modules_differ_from_one_another_until_they_are_initialised():
    one, other = Generator(small_config()), Generator(small_config())
    assert not torch.equal(one.input.weight, other.input.weight)
    assert checksum(initialise(one, 0)) == checksum(initialise(other, 0)) == checksum(small_generator(awake=False))
