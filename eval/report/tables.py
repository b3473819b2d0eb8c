"""Results as tables of text, the same for the page, Markdown and the terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from eval.metrics.skills import ABSENT, ALL
from eval.results import Number, Results

# Headline metrics in order: the part of a name before "/" -> what it is called.
TITLES = {
    "fid": "FID",
    "fid_infinity": "FID at N → ∞",
    "kid": "KID x1000",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "clip_score": "CLIP score",
    f"accuracy_{ALL}": "all skills right",
    f"heldout_accuracy_{ALL}": "all skills right, held-out",
    f"accuracy_gap_{ALL}": "compositional gap",
    "duplicate_share": "close to a training image",
    "latency_ms": "latency",
    "peak_memory_mb": "peak memory of a process",
    "weights_mb": "weights",
    "activations_mb": "live activations",
}
ARROWS = {"lower": "↓", "higher": "↑", "none": ""}  # which direction is better
SCALED = "x1000"  # a unit that the label holds
WHY = "why"  # the column of reasons, which a terminal has no room for


@dataclass(frozen=True)
class Table:
    """A titled table of text, labels in its first column."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    foot: list[str] = field(default_factory=list)


def tables_of(results: Results) -> list[Table]:
    """All tables that there is something for."""
    made = (headline(results), skills(results), latency(results), memory(results), caps(results), targets(results))
    return [table for table in made if table is not None and table.rows]


def headline(results: Results) -> Table | None:
    """The main numbers, each with its interval; why one should not be quoted is a footnote."""
    rows, foot = [], []
    for name, number in results.numbers.items():
        label = label_of(name, results)
        if label is None:
            continue
        marks = []
        for flag in number.flags:
            text = f"{flag}."
            foot += [] if text in foot else [text]
            marks.append(str(foot.index(text) + 1))
        mark = f" [{', '.join(marks)}]" if marks else ""
        rows.append([f"{label} {ARROWS[number.better]}{mark}", shown(number), interval(number), count(number)])
    judge = f"Judge: {results.judge['name']}. " if results.judge else ""
    note = (
        f"{judge}± is the standard error, intervals are {_percent(results)} ones; of latency, the quartiles. "
        "n: images (/real ones), or rounds. ↓: lower is better, ↑: higher."
    )
    return Table(
        "Numbers", ["metric", "value", "interval", "n"], rows, note, [f"[{i}] {text}" for i, text in enumerate(foot, 1)]
    )


def label_of(name: str, results: Results) -> str | None:
    """What a headline number is called; None for one that other tables show."""
    base, _, rest = name.partition("/")
    if base not in TITLES or (base in ("peak_memory_mb", "weights_mb", "activations_mb") and rest):
        return None
    if base == "latency_ms":
        batch, _, part = rest.partition("/")
        return None if part else f"latency, batch of {batch.removeprefix('batch_')}"
    title = results.details.get("quality", {}).get("title", "FID")  # FID is Inception's, others have their own name
    return TITLES[base].replace("FID", title)


def shown(number: Number) -> str:
    """A value, with its standard error if it has one."""
    unit, digits = f" {number.unit}" if number.unit not in ("", SCALED) else "", digits_of(number)
    error = f" ± {number.standard_error:,.{digits}f}" if number.standard_error else ""
    return f"{number.value:,.{digits}f}{error}{unit}"


def interval(number: Number) -> str:
    """The interval in words."""
    if number.low is None or number.high is None:
        return "–"
    digits = digits_of(number)
    return f"{number.low:,.{digits}f} to {number.high:,.{digits}f}"


def digits_of(number: Number) -> int:
    """Decimals worth showing, at most 4: two digits of the standard error, three of the interval's width."""
    if number.standard_error:
        return min(4, _decimals(number.standard_error, 2))
    if number.low is not None and number.high is not None and number.high > number.low:
        return min(4, _decimals(number.high - number.low, 3))
    return min(4, _decimals(number.value, 4)) if number.value else 0


def _decimals(size: float, digits: int) -> int:
    return min(6, max(0, digits - 1 - math.floor(math.log10(abs(size)))))


def count(number: Number) -> str:
    """What the number is of."""
    against = f"/{number.reference_n:,}" if number.reference_n is not None else ""
    return f"{number.n:,}{against}"


def plain(value: float) -> str:
    """A number to four digits, with at least two decimals below 1000."""
    return f"{value:,.{min(2, _decimals(value, 4)) if abs(value) >= 1 else _decimals(value, 3) if value else 0}f}"


def _percent(results: Results) -> str:
    found = {number.confidence for number in results.numbers.values() if number.confidence is not None}
    return " and ".join(f"{100 * one:g} %" for one in sorted(found)) or "95 %"


def skills(results: Results) -> Table | None:
    """Accuracy by skill, beside what the judge reads on real pictures."""
    found = results.details.get("skills")
    if found is None:
        return None
    names = [skill for skill, share in found["seen"].items() if share != ABSENT]
    parts = ("seen", "heldout", "gap")
    rows = [[skill, *(_share(found[part][skill]) for part in parts), _real(found["real"], skill)] for skill in names]
    note = (
        "Share of images in which the judge reads what the caption names: for colour-shape pairs that training "
        "shows (seen) and for those that it never does (held-out). The judge itself errs: the last column is what "
        f"it reads on {found['real_n']:,} real pictures of such captions."
    )
    return Table("Skills", ["skill", "seen", "held-out", "gap", "real"], rows, note)


def _share(share: Any) -> str:
    if isinstance(share, str):
        return share
    return f"{share['value']:.3f} [{share['low']:.3f}, {share['high']:.3f}]"


def _real(real: dict[str, Any], skill: str) -> str:
    shares = [real[part][skill] for part in ("seen", "heldout") if not isinstance(real[part][skill], str)]
    if not shares:
        return "–"
    return f"{sum(one['value'] * one['n'] for one in shares) / sum(one['n'] for one in shares):.3f}"


def latency(results: Results) -> Table | None:
    """Milliseconds by part and batch size."""
    rows = []
    for batch, found in results.details.get("latency", {}).items():
        rows.append(_time_row(batch, "end to end", found["whole"], 1, ""))
        for name, part in found["parts"].items():
            label = name if part["within"] is None else f"{name} (within {part['within']})"
            share = part["count"] * part["latency"]["ratio_to_first"]
            rows.append(_time_row(batch, label, part["latency"], part["count"], f"{share:.0%}"))
    if not rows:
        return None
    first = next(iter(results.details["latency"].values()))["whole"]
    note = (
        f"Median and quartiles of {first['n']} rounds on {first['threads']} thread(s) of this machine, device "
        f"{first['device']}; whole and parts are timed in turn. Contended: other work disturbed the row."
    )
    return Table("Latency by part", ["part", "batch", "ms", "quartiles", "runs", "share", ""], rows, note)


def _time_row(batch: str, label: str, one: dict[str, Any], runs: int, share: str) -> list[str]:
    return [
        label,
        batch,
        plain(one["median_ms"]),
        f"{plain(one['q1_ms'])} to {plain(one['q3_ms'])}",
        str(runs),
        share,
        "contended" if one["contended"] else "",
    ]


def memory(results: Results) -> Table | None:
    """Megabytes by part, beside what is predicted."""
    found = results.details.get("memory")
    if found is None:
        return None
    rows = [
        [
            part,
            *(_mb(one["memory"][name]) for name in ("weights_mb", "activations_mb")),
            _mb(one["predicted_mb"]),
            *(_mb(one["memory"][name]) for name in ("import_mb", "loaded_mb", "peak_memory_mb")),
        ]
        for part, one in found.items()
    ]
    note = (
        "MB (10^6 bytes), every row a fresh process. Weights and live activations are exact; the resident figures "
        "hold the libraries, which a phone's runtime does not need."
    )
    head = ["part", "weights", "activations", "predicted", "after import", "loaded", "peak"]
    return Table("Memory by part", head, rows, note)


def _mb(value: float | None) -> str:
    return "–" if value is None else plain(value)


def caps(results: Results) -> Table | None:
    """Hard caps and whether an image was made under them."""
    found = results.details.get("caps")
    if found is None:
        return None
    scopes = {
        "process": "{:.0f} MB of the whole process",
        "above import": "{:.0f} MB of what comes after the import",
        "control": "control: half of what is needed",
    }
    rows = [
        [
            scopes[one["scope"]].format(one["cap_mb"]),
            "yes" if one["held"] else "no",
            f"{one['limit_mb']:.0f} by {one['method']}",
            _mb(one["peak_mb"]),
            one["why"],
        ]
        for one in found["runs"]
    ]
    note = "An image is made by a process that may take no more. " + (
        "The control failed, as it must: the caps do limit."
        if found["proven"]
        else "The control did not fail: the caps limited nothing here and prove nothing."
    )
    return Table("Hard caps on memory", ["budget", "image made", "limit, MB", "peak resident, MB", WHY], rows, note)


def targets(results: Results) -> Table | None:
    """Phone targets and their verdicts."""
    found = results.details.get("targets")
    if found is None:
        return None
    rows = [[one["name"], one["target"], one["measured"], one["verdict"], one["why"]] for one in found]
    return Table(
        "Phone targets",
        ["target", "asked for", "measured", "verdict", WHY],
        rows,
        "What can be told of a phone from this machine; only a phone can tell the rest.",
    )


def facts(results: Results) -> dict[str, str]:
    """How it was measured, in words."""
    model, data, judge, machine = results.model, results.data, results.judge, results.hardware
    sampling = ", ".join(f"{name} {value}" for name, value in model["sampling"].items() if value is not None)
    found = {
        "Model": f"{model['path']}, kind {model['kind']}, sha256 {model['fingerprint'][:16]}",
        "Size": f"{model['size'][1]}x{model['size'][0]} pixels",
        "Sampling": f"{sampling}, {model['dtype']} on {model['device']}" if sampling else "stored images",
        "Noise": f"image i of every set starts from the noise (seed {results.settings['seed']}, i)" if sampling else "",
        "Evaluations": f"{model['nfe']:g} of the denoiser an image, guidance counted twice" if model.get("nfe") else "",
        "Parameters": _parameters(model.get("parameters", {})),
        "Data": f"{data['name']}, split {data['split']}, {data['size']}x{data['size']} pixels, fingerprint "
        f"{data['fingerprint']}",
        "Judge": f"{judge['name']}, weights sha256 {judge['sha256'][:16]}, resizing {judge['resize']}" if judge else "",
        "Machine": f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB"
        f"{', ' + machine['gpu'] if 'gpu' in machine else ''}; torch {machine['torch']}",
        "Measured": f"{results.created}; seconds: "
        + ", ".join(f"{name} {value:.1f}" for name, value in results.seconds.items()),
    }
    missing = {f"No {name}": why for name, why in results.not_measured.items()}
    return {name: text for name, text in (found | missing).items() if text}


def _parameters(count: dict[str, int]) -> str:
    return ", ".join(f"{name} {value / 1e6:.3g} M" for name, value in count.items())
