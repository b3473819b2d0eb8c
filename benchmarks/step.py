"""A training step against a bare loop: ``python -m benchmarks.step [threads] [rounds]``; writes benchmarks/step.md.

``fit`` draws each batch, reads it from the stage's latents on disk, clips, averages the weights, watches for losses that
are not finite, logs and passes through Accelerate; the bare loop has one batch ready and does forward, backward and the
optimisers' step alone. Both train the embedded model of captioned shapes. Rounds alternate, so that a drift of the
machine's speed meets both; each is a fresh run whose first half is not counted, and the median round counts. Reading is
also timed by itself: which rows a step takes, their latents and their captions.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import torch

from iris.data import open_source
from iris.diffusion.flow import interpolate
from iris.io.machine import processor_name
from iris.model import TextToLatent, read_folder
from iris.nn.generator import Generator, GeneratorConfig
from iris.randomness import addressed, initialise
from iris.stages.encoded import Latents
from iris.stages.latent_cache import CachedLatents, encode_source
from iris.text import Vocabulary, WordEncoder
from iris.training.loop import LoopSettings, fit
from iris.training.optimiser import Optimisers, OptimiserSettings
from iris.training.tasks import FlowTask

BATCH, BLOCK, ROWS = 64, 5, 4096  # rows of a step; steps that are timed together; rows of the data
CHOSEN = OptimiserSettings("muon", 4e-3)
TARGET = 1.05  # of fit / bare, at most
NAMES = {"bare": "bare loop", "fit": "`fit`", "reading": "reading a batch"}


def make_task(folder: Path) -> FlowTask:
    """The embedded model's sizes (model=iris, latent 8 x 8 x 8), on captioned shapes whose latents are kept in ``folder``."""
    latent = read_folder(Path(str(files("iris").joinpath("weights/shapes")))).latent
    cache = CachedLatents(encode_source(latent, open_source("shapes", train=ROWS), folder))
    text = WordEncoder(Vocabulary.from_captions(cache.captions, 20), 64, layers=1)
    config = GeneratorConfig(
        channels=cache.shape[1],
        text_width=64,
        dim=64,
        heads=4,
        prelude=2,
        core=1,
        coda=2,
        iterations=4,
        ffn_ratio=3.0,
        mixer="grfm",
    )
    module = initialise(TextToLatent(text, Generator(config)), 0)
    captions = text.tokenise(cache.captions)
    return FlowTask(module, Latents(cache), captions, text.tokenise([""])[0], BATCH, 0, 0.1, "none")


def bare(task: FlowTask) -> float:
    """Seconds a step of forward, backward and optimisers on one ready batch."""
    module = copy.deepcopy(task.module).train()
    optimisers = Optimisers(module, CHOSEN)
    clean, captions = task.latents[:BATCH], task.captions[:BATCH]
    t, noise = task.times.draw(BATCH, addressed("time")), torch.randn(clean.shape, generator=addressed("noise"))
    z, target = interpolate(clean, noise, t), noise - clean
    started = 0.0
    for step in range(2 * BLOCK):
        if step == BLOCK:
            started = time.perf_counter()
        (module(z, t, captions) - target).square().mean().backward()
        optimisers.step(1e-3)
    return (time.perf_counter() - started) / BLOCK


def looped(task: FlowTask) -> float:
    """Seconds a step of ``fit``."""
    task = copy.copy(task)
    task.module = copy.deepcopy(task.module)
    times: list[float] = []
    settings = LoopSettings(3 * BLOCK, CHOSEN, log_every=BLOCK, checkpoint_seconds=1e9)
    with tempfile.TemporaryDirectory() as folder:
        fit(task, settings, Path(folder), lambda row: times.append(time.perf_counter()))
    return (times[1] - times[0]) / BLOCK  # the third block ends in a checkpoint


def reading(task: FlowTask) -> float:
    """Seconds a step of what its loss reads, in the steps that ``looped`` times."""
    started = time.perf_counter()
    for step in range(BLOCK, 2 * BLOCK):
        chosen = task.rows(step)
        task.latents[chosen], task.captions[chosen]
    return (time.perf_counter() - started) / BLOCK


def main() -> None:
    """Alternate, compare and write the page."""
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 7
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    order = [("bare", bare), ("fit", looped), ("reading", reading)]
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(Path(folder))
        for number in range(rounds):
            for name, run in order if number % 2 else order[::-1]:
                seconds[name].append(run(task))
    text = page(seconds)
    Path(__file__).with_suffix(".md").write_text(text)
    print(text)


def page(seconds: Mapping[str, Sequence[float]]) -> str:
    """What ``main`` writes, of the seconds a step of each round."""
    ratios, shares = (
        [one / other for one, other in zip(seconds[name], seconds[to], strict=True)]
        for name, to in (("fit", "bare"), ("reading", "fit"))
    )
    low, middle, high = quartiles(ratios)
    threads, rounds = torch.get_num_threads(), len(ratios)
    verdict = "met" if high <= TARGET else "missed" if low > TARGET else "within the spread of the rounds"
    return "\n".join(
        [
            "# A training step",
            "",
            f"`uv run python -m benchmarks.step {threads} {rounds}` on {processor_name()}, {threads} thread(s), torch {torch.__version__}. "
            f"Embedded model, batch {BATCH}, {CHOSEN.name}; latents in float16 on disk. {rounds} rounds of {BLOCK} steps each.",
            "",
            "| | median | first quartile | third quartile |",
            "|---|---|---|---|",
            *(row(f"{NAMES[name]}, ms a step", [value * 1e3 for value in values]) for name, values in seconds.items()),
            row("`fit` / bare loop", ratios),
            row("reading / `fit`", shares),
            "",
            f"Target: `fit` at most {TARGET} times the bare loop, {verdict} (median {middle:.3f}, quartiles {low:.3f} to "
            f"{high:.3f}).",
            "",
        ]
    )


def row(name: str, values: Sequence[float]) -> str:
    """Median and quartiles."""
    low, middle, high = quartiles(values)
    return f"| {name} | {middle:.3f} | {low:.3f} | {high:.3f} |"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First, median and third; of one value that value."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return low, middle, high


if __name__ == "__main__":
    main()
