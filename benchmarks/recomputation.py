"""Memory of training through many passes: ``python -m benchmarks.recomputation [batch]``.

With train.gradient_checkpointing the core's passes are computed again in the backward instead of kept, so that the peak
hardly grows with their number. Each row is a fresh process on one thread that takes two training steps of the embedded model
(latents of 16 x 16 tokens): the peak of live tensors of a step, which is the same on every machine, and of resident memory
above that before the first step. Writes benchmarks/recomputation.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from eval.speed.probes import ActivationTracker, reset_peak, resident_mb
from iris.model import TextToLatent
from iris.nn.generator import Generator, GeneratorConfig
from iris.randomness import addressed, initialise
from iris.text import Vocabulary, WordEncoder
from iris.training.optimiser import Optimisers, OptimiserSettings
from iris.training.tasks import FlowTask

PASSES = (2, 4, 8, 16)
SIDE = 16


def main() -> None:
    """Measure every row and write the table."""
    batch = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    rows = {(passes, kept): _in_process(passes, kept, batch) for kept in (True, False) for passes in PASSES}
    text = "\n".join(
        [
            "# Training memory by passes",
            "",
            f"A training step of the embedded model (dim 64, {SIDE}x{SIDE} tokens, batch {batch}, float32, CPU), MB (10^6 bytes); "
            "in brackets, over the same with 2 passes.",
            "",
            "| passes | live tensors, all kept | recomputed | resident, all kept | recomputed |",
            "|---|---|---|---|---|",
            *(
                f"| {passes} | "
                + " | ".join(
                    _cell(rows, passes, kept, name) for name in ("live_mb", "resident_mb") for kept in (True, False)
                )
                + " |"
                for passes in PASSES
            ),
            "",
        ]
    )
    Path(__file__).with_suffix(".md").write_text(text)
    print(text)


def _cell(rows: dict[tuple[int, bool], dict[str, float]], passes: int, kept: bool, name: str) -> str:
    value = rows[passes, kept][name]
    return f"{value:.0f} ({value / rows[PASSES[0], kept][name]:.2f})"


def _in_process(passes: int, kept: bool, batch: int) -> dict[str, float]:
    code = f"from benchmarks.recomputation import step; step({passes}, {kept}, {batch})"
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def step(passes: int, kept: bool, batch: int) -> None:
    """Take two steps and print what they needed."""
    torch.set_num_threads(1)
    text = WordEncoder(Vocabulary(["red"], 20), 64, layers=1)
    config = GeneratorConfig(
        channels=8,
        text_width=64,
        dim=64,
        heads=4,
        prelude=2,
        core=1,
        coda=2,
        iterations=passes,
        ffn_ratio=3.0,
        mixer="grfm",
    )
    module = initialise(TextToLatent(text, Generator(config)), 0).train()
    module.generator.checkpoint_passes = not kept
    latents = torch.randn(batch, 8, SIDE, SIDE, generator=addressed("benchmark"))
    task = FlowTask(module, latents, text.tokenise(["red"] * batch), text.tokenise([""])[0], batch, 0, 0.1, "none")
    optimisers = Optimisers(module, OptimiserSettings("adamw", 1e-3))
    before, live = resident_mb("VmRSS") or 0.0, 0.0
    for number in range(2):
        reset_peak()
        with ActivationTracker() as tracker:
            task.loss(number)[0].backward()
            optimisers.step(1e-3)
        live = max(live, tracker.peak)
    print(json.dumps({"live_mb": live / 1e6, "resident_mb": (resident_mb("VmHWM") or 0.0) - before}))


if __name__ == "__main__":
    main()
