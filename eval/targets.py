"""Whether a model meets the phone targets in targets.yaml, as far as that can be told without a phone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from eval.speed.caps import CapResult, proven

DTYPES = ("float32", "float16", "bfloat16", "int8")  # of weights that are measured
Verdict = Literal["pass", "fail", "needs the device", "not measured"]


@dataclass(frozen=True)
class TargetResult:
    """One target, what was measured (in words, with unit), the verdict and why."""

    name: str
    target: str
    measured: str
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class PublishedFigure:
    """What another system's authors or users state; latency and memory are quoted, not re-measured."""

    system: str
    parameters: str
    device: str
    resolution: int
    steps: str
    latency: str
    memory: str
    source: str


@cache
def _file() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name("targets.yaml").read_text(encoding="utf-8"))


def targets() -> dict[str, Any]:
    """The targets: ``memory_mb``, ``nfe``, ``ram_gb``."""
    return dict(_file()["targets"])


def published() -> list[PublishedFigure]:
    """Published phone figures for context, with their sources."""
    return [PublishedFigure(**row) for row in _file()["published"]]


def check(
    metrics: Mapping[str, float | None], dtype: str = "float32", caps: Sequence[CapResult] = ()
) -> list[TargetResult]:
    """Hold measured figures against the phone targets.

    Memory is judged on ``weights_mb`` + ``activations_mb``: a desktop process is no stand-in, importing torch alone
    takes about as much as the whole target. Weights measured in float32 are halved, as float16 holds them; activations
    are taken as measured, which is the safe side. Latency on a phone is never judged here.

    Runs under caps can only speak against a model. One that fails in the memory target on top of the runtime's import,
    with weights in half precision, fails the target whatever the sum says: the runtime needs more than the sum. One
    that fails in all the memory of a phone fails there. One that succeeds shows what a process needs here; how much a
    phone's system leaves to one app shows only on the phone.

    Args:
        metrics: ``weights_mb``, ``activations_mb``, ``nfe``, ``latency_ms``, each of which may be missing or None.
        dtype: what the weights were measured in: one of ``DTYPES``.
        caps: what ``eval.speed.caps.caps_held`` gave for the model in this dtype.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    total, parts = _total_mb(metrics, dtype)
    wanted = targets()
    results = [_memory(total, parts, wanted["memory_mb"], () if dtype == "float32" else caps)]
    results += [_ram(total, gigabytes, caps) for gigabytes in wanted["ram_gb"]]
    return [*results, _nfe(metrics.get("nfe"), wanted["nfe"]), _latency(metrics.get("latency_ms"))]


def _total_mb(metrics: Mapping[str, float | None], dtype: str) -> tuple[float | None, str]:
    weights, activations = metrics.get("weights_mb"), metrics.get("activations_mb")
    missing = [n for n, v in (("weights_mb", weights), ("activations_mb", activations)) if v is None]
    if weights is None or activations is None:
        return None, f"{' and '.join(missing)} not measured"
    halved = weights / 2 if dtype == "float32" else weights
    how = f"half of {weights:.1f} measured in float32" if dtype == "float32" else f"as measured in {dtype}"
    return halved + activations, f"weights {halved:.1f} MB ({how}) + live activations {activations:.1f} MB as measured"


def _memory(total: float | None, parts: str, limit: float, caps: Sequence[CapResult]) -> TargetResult:
    target = f"<= {limit:g} MB in float16"
    if total is None:
        return TargetResult("memory", target, "-", "not measured", parts)
    verdict: Verdict = "pass" if total <= limit else "fail"
    said = _capped(caps, limit)
    if said and not any(one.held for one in said):
        verdict = "fail"
    seen = "; ".join(_words(one) for one in said) or "the runtime's own memory not included"
    return TargetResult("memory", target, f"{total:.1f} MB", verdict, f"{parts}; {seen}")


def _ram(total: float | None, gigabytes: float, caps: Sequence[CapResult]) -> TargetResult:
    name, target = f"ram_{gigabytes:g}gb", f"runs on a phone with {gigabytes:g} GB"
    said = _capped(caps, 1000 * gigabytes)
    seen = "".join(f"{_words(one)}; " for one in said)
    if total is None and not said:
        return TargetResult(name, target, "-", "not measured", "the memory was not measured")
    measured = "-" if total is None else f"{total:.1f} MB, {total / (10 * gigabytes):.0f} % of its memory"
    if total is not None and total > 1000 * gigabytes:
        return TargetResult(name, target, measured, "fail", "more than the phone has")
    if said and not any(one.held for one in said):
        return TargetResult(name, target, measured, "fail", seen.removesuffix("; "))
    why = f"{seen}how much a system leaves one app shows only there"
    return TargetResult(name, target, measured, "needs the device", why)


def _capped(caps: Sequence[CapResult], cap_mb: float) -> list[CapResult]:
    """The runs under this cap, the whole process first; none where the control shows that caps limited nothing."""
    return [one for one in caps if one.cap_mb == cap_mb and one.scope != "control"] if proven(caps) else []


def _words(one: CapResult) -> str:
    of = "a process" if one.scope == "process" else "a process, beside its runtime's import,"
    result = "made an image" if one.held else "could not make an image"
    return f"{of} {result} under a cap of {one.cap_mb:g} MB ({one.method})"


def _nfe(nfe: float | None, limit: int) -> TargetResult:
    target = f"<= {limit} generator evaluations an image"
    if nfe is None:
        return TargetResult("nfe", target, "-", "not measured", "nfe not given")
    return TargetResult("nfe", target, f"{nfe:g}", "pass" if nfe <= limit else "fail", "guidance counts twice")


def _latency(latency_ms: float | None) -> TargetResult:
    measured = "-" if latency_ms is None else f"{latency_ms:.1f} ms on this machine"
    return TargetResult(
        "latency",
        "on a phone",
        measured,
        "needs the device",
        "times on this machine give ratios between models, not seconds on a phone",
    )
