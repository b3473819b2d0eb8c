"""Small models whose every weight counts, for the export tests."""

import torch

from iris.latents import build_latent
from iris.model import TextToLatent
from iris.nn.generator import Generator, GeneratorConfig
from iris.nn.mixers import build_mixer
from iris.pipeline import IrisPipeline
from iris.randomness import initialise
from iris.text import Vocabulary, WordEncoder

DIM, HEADS = 16, 2
CAPTIONS = ["a red circle", "a blue square on green", "two stars", "a circle"]


def awake(module, seed=0):
    """``module`` with drawn weights, none of them zero: a generator starts with an output of zero, which would agree
    with anything."""
    initialise(module, seed)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))
    return module.eval()


def small_mixer(name):
    return awake(build_mixer(name, DIM, heads=HEADS))


def small_generator(channels=3, **changes):
    settings = {
        "channels": channels,
        "text_width": 12,
        "dim": DIM,
        "heads": HEADS,
        "prelude": 1,
        "core": 1,
        "coda": 1,
        "iterations": 2,
        "ffn_ratio": 2.0,
        "mixer": "grfm",
    }
    return awake(Generator(GeneratorConfig(**settings | changes)))


def small_pipeline(latent="haar", size=16, latent_options=(), **changes):
    """Words in, images of ``size`` pixels out."""
    options = dict(latent_options)
    space = awake(build_latent(latent, **options))
    encoder = awake(WordEncoder(Vocabulary.from_captions(CAPTIONS, 6), 12, layers=1))
    model = TextToLatent(encoder, small_generator(space.channels, **changes))
    return IrisPipeline(model, space, latent, options, size)
