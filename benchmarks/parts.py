"""A preset by part: time, memory against its formula, the caps that hold. ``uv run python -m benchmarks.parts``.

Weights are drawn, and the text encoder has CLIP ViT-L/14's shape; 4 steps of 4 iterations, no guidance. Writes
reports/parts.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.presets import command
from eval.speed.caps import CAPS_MB, CapResult, cap_table, caps_held
from eval.speed.latency import Timed, few_rounds, interleave
from eval.speed.memory import PartMemory, measure_memory_by_part, worker_memory
from eval.speed.parts import PartsLatency, measure_parts, part_table
from eval.speed.workers import STEADY_HEAP, Loader, Worker
from eval.targets import check
from iris.io.machine import processor_name

OUT = Path("reports/parts.md")
LOAD = "eval.models.loading:load_for_measuring"
SHOWN = 2  # an iteration is checked on evaluations of this many iterations and of one more


def loader(preset: str, **given: Any) -> Loader:
    """Of a preset at 4 steps of 4 iterations, unless ``given`` says otherwise."""
    return Loader(LOAD, {"preset": preset, "steps": 4, "iterations": 4, **given})


def iteration_by_difference(preset: str, rounds: int) -> tuple[float, float]:
    """Milliseconds of processor time of one pass through the core: on its own, and as the difference of evaluations."""
    with (
        Worker("more", loader(preset, iterations=SHOWN + 1, part="generator"), 1, 600.0) as more,
        Worker("fewer", loader(preset, iterations=SHOWN, part="generator"), 1, 600.0) as fewer,
    ):
        timed = [Timed(more), Timed(fewer), Timed(more, "iteration")]
        longer, shorter, direct = interleave(timed, rounds, 2, 1)
    return direct.processor_ms, longer.processor_ms - shorter.processor_ms


def memory_table(memory: Mapping[str, PartMemory]) -> list[str]:
    """Weights and activations of each part in a process of its own, measured over predicted."""
    lines = [
        "| | weights, MB | resident growth, MB | ratio | live tensors, MB | predicted, MB | ratio "
        "| peak resident, MB | of it import, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, part in memory.items():
        m = part.memory
        predicted = "-" if part.predicted_mb is None else f"{part.predicted_mb:.2f}"
        ratios = ["-" if ratio is None else f"{ratio:.3f}" for ratio in (part.weights_ratio, part.activations_ratio)]
        lines.append(
            f"| {name} | {m.weights_mb:.1f} | {m.loaded_mb - m.import_mb:.1f} | {ratios[0]} "
            f"| {m.activations_mb:.2f} | {predicted} | {ratios[1]} | {m.peak_memory_mb:.0f} "
            f"| {m.import_mb:.0f} |"
        )
    return lines


def residency_table(memory: Mapping[str, PartMemory], in_turn: PartMemory) -> list[str]:
    """All parts loaded, against one at a time."""
    lines = ["| | weights and live tensors, MB | peak resident, MB | above the import, MB |", "|---|---|---|---|"]
    for name, part in (("all resident", memory["whole"]), ("one part at a time", in_turn)):
        m = part.memory
        lines.append(
            f"| {name} | {m.weights_mb + m.activations_mb:.1f} | {m.peak_memory_mb:.0f} "
            f"| {m.peak_memory_mb - m.import_mb:.0f} |"
        )
    return lines


def page(
    given: argparse.Namespace,
    latency: Mapping[int, PartsLatency],
    iteration: tuple[float, float],
    memory: Mapping[str, PartMemory],
    in_turn: PartMemory,
    caps: Mapping[str, list[CapResult]],
) -> str:
    """The report."""
    whole = memory["whole"].memory
    metrics = {
        "weights_mb": whole.weights_mb,
        "activations_mb": whole.activations_mb,
        "nfe": 4,
        "latency_ms": latency[min(latency)].whole.median_ms,
    }
    verdicts = check(metrics, given.dtype, caps["all resident"])
    reasons = sorted(
        {
            why
            for one in latency.values()
            for part in (one.whole, *(p.latency for p in one.parts.values()))
            for why in part.reasons
            if "interquartile" not in why
        }
    )
    direct, difference = iteration
    lines = [
        f"# IRIS {given.preset} by part",
        "",
        f"`{command('benchmarks.parts')}` on {processor_name()}, one thread, torch "
        f"{torch.__version__}. 256x256, 4 steps, 4 iterations, guidance 1, drawn weights, a text encoder of the shape "
        "of CLIP ViT-L/14.",
        "",
        "## Time",
        "",
        f"float32, the median of {given.rounds} rounds, in each of which all rows run in turn.",
        "",
        *part_table(list(latency.values())),
        "",
        *([few_rounds(given.rounds), ""] if few_rounds(given.rounds) else []),
        *([f"Contended: {'; '.join(reasons)}.", ""] if reasons else []),
        f"An iteration timed on its own takes {direct:.1f} ms of processor time; evaluations of {SHOWN + 1} and "
        f"{SHOWN} iterations differ by {difference:.1f} ms ({direct / difference:.2f} times).",
        "",
        f"## Memory in {given.dtype}",
        "",
        "Each part alone in a fresh process. Weights: parameters and buffers times their bytes, against the growth of "
        "resident memory while loading. Live tensors: the peak counted on a run, against the formulas of "
        "`eval/models/activations.py`, which has no formula for the text encoder, and so none for the whole.",
        "",
        *memory_table(memory),
        "",
        *residency_table(memory, in_turn),
        "",
        "## Caps",
        "",
    ]
    for name, results in caps.items():
        lines += [f"An image with {name}:", "", *cap_table(results), ""]
    lines += [
        "## Targets",
        "",
        "| target | measured | verdict | why |",
        "|---|---|---|---|",
        *(f"| {v.name}: {v.target} | {v.measured} | {v.verdict} | {v.why} |" for v in verdicts),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts", description=__doc__)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        help="of the memory and the caps: float16 takes as many bytes, and 7 times as long on a processor",
    )
    parser.add_argument("--caps", nargs="+", type=float, default=list(CAPS_MB))
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    half, turns = loader(given.preset, dtype=given.dtype), loader(given.preset, dtype=given.dtype, resident="one part")
    latency = measure_parts(loader(given.preset), given.batches, given.rounds, timeout=1200.0)
    iteration = iteration_by_difference(given.preset, given.rounds)
    memory = measure_memory_by_part(half, timeout=1200.0)
    in_turn = measure_whole(turns)
    caps = {
        name: caps_held(start, given.caps, timeout=1200.0)
        for name, start in (("all resident", half), ("one part at a time", turns))
    }
    text = page(given, latency, iteration, memory, in_turn, caps)
    print(text)
    given.out.write_text(text)


def measure_whole(start: Loader) -> PartMemory:
    """Memory of a model that names no parts."""
    with Worker("whole", start, 1, 1200.0, STEADY_HEAP) as worker:
        return PartMemory(worker_memory(worker), worker.loaded["predicted_mb"])


if __name__ == "__main__":
    main()
