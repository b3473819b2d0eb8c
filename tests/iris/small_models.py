"""Models small enough for tests, and the text they are conditioned on."""

import torch
from torch import nn

from iris.model import TextToLatent
from iris.nn.condition import TextCondition
from iris.nn.generator import Generator, GeneratorConfig
from iris.nn.layers import ZeroLinear
from iris.randomness import initialise
from iris.text import Vocabulary, WordEncoder

CHANNELS, TEXT_WIDTH, DIM = 3, 12, 16

CAPTIONS = ["a red circle", "a blue square on green", "two stars", "a circle"]


def small_config(**changes):
    """A generator configuration of some thousand parameters."""
    settings = {
        "channels": CHANNELS,
        "text_width": TEXT_WIDTH,
        "dim": DIM,
        "heads": 2,
        "prelude": 1,
        "core": 1,
        "coda": 1,
        "iterations": 2,
        "ffn_ratio": 2.0,
        "mixer": "grfm",
    }
    return GeneratorConfig(**(settings | changes))


def small_generator(seed=0, awake=True, **changes):
    """An initialised generator; ``awake`` draws the layers that start at zero, so that all parts count."""
    model = initialise(Generator(small_config(**changes)), seed)
    return wake(model) if awake else model


def wake(module, std=0.3):
    """Draw the zero layers from a fixed normal distribution."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, ZeroLinear):
                part.weight.copy_(std * torch.randn(part.weight.shape, generator=draws))
    return module


def small_text(batch, length=5, width=TEXT_WIDTH, seed=0):
    """A text condition whose last token does not count."""
    draws = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[:, -1] = False
    tokens = torch.randn(batch, length, width, generator=draws)
    return TextCondition(tokens, mask, torch.randn(batch, width, generator=draws))


def small_model(seed=0, awake=False, **changes) -> TextToLatent:
    """Text encoder and generator together, over the words of ``CAPTIONS``."""
    encoder = WordEncoder(Vocabulary.from_captions(CAPTIONS, 6), TEXT_WIDTH, layers=1)
    model = initialise(TextToLatent(encoder, Generator(small_config(**changes))), seed)
    return wake(model) if awake else model


def parameters_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters by name."""
    return {name: value.detach().clone() for name, value in module.named_parameters()}
