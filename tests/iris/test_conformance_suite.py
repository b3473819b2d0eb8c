"""The conformance suite itself: it covers a new line of a registry, and it fails on what it should catch."""

import inspect
import os
import subprocess
import sys

import conformance
import pytest
import test_conformance_latents as latent_tests
import test_conformance_mixers as mixer_tests
import test_conformance_text as text_tests
import torch
from conformance import EXCEPTIONS, LatentCase, MixerCase, TextCase, latent_cases, mixer_cases, text_cases
from torch import nn

from iris.latents import LATENTS
from iris.latents.lossless import Pixel
from iris.nn.layers import Linear
from iris.nn.mixers import MIXERS, OPTION_GROUPS
from iris.randomness import initialise
from iris.text import TEXT_ENCODERS, ClassLabels


class Mean(nn.Module):
    """A mixer without fault: each token gets the mean of all."""

    def __init__(self, dim, width=None, heads=4):
        super().__init__()
        self.value, self.out = Linear(dim, width or dim), Linear(width or dim, dim)

    def forward(self, x):
        return self.out(self.value(x).mean((1, 2), keepdim=True)).expand(x.shape)


class BatchMean(Mean):
    def forward(self, x):
        return super().forward(x) + x.mean(0, keepdim=True)


class Squeezed(Mean):
    def forward(self, x):
        return super().forward(x).squeeze(1)


class OneGrid(Mean):
    def __init__(self, dim, width=None, heads=4):
        super().__init__(dim, width)
        self.position = Linear(dim, 16)

    def forward(self, x):
        return super().forward(x) + self.position.weight.view(4, 4, -1)


class Unused(Mean):
    def __init__(self, dim, width=None, heads=4):
        super().__init__(dim, width)
        self.unused = Linear(dim, dim)


class RootOfSquares(Mean):
    def forward(self, x):
        return super().forward(x) + x.square().sum(-1, keepdim=True).sqrt()


class Overflowing(Mean):
    def forward(self, x):
        return super().forward(x * 3e4) / 3e4


class Float32Only(Mean):
    def forward(self, x):
        return super().forward(x) + x @ torch.eye(x.shape[-1])


class Dropping(Mean):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class Remembering(Mean):
    state = 0.0

    def forward(self, x):
        self.state = self.state + 1.0
        return super().forward(x) * self.state


class Hidden(Mean):
    def __init__(self, dim, width=None, heads=4):
        super().__init__(dim, width)
        self.register_buffer("hidden", torch.zeros(dim), persistent=False)
        self.hidden[0] = Hidden.made = getattr(Hidden, "made", 0) + 1

    def forward(self, x):
        return super().forward(x) + self.hidden


class Nearsighted(Mean):
    reach = 1


class Farsighted(nn.Module):
    reach = 2

    def __init__(self, dim, width=None, heads=4):
        super().__init__()
        self.inside = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        return self.inside(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Blind(Farsighted):
    reach = None


class Headed(Mean):
    def __init__(self, dim, width=None, heads=4):
        super().__init__(dim, (width or dim) // heads * heads)


class Branching(Mean):
    def forward(self, x):
        return super().forward(x) if x.sum().item() > 1e6 else 2 * super().forward(x)


_CACHE = {}


class Caching(Mean):
    def forward(self, x):
        grid = tuple(x.shape[1:3])
        if grid not in _CACHE:
            _CACHE[grid] = torch.ones(*grid, 1)
        return super().forward(x) + x * _CACHE[grid]


@pytest.mark.parametrize(
    ("kind", "test", "arguments"),
    [
        (Squeezed, "shape_is_kept", {"grid": (1, 6)}),
        (OneGrid, "shape_is_kept", {"grid": (5, 7)}),
        (OneGrid, "runs_on_a_grid_unseen_in_training", {}),
        (Unused, "every_parameter_gets_a_finite_gradient", {"grid": (4, 4)}),
        (RootOfSquares, "gradient_at_zero_input_is_finite", {}),
        (Overflowing, "autocast_is_close_to_float32", {"dtype": torch.float16, "tolerance": 4e-3}),
        (Float32Only, "runs_in_bfloat16", {}),
        (Dropping, "same_seed_same_output_other_seed_other_output", {}),
        (Dropping, "training_and_evaluation_agree", {}),
        (Remembering, "same_seed_same_output_other_seed_other_output", {}),
        (Caching, "training_and_evaluation_agree", {}),
        (Hidden, "state_dict_round_trip", {}),
        (BatchMean, "batch_elements_are_independent", {}),
        (Nearsighted, "sees_as_far_as_it_claims", {}),
        (Farsighted, "sees_as_far_as_it_claims", {}),
        (Blind, "sees_as_far_as_it_claims", {}),
        (Farsighted, "width_changes_the_number_of_parameters", {}),
        (Headed, "width_that_heads_do_not_divide_is_refused", {}),
        (Branching, "exports", {}),
        (Caching, "exports", {}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_faulty_mixer_is_caught(kind, test, arguments, monkeypatch):
    check_caught(kind, test, arguments, monkeypatch)


def test_mixer_that_cannot_be_compiled_is_caught():
    """In a process of its own: after a compilation that failed, torch 2.15 leaves its frame evaluator in the interpreter,
    with which callers hold their arguments until a call returns. Tests that count live tensors would see those."""
    code = (
        "import pytest, test_conformance_suite as suite\nwith pytest.MonkeyPatch.context() as patch:\n"
        "    suite.check_caught(suite.Branching, 'compiles', {}, patch)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


def check_caught(kind, test, arguments, monkeypatch):
    """The conformance test passes a sound mixer and refuses ``kind``."""
    _CACHE.clear()
    monkeypatch.setitem(MIXERS, "mean", Mean)
    getattr(mixer_tests, f"test_{test}")(case=MixerCase("mean"), **arguments)
    monkeypatch.setitem(MIXERS, "mean", kind)
    with pytest.raises(Exception):  # noqa: B017 - an assertion, or whatever the fault itself raises
        getattr(mixer_tests, f"test_{test}")(case=MixerCase("mean"), **arguments)


def test_new_mixer_is_covered(monkeypatch):
    monkeypatch.setitem(MIXERS, "mean", Mean)
    assert MixerCase("mean") in mixer_cases([])


def test_every_option_group_is_varied():
    varied = {option.partition(".")[0] for case in mixer_cases([]) for option, _ in case.options}
    assert varied == set(OPTION_GROUPS)
    names = [str(case) for case in mixer_cases([])]
    assert len(set(names)) == len(names)


class Halved(Pixel):
    """A latent that loses half of the contrast, and says nothing."""

    def synthesise(self, latents):
        return super().synthesise(latents) / 2


class BatchCentred(Pixel):
    def analyse(self, images):
        raw = super().analyse(images)
        return raw - raw.mean(0, keepdim=True)


class Padded(Pixel):
    def grid(self, height, width):
        return height // self.factor, width // self.factor

    def analyse(self, images):
        down, right = (-size % self.factor for size in images.shape[-2:])
        return super().analyse(nn.functional.pad(images, (0, right, 0, down)))


@pytest.mark.parametrize(
    ("kind", "test", "arguments"),
    [
        (Halved, "nothing_is_lost_without_parameters", {}),
        (BatchCentred, "batch_elements_are_independent", {}),
        (Padded, "size_that_the_factor_does_not_divide_is_refused", {"side": "height"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_faulty_latent_is_caught(kind, test, arguments):
    getattr(latent_tests, f"test_{test}")(latent=initialise(Pixel(), 0), **arguments)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        getattr(latent_tests, f"test_{test}")(latent=initialise(kind(), 0), **arguments)


class NeedsFile(Pixel):
    def __init__(self, source):
        super().__init__()


def test_new_latent_is_covered(monkeypatch, tmp_path):
    monkeypatch.setitem(LATENTS, "new", Pixel)
    assert LatentCase("new") in latent_cases() and LatentCase("new").make(tmp_path).factor == Pixel().factor
    monkeypatch.setitem(LATENTS, "new", NeedsFile)
    with pytest.raises(pytest.fail.Exception, match="LATENT_NEEDS"):
        LatentCase("new").make(tmp_path)


class Neighbourly(ClassLabels):
    def forward(self, numbers):
        text = super().forward(numbers)
        return text._replace(pooled=text.pooled - text.pooled.mean(0, keepdim=True))


class NullIsFirst(ClassLabels):
    def tokenise(self, captions):
        return super().tokenise([caption or self.classes[0] for caption in captions])


@pytest.mark.parametrize(
    ("kind", "test"),
    [(Neighbourly, "encoding_does_not_depend_on_the_neighbours"), (NullIsFirst, "empty_caption_is_the_null_prompt")],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_faulty_text_encoder_is_caught(kind, test):
    for faulty in (ClassLabels, kind):
        encoder = initialise(faulty(conformance.CAPTIONS, 8), 0)
        if faulty is kind:
            with pytest.raises(AssertionError):
                getattr(text_tests, f"test_{test}")(encoder)
        else:
            getattr(text_tests, f"test_{test}")(encoder)


def test_new_text_encoder_is_covered(monkeypatch, tmp_path):
    monkeypatch.setitem(TEXT_ENCODERS, "new", ClassLabels)
    assert TextCase("new") in text_cases()
    with pytest.raises(pytest.fail.Exception, match="TEXTS"):
        TextCase("new").make(tmp_path)


def test_exceptions_name_tests_and_cases_that_exist():
    """A line left over from a renamed test would never fail."""
    known = set()
    for tests, cases in ((mixer_tests, mixer_cases([])), (latent_tests, latent_cases()), (text_tests, text_cases())):
        names = [name for name, value in vars(tests).items() if name.startswith("test_") and inspect.isfunction(value)]
        known |= {(name, str(case)) for name in names for case in cases}
    assert set(EXCEPTIONS) <= known, f"unknown: {set(EXCEPTIONS) - known}"
