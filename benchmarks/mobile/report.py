"""reports/mobile/ from what ``benchmarks.mobile`` measured: results.csv, report.md and a page that needs no other file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from ablations.report.charts import STYLE, Chart, finish, new_figure
from ablations.report.measures import number
from ablations.report.palette import HUES, INK, MUTED, css_variables
from ablations.report.tables import Table
from benchmarks.mobile.plan import RUNTIME_NAMES, Plan, Setup
from benchmarks.mobile.rows import Rows, quiet, read_rows, smallest_cap, without_iterations, write_csv
from benchmarks.mobile.tables import (
    agreement_table,
    caps_table,
    coreml_table,
    files_table,
    latency_table,
    mixers_table,
    parts_table,
    passed_beside_import,
    published_table,
    quality_table,
    target_results,
    targets_table,
)
from eval.targets import targets

TEMPLATES = Path(__file__).parent / "templates"
TITLE = "Does IRIS run on a phone's runtimes, in a phone's memory?"
COLOURS = {"pytorch": INK, "onnx": HUES[1], "executorch": HUES[2]}
SHADES = {"fp32": 1.0, "fp16": 0.7, "int8": 0.4}  # opacity, so that hue says runtime and shade precision


@dataclass(frozen=True)
class Section:
    """A heading, a sentence below it, and a table."""

    title: str
    text: str
    table: Table
    kind: str = ""


def write_report(plan: Plan) -> None:
    """Write the report of a plan's work folder."""
    build_report(read_rows(plan.work), plan.out)
    print(plan.out / "index.html", flush=True)


def build_report(rows: Rows, folder: Path) -> Path:
    """Write results.csv, report.md, index.html and figures to ``folder``; returns the page."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    write_csv(rows, folder / "results.csv")
    with matplotlib.rc_context(STYLE):
        charts = [chart for chart in (draw_latency(rows, folder), draw_memory(rows, folder)) if chart]
    light, dark = css_variables()
    loader = jinja2.ChoiceLoader([jinja2.FileSystemLoader(TEMPLATES), jinja2.PackageLoader("ablations.report")])
    environment = jinja2.Environment(
        loader=loader,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=lambda name: bool(name) and name.endswith(".html"),
    )
    environment.filters |= {"md": _markdown_cell, "svg": Markup}
    values = {
        "title": TITLE,
        "said": verdict(rows),
        "holds": sentences(rows),
        "charts": charts,
        "sections": sections(rows),
        "facts": facts(rows),
        "commands": commands(rows),
        "style": Markup(loader.get_source(environment, "style.css")[0]),
        "light": light,
        "dark": dark,
    }
    for template, name in (("mobile.md", "report.md"), ("mobile.html", "index.html")):
        text = environment.get_template(template).render(values)
        (folder / name).write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    return folder / "index.html"


def verdict(rows: Rows) -> str:
    """Which presets make an image in 600 MB at every number of iterations, and how; what was not tried does not count."""
    if not rows.caps:
        return "Not measured."
    wanted, said, untried = targets()["memory_mb"], [], []
    for resident, how in (("all", "with everything loaded"), ("one part", "with one part loaded at a time")):
        held: dict[str, list[str]] = {}
        partly: dict[str, list[str]] = {}
        for key in without_iterations(rows):
            fits = {_fits(rows, one, resident, wanted) for one in _at_each(rows, key)}
            if key.runtime != "pytorch" and True in fits and False not in fits:
                (partly if None in fits else held).setdefault(key.preset, []).append(key.name)
        said.append(f"{_listed(held) or 'no preset'} {how}")
        untried += [f"{_listed(partly)} {how}"] if partly else []
    counts = sorted({key.iterations for key in rows.keys})
    each = f", at {' and at '.join(map(str, counts))} iterations," if len(counts) > 1 else ""
    text = f"Under a cap of {wanted:g} MB a process makes an image{each} of {'; of '.join(said)}."
    return text + (
        f" Not tried at every number of iterations, and so not counted: {'; '.join(untried)}." if untried else ""
    )


def _at_each(rows: Rows, key: Setup) -> list[Setup]:
    """A key at every number of iterations that anything of its preset was measured at."""
    return [key.at(count) for count in sorted({one.iterations for one in rows.keys if one.preset == key.preset})]


def _fits(rows: Rows, key: Setup, resident: str, wanted: float) -> bool | None:
    """Whether an image was made under a cap of ``wanted`` MB; None where no cap was tried."""
    if (key, resident) not in rows.caps:
        return None
    cap = smallest_cap(rows, key, resident)
    return cap is not None and cap <= wanted


def _listed(presets: dict[str, list[str]]) -> str:
    return ", ".join(f"{preset} ({', '.join(names)})" for preset, names in presets.items())


def sentences(rows: Rows) -> list[str]:
    """What else holds, each from its numbers."""
    lines = []
    wrong = [key for key, one in rows.agreement.items() if key.dtype == "fp32" and one["rms"] > 1e-3]
    if rows.agreement:
        plain = [one["rms"] for key, one in rows.agreement.items() if key.dtype == "fp32"]
        lines.append(
            f"Exported in fp32, an image differs from PyTorch's by {min(plain):.1e} to {max(plain):.1e} "
            f"(relative); {len(wrong) or 'none'} of {len(plain)} by more than 1e-3."
        )
    failed = [one for one in rows.mixers if one["failed"]]
    if rows.mixers:
        names = ", ".join(f"{one['mixer']} ({one['dtype']})" for one in failed)
        worst = max(one.get("rms", 0) for one in rows.mixers if one["dtype"] == "fp32")
        lines.append(
            f"In ExecuTorch {len(rows.mixers) - len(failed)} of {len(rows.mixers)} cases of a mixer lower, load "
            f"and run, in fp32 within {worst:.0e} of PyTorch"
            f"{f'; these do not: {names}' if failed else ''}."
        )
    if rows.quality:
        small = next(one for one in rows.quality["rows"] if one["dtype"] == "int8")
        lines.append(
            f"8-bit weights change the shipped model's FD (shapes) by {small['change']:+.3f} ± "
            f"{small['change_se']:.2g}, from {rows.quality['rows'][0]['fd']:.3g}."
        )
    counts: dict[str, dict[str, int]] = {}
    for _, results in target_results(rows):
        for one in results:
            words = counts.setdefault(one.name, {})
            words[one.verdict] = words.get(one.verdict, 0) + 1
    lines += [
        f"Target {name.replace('_', ' ')}: " + ", ".join(f"{count} {word}" for word, count in words.items()) + "."
        for name, words in counts.items()
    ]
    return lines


def sections(rows: Rows) -> list[Section]:
    """The tables that there are numbers for."""
    found = [
        Section("Memory, and the caps that hold", "", caps_table(rows)),
        Section(
            "Latency",
            "One image, text encoder and decoder included. Milliseconds are this machine's; ratios are "
            "what carries over.",
            latency_table(rows),
        ),
        Section("By part", "", parts_table(rows)),
        Section("Phone targets", _targets_text(rows), targets_table(rows), "wrap"),
        Section(
            "Published figures",
            "Figures of other systems on other people's machines, quoted from their sources and not measured here.",
            published_table(),
            "wrap",
        ),
        Section("Agreement with PyTorch", "", agreement_table(rows)),
        Section("Quality after 8-bit weights", _quality_text(rows), quality_table(rows)),
        Section("Every mixer in ExecuTorch", "", mixers_table(rows), "wrap"),
        Section("ExecuTorch's files", "", files_table(rows)),
        Section("Core ML", "coremltools converts on Linux and cannot run what it makes.", coreml_table(rows)),
    ]
    return [one for one in found if one.table is not None and one.table.rows]


def _targets_text(rows: Rows) -> str:
    """What the memory target is held against, and who meets it with the import left out alone."""
    beside = ", ".join(f"{key.preset} {key.name} ×{key.iterations}" for key in passed_beside_import(rows))
    return (
        "Memory: the files' own weights in half precision and live tensors as PyTorch counts them in float32, and runs "
        "under caps in half precision. That sum decides where an image can also be made with the runtime's import left out "
        "of the budget; a whole process, its import included, can fail under the same cap"
        f"{f' (here {beside})' if beside else ''}. Seconds on a phone, and what its system leaves to an app, need the "
        "device."
    )


def _quality_text(rows: Rows) -> str:
    if rows.quality is None:
        return ""
    q = rows.quality
    return (
        f"The shipped model of drawn shapes in ONNX Runtime, {q['steps']} steps, guidance {q['guidance']:g}: Fréchet "
        f"distance of {q['samples']:,} pictures to as many held-out ones by the judge {q['judge']}, from equal noise "
        f"and captions. ± is a delete-a-block jackknife's error ({q['blocks']} blocks), of the change a paired one."
    )


def facts(rows: Rows) -> list[tuple[str, str]]:
    """How it was measured."""
    machine = rows.machine
    found = [
        (
            "Presets",
            "256×256, 4 steps, no guidance; drawn weights behind a text encoder of CLIP ViT-L/14's shape, also "
            "drawn: cost and agreement, not quality",
        ),
        (
            "Hardware",
            f"{machine['processor']}, {machine['processors']} processors, {machine['memory_gb']:.0f} GB; a "
            "server's processor, no phone"
            if machine
            else "",
        ),
        ("Threads", _threads(rows)),
        (
            "Rounds",
            "latency: " + ", ".join(map(str, sorted({one["n"] for one in rows.latency.values()})))
            if rows.latency
            else "",
        ),
        ("Versions", ", ".join(f"{name} {text}" for name, text in machine.get("versions", {}).items())),
        (
            "Precisions",
            "int8: weights of linear layers, activations quantised as they come; the rest in float32. fp16: "
            "x86 processors compute it in float32 or emulate it, so that its time says nothing of a phone",
        ),
        (
            "ExecuTorch",
            "its C++ libraries behind a C interface, in a process without PyTorch; XNNPACK; the core is one "
            "method that the host calls once a pass",
        ),
        (
            "ONNX Runtime",
            "processor provider; the core's passes are one loop in the graph. One part at a time: without "
            "its second copy of the weights (prepacking)",
        ),
        ("PyTorch", "eager, float32; most of the memory is its import"),
        ("Quiet", quiet(rows)),
    ]
    return [(name, text) for name, text in found if text]


def commands(rows: Rows) -> list[str]:
    """What measured these rows again, phase by phase, since each has its own threads."""
    timed = sorted({(one["n"], one["threads"]) for one in rows.latency.values()})
    weighed = sorted({one["threads"] for one in rows.memory.values()})
    samples = f" samples={rows.quality['samples']}" if rows.quality else ""
    words = [
        f"phase=export,mixers,coreml,quality{samples}",
        *(f"phase=memory threads={count}" for count in weighed),
        *(f"phase=latency rounds={rounds} threads={count}" for rounds, count in timed),
        "phase=report",
    ]
    return [f"python -m benchmarks.mobile work=DIR {word}" for word in words]


def _threads(rows: Rows) -> str:
    """Of what was timed and of what was weighed: each row has its own."""
    timed = sorted({one["threads"] for one in rows.latency.values()})
    weighed = sorted({one["threads"] for one in rows.memory.values()})
    return "; ".join(
        f"{what}: {', '.join(map(str, counts))}" for what, counts in (("latency", timed), ("memory", weighed)) if counts
    )


def draw_latency(rows: Rows, folder: Path) -> Chart | None:
    """Bars by preset, a hue a runtime."""
    if not rows.latency:
        return None
    iterations = min(key.iterations for key, _ in rows.latency)
    wanted = {key: one for (key, part), one in rows.latency.items() if part == "image" and key.iterations == iterations}
    figure = new_figure(3.6)
    axes = figure.add_subplot()
    _bars(
        axes,
        wanted,
        lambda key: wanted[key]["median_ms"] / 1000,
        lambda key: [
            [(wanted[key]["median_ms"] - wanted[key]["q1_ms"]) / 1000],
            [(wanted[key]["q3_ms"] - wanted[key]["median_ms"]) / 1000],
        ],
    )
    axes.set_ylabel("seconds an image")
    return finish(
        figure,
        folder,
        "latency",
        "Latency by runtime",
        f"4 steps of {iterations} iterations, median and quartiles of {next(iter(wanted.values()))['n']} images, "
        f"{next(iter(wanted.values()))['threads']} threads. Darker is fp32, lighter fp16, lightest int8.",
    )


def draw_memory(rows: Rows, folder: Path) -> Chart | None:
    """Peak resident memory against 600 MB."""
    if not rows.memory:
        return None
    iterations = min(key.iterations for key in rows.memory)
    wanted = {
        key: one["image"]["all"]["peak_memory_mb"]
        for key, one in rows.memory.items()
        if key.iterations == iterations and one["image"]["all"]["peak_memory_mb"]
    }
    figure = new_figure(3.6)
    axes = figure.add_subplot()
    _bars(axes, wanted, wanted.__getitem__)
    limit = targets()["memory_mb"]
    axes.axhline(limit, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"{limit:g} MB",
        (1, limit),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        color=MUTED,
        textcoords="offset points",
        va="center",
        fontsize=9,
    )
    axes.set_ylabel("peak resident, MB")
    return finish(
        figure,
        folder,
        "memory",
        "Memory by runtime",
        f"Peak of a fresh process that makes one image, everything loaded, {number(limit)} MB dashed. PyTorch's "
        "import is most of its bar.",
    )


def _bars(axes: Axes, wanted: dict[Setup, object], value, errors=None) -> None:
    presets = list(dict.fromkeys(key.preset for key in sorted(wanted)))
    setups = list(dict.fromkeys((key.runtime, key.dtype) for key in sorted(wanted)))
    width = 0.86 / len(setups)
    for key in wanted:
        place = presets.index(key.preset) + (setups.index((key.runtime, key.dtype)) - (len(setups) - 1) / 2) * width
        axes.bar(place, value(key), 0.92 * width, color=COLOURS[key.runtime], alpha=SHADES[key.dtype], linewidth=0)
        if errors:
            axes.errorbar(place, value(key), np.asarray(errors(key)), color=MUTED, linewidth=0.8)
    axes.set_xticks(range(len(presets)), presets)
    axes.grid(axis="x", visible=False)
    runtimes = list(dict.fromkeys(runtime for runtime, _ in setups))
    axes.legend(
        handles=[Patch(color=COLOURS[one], label=RUNTIME_NAMES[one]) for one in runtimes],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(runtimes),
    )


def _markdown_cell(text: str) -> str:
    """Text that cannot break a Markdown table."""
    return re.sub(r"\s*\n\s*", ", ", text).replace("|", "\\|")
