"""Stage speed: latency and memory of models beside one another, interleaved, in fresh processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from filelock import FileLock

from eval.settings import Measure
from eval.speed.latency import SpeedAndMemory, measure_models
from eval.speed.workers import Loader
from eval.stages.makers import Maker
from iris.io.machine import processor_name
from iris.stages.engine import Context, Stage

TOGETHER = 8  # models loaded at once
LOCK = "speed.lock"
MEMORY = ("peak_memory_mb", "weights_mb", "activations_mb")


class Speed(Stage):
    """Of each model: median latency of one image with its quartiles, the ratio to the first model's with its interval,
    and memory.

    Nothing of it depends on the weights' values, so one model of a kind stands for all. What was measured is kept by
    models, machine and settings, so that the same ones are not measured again.

    Args:
        makers: name -> model; the first is the one that ratios are taken to.
        caption: of the images.
        machine: what it is measured on.
    """

    kind = "speed"
    version = 2  # the ratio's interval

    def __init__(
        self, context: Context, makers: Mapping[str, Maker], measure: Measure, caption: str, machine: str = ""
    ) -> None:
        super().__init__(context, {name: maker.work for name, maker in makers.items()})
        self.makers, self.measure, self.caption = dict(makers), measure, caption
        self.machine = machine or processor_name()

    def facts(self) -> dict[str, Any]:
        chosen = self.measure
        made = {name: [one.sampling, one.dtype, one.device] for name, one in self.makers.items()}
        rounds = [chosen.latency.rounds, chosen.latency.warmup, chosen.threads]
        return {"models": made, "order": list(made), "rounds": rounds, "machine": self.machine}

    def work(self) -> dict[str, Any]:
        # Two that measure at once would disturb each other.
        with FileLock(self.context.runs / LOCK):
            return {"speed": measured(self._loaders(), self.measure)}

    def _loaders(self) -> dict[str, Loader]:
        return {name: maker.open().loader(self.caption) for name, maker in self.makers.items()}


def measured(loaders: Mapping[str, Loader], measure: Measure) -> dict[str, dict[str, Any]]:
    """Latency and memory by name, a few models at a time beside the first.

    Models that are compared stay loaded together, so many are measured in groups, each with the first model in it.

    Raises:
        WorkerError: a model could not be loaded or run.
    """
    first, *others = loaders
    chosen, result = measure.latency, dict[str, dict[str, Any]]()
    for start in range(0, max(1, len(others)), TOGETHER - 1):
        group = [first, *others[start : start + TOGETHER - 1]]
        found = measure_models(
            {name: loaders[name] for name in group}, chosen.rounds, chosen.warmup, measure.threads, measure.timeout
        )
        result = {name: _figures(value) for name, value in found.items()} | result
    return result


def _figures(value: SpeedAndMemory) -> dict[str, Any]:
    latency, memory = value.latency, value.memory
    ends = {"latency_ratio_low": latency.ratio_low, "latency_ratio_high": latency.ratio_high}
    return {
        "latency_ms": latency.median_ms,
        "latency_q1_ms": latency.q1_ms,
        "latency_q3_ms": latency.q3_ms,
        "latency_ratio": latency.ratio_to_first,
        **{name: end for name, end in ends.items() if end is not None},
        **{name: number for name, number in asdict(memory).items() if name in MEMORY and number is not None},
        "import_mb": memory.import_mb,
        "contended": "; ".join(latency.reasons) if latency.contended else "",
    }
