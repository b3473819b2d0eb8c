"""What trial settings cost: parameters, operations, time beside the baseline's, seconds of a training step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ablations.question.settings import TrialSettings
from eval.speed.flops import count_flops
from iris.io.files import read_json, write_json
from iris.io.hashing import digest
from iris.model import TextToLatent
from iris.nn.generator import Generator
from iris.nn.mixers import OPTION_GROUPS
from iris.randomness import addressed, initialise
from iris.settings import facts
from iris.stages.data import size_of
from iris.stages.parts import generator_config, latent_sizes, parameters_of, text_of, text_width
from iris.text import TextEncoder, Vocabulary, WordEncoder
from iris.training.optimiser import Optimisers, OptimiserSettings
from iris.training.tasks import FlowTask

TIMED = 15  # evaluations of each of two generators whose times are compared
EXAMPLE = "a large red circle in the centre on a white background"

Cost = Callable[[TrialSettings], float]
_known: dict[str, float] = {}  # operations of generators that were built once


def cost_of(what: str, baseline: TrialSettings, runs: Path) -> Cost:
    """What ``grid.match`` makes equal, as a function of trial settings."""
    costs: dict[str, Cost] = {"params": parameters, "flops": operations}
    return RelativeTime(baseline, runs / "times") if what == "latency" else costs.get(what, parameters)


def parameters(settings: TrialSettings) -> float:
    """Generator parameters."""
    return parameters_of(generator_config(settings, latent_sizes(settings)[0], text_width(settings)))


def operations(settings: TrialSettings) -> float:
    """Floating-point operations of one generator evaluation for one image."""
    built = digest(built_from(settings))
    if built not in _known:
        _known[built] = _operations(settings)
    return _known[built]


def built_from(settings: TrialSettings) -> list[object]:
    """What a generator is built from, as plain values."""
    groups = ("latent", "model", "depth", *OPTION_GROUPS)
    return [settings.data.name, settings.data.size, *(facts(getattr(settings, group)) for group in groups)]


def _operations(settings: TrialSettings) -> float:
    task = example_task(settings, batch=1)
    with torch.no_grad():
        return count_flops(lambda: task.loss(0)).total


class RelativeTime:
    """Time of one generator evaluation over the baseline's, both run in turn, so that a drift meets both alike.

    Times are kept in ``folder``: a grid planned again has the same widths, and so the same keys.
    """

    def __init__(self, baseline: TrialSettings, folder: Path) -> None:
        self.baseline, self.folder = baseline, folder

    def __call__(self, settings: TrialSettings) -> float:
        if settings == self.baseline:
            return 1.0
        built = [built_from(given) for given in (self.baseline, settings)]
        kept = self.folder / f"{digest(built)}.json"
        known = read_json(kept)
        if known is None:
            torch.set_num_threads(1)
            tasks = [example_task(self.baseline, batch=1), example_task(settings, batch=1)]
            times = [[_seconds(task) for task in tasks] for _ in range(TIMED + 2)][2:]
            known = {"ratio": statistics.median(mine / first for first, mine in times), "settings": built[1]}
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(kept, known)
        return known["ratio"]


@torch.no_grad()
def _seconds(task: FlowTask) -> float:
    """Processor time of one evaluation on this thread, which other processes do not change."""
    started = time.thread_time()
    task.loss(0)
    return time.thread_time() - started


def step_seconds(settings: TrialSettings, steps: int = 3) -> float:
    """Seconds of one training step of stage text, measured here on a few steps; for the cost of a dry run."""
    task = example_task(settings, settings.train.batch)
    optimisers = Optimisers(task.module, OptimiserSettings(settings.train.optimiser))
    started = time.monotonic()
    for step in range(steps + 1):
        if step == 1:  # the first step allocates
            started = time.monotonic()
        task.loss(step)[0].backward()
        optimisers.step(1e-3)
    return (time.monotonic() - started) / steps


def example_task(settings: TrialSettings, batch: int) -> FlowTask:
    """A training task of the right shapes on random data."""
    channels, factor = latent_sizes(settings)
    side = size_of(settings.data.source("train")) // factor
    text = _example_text(settings)
    model = initialise(TextToLatent(text, Generator(generator_config(settings, channels, text.width))), 0)
    captions, null = text.tokenise([EXAMPLE] * batch), text.tokenise([""])[0]
    latents = torch.randn(batch, channels, side, side, generator=addressed("example"))
    return FlowTask(model, latents, captions, null, batch, 0, 0.1, "none", steps=settings.train.steps)


def _example_text(settings: TrialSettings) -> TextEncoder:
    """A text encoder of the right width; a frozen one is stood for by a small one, since its embeddings are made before."""
    if settings.model.text == "clip":
        return WordEncoder(Vocabulary.from_captions([EXAMPLE], 77), text_width(settings), 0, heads=1)
    return text_of(settings, [EXAMPLE])
