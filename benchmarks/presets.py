"""The presets at 256x256 on this machine: parameters, memory by part, seconds. ``uv run python -m benchmarks.presets``.

Each size and precision is a process of its own, one at a time; what is measured is ``generate`` from text tokens to
pixels, 4 steps of 4 iterations, without guidance and without the text encoder. Writes ``benchmarks/presets.md``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eval.models.ledger import DOCUMENT, MIB, LedgerRow, memory_ledger, total
from eval.speed.latency import Contention
from eval.speed.probes import MB
from eval.speed.workers import Loader, Worker
from iris.io.machine import processor_name
from iris.presets import PRESETS, SIZE, TEXT_LENGTH, TEXT_WIDTH

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STEPS, ITERATIONS, REPEATS = 4, 4, 3
OUT = Path(__file__).with_suffix(".md")


def load(given: dict[str, str]) -> Callable[[], Tensor]:
    """A function that makes one image; ``given``: {"size": a preset, "dtype": a key of ``DTYPES``}."""
    model = PRESETS[given["size"]]().eval().to(DTYPES[given["dtype"]])
    tokens = torch.randn(1, TEXT_LENGTH, TEXT_WIDTH, generator=torch.Generator().manual_seed(0))

    def generate() -> Tensor:
        images = model.generate(tokens, num_steps=STEPS, num_iterations=ITERATIONS)
        if images.shape != (1, 3, SIZE, SIZE) or not images.isfinite().all():
            raise ValueError(f"generate gave {tuple(images.shape)}, or values that are not finite")
        return images

    generate.weights_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return generate


@dataclass(frozen=True)
class Measured:
    """One size in one precision: seconds an image, peak of live tensors and of resident memory in bytes."""

    seconds: float
    activations: int
    resident: int | None
    contended: tuple[str, ...]


def measure(size: str, dtype: str, threads: int) -> Measured:
    """Load, make an image, count its live tensors, time ``REPEATS`` more."""
    loader = Loader("benchmarks.presets:load", {"size": size, "dtype": dtype})
    with Worker(f"{size} {dtype}", loader, threads, timeout=1200.0) as worker:
        watch = Contention([worker.pid, os.getpid()])
        resident = worker.ask("memory", runs=1)["peak_memory_mb"]
        activations = worker.ask("activations")["activations_mb"]
        times = [worker.ask("time")["wall_ms"] for _ in range(REPEATS)]
        return Measured(
            statistics.median(times) / 1000,
            round(activations * MB),
            resident and round(resident * MB),
            tuple(watch.reasons()),
        )


def ledger_of(size: str, measured: dict[str, Measured], text_dtype: torch.dtype = torch.float16) -> list[LedgerRow]:
    """The fp16 ledger of a preset, counted without its weights; activations are float32's at half the size."""
    with torch.device("meta"):
        model = PRESETS[size]()
    return memory_ledger(model, "ViT-L/14", activations=measured["float32"].activations // 2, text_dtype=text_dtype)


def size_table(results: dict[str, dict[str, Measured]]) -> list[str]:
    """Parameters, seconds an image and their ratio to the first size's, peak resident memory."""
    first = next(iter(results))
    lines = [
        "| | generator | decoder | text encoder | float32, s | bfloat16, s | float32, peak resident, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, measured in results.items():
        part = {row.part: row for row in ledger_of(size, measured)}
        seconds = [
            f"{measured[dtype].seconds:.2f} ({measured[dtype].seconds / results[first][dtype].seconds:.2f} x {first})"
            for dtype in DTYPES
        ]
        resident = measured["float32"].resident
        lines.append(
            " | ".join(
                [
                    f"| {size}",
                    *(f"{part[name].parameters:,}" for name in ("generator", "decoder", "text encoder")),
                    *seconds,
                    f"{resident / MIB:.0f} |" if resident else "not measured |",
                ]
            )
        )
    return lines


def memory_table(results: dict[str, dict[str, Measured]]) -> list[str]:
    """The fp16 ledger in MiB, beside the document's totals and with the text encoder in fp32."""
    lines = [
        "| MiB in fp16 | text encoder | generator | decoder | activations | total | without text encoder | document "
        "| total, text encoder in fp32 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size, measured in results.items():
        rows = ledger_of(size, measured)
        part = {row.part: row for row in rows}
        parts = [part[name] for name in ("text encoder", "generator", "decoder", "activations")]
        totals = [total(rows), total(rows, resident=False), total(ledger_of(size, measured, torch.float32))]
        totals = [f"{value / MIB:.0f}" for value in totals]
        lines.append(
            " | ".join(
                [f"| {size}", *(f"{row.mib:.1f}" for row in parts), *totals[:2], str(DOCUMENT[size]), f"{totals[2]} |"]
            )
        )
    return lines


def reading(results: dict[str, dict[str, Measured]]) -> str:
    """Which reading of the document's totals comes closer, in words."""
    off = {
        name: {size: total(ledger_of(size, one, dtype)) / MIB - DOCUMENT[size] for size, one in results.items()}
        for name, dtype in (("A", torch.float32), ("B", torch.float16))
    }
    mean = {name: statistics.mean(map(abs, values.values())) for name, values in off.items()}
    best = min(mean, key=mean.get)
    said = {name: ", ".join(f"{size} {value:+.0f}" for size, value in values.items()) for name, values in off.items()}
    return (
        "The document's totals leave about 505 MiB beside the generator. Counted with CLIP in fp32, reading (A), "
        f"ours differ by {said['A']} MiB; with CLIP in fp16, reading (B), by {said['B']} MiB. ({best}) fits."
    )


def command(module: str) -> str:
    """The command line of this process, as it can be given again."""
    return shlex.join(["uv", "run", "python", "-m", module, *sys.argv[1:]])


def main() -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.presets", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    results = {size: {dtype: measure(size, dtype, given.threads) for dtype in DTYPES} for size in given.sizes}
    reasons = sorted({why for measured in results.values() for one in measured.values() for why in one.contended})
    contended = {why.split()[1]: why for why in reasons}.values()  # the worst of each kind
    alive = ", ".join(f"{size} {one['bfloat16'].activations / MIB:.1f}" for size, one in results.items())
    lines = [
        "# The presets at 256x256",
        "",
        f"`uv run python -m benchmarks.presets` on {processor_name()}, {given.threads} of {os.cpu_count()} threads, torch "
        f"{torch.__version__}. {STEPS} steps, {ITERATIONS} iterations, guidance 1; weights are drawn, not trained. "
        f"Each size and precision in a process of its own, one at a time; seconds are the median of {REPEATS} images "
        "after two, from text tokens to pixels.",
        "",
        *([f"The machine was not quiet, and seconds are too long: {'; '.join(contended)}.", ""] if contended else []),
        *size_table(results),
        "",
        "Importing torch is most of the resident memory.",
        "",
        *memory_table(results),
        "",
        "Weights are counted exactly. Activations are the largest sum of tensors alive in float32, halved; in bfloat16 "
        f"they are {alive} MiB. {reading(results)}",
        "",
    ]
    print("\n".join(lines))
    given.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
