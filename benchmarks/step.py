"""A training step against a bare loop: ``python -m benchmarks.step [threads] [rounds]``; prints both and their ratio.

``fit`` draws each batch, clips, averages the weights, watches for losses that are not finite, logs and passes through
Accelerate; the bare loop has one batch ready and does forward, backward and the optimisers' step alone. Both train the
embedded model of captioned shapes. Rounds alternate, so that a drift of the machine's speed meets both; each is a fresh
run whose first half is not counted, and the median round counts.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from iris.flow import interpolate
from iris.generator import Generator, GeneratorConfig
from iris.randomness import generator, initialise
from iris.text import Vocabulary, WordEncoder
from iris.training.loop import LoopSettings, fit
from iris.training.optimiser import Optimisers, OptimiserSettings
from iris.training.tasks import FlowTask, TextToLatent

BATCH, BLOCK = 64, 5        # rows of a step; steps that are timed together
CHOSEN = OptimiserSettings("muon", 4e-3)


def make_task() -> FlowTask:
    """The embedded model's sizes (model=iris, latent 8 x 8 x 8), on random latents and captions of twelve words."""
    text = WordEncoder(Vocabulary([f"w{i}" for i in range(40)], 20), 64, layers=1)
    config = GeneratorConfig(channels=8, text_width=64, dim=64, heads=4, prelude=2, core=1, coda=2, iterations=4,
                             ffn_ratio=3.0, mixer="grfm")
    draws = generator("benchmark")
    words = torch.randint(40, (512, 12), generator=draws).tolist()
    captions = text.tokenise([" ".join(f"w{k}" for k in row) for row in words])
    module, latents = initialise(TextToLatent(text, Generator(config)), 0), torch.randn(512, 8, 8, 8, generator=draws)
    return FlowTask(module, latents, captions, text.tokenise([""])[0], BATCH, 0, 0.1, "none")


def bare(task: FlowTask) -> float:
    """Seconds a step of forward, backward and optimisers on one ready batch."""
    module = copy.deepcopy(task.module).train()
    optimisers = Optimisers(module, CHOSEN)
    clean, captions = task.latents[:BATCH], task.captions[:BATCH]
    t, noise = task.times.draw(BATCH, generator("time")), torch.randn(clean.shape, generator=generator("noise"))
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
    return (times[1] - times[0]) / BLOCK        # the third block ends in a checkpoint


def main() -> None:
    """Alternate and compare."""
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 7
    task, seconds = make_task(), {"bare": [], "fit": []}
    for number in range(rounds):
        for name, run in (("bare", bare), ("fit", looped)) if number % 2 else (("fit", looped), ("bare", bare)):
            seconds[name].append(run(task))
    ratios = [one / other for one, other in zip(seconds["fit"], seconds["bare"], strict=True)]
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} thread(s), batch {BATCH}, {CHOSEN.name}, {rounds} rounds")
    for name, values in seconds.items():
        print(f"{name:5} {statistics.median(values) * 1e3:8.1f} ms a step")
    print(f"fit / bare: {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
