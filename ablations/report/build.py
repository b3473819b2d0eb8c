"""One grid's outcome -> a folder with index.html, report.md, results.csv and figures."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ablations.answer import stats
from ablations.answer.records import GridOutcome
from ablations.answer.stats import Analysis
from ablations.answer.verdict import ClaimVerdict, analyse_outcome, arms_of, judge_outcome
from ablations.report.charts import Chart
from ablations.report.failures import Failure, failures_of, tidy_paths
from ablations.report.figures import draw_charts
from ablations.report.measures import duration, number, value_of
from ablations.report.palette import ArmStyle, arm_styles, css_variables, drawn_arms, left_out
from ablations.report.places import VERDICT, Neighbour, neighbours
from ablations.report.samples import REAL, SampleGrid, sample_grids
from ablations.report.tables import Table, composition_table, key_table, target_table, trial_table, write_csv
from iris.io.files import write_json

METHODS = {
    "pooled": "seed noise pooled over all arms; seeds have no effect that the arms share",
    "paired": "paired by seed, residual noise pooled over all arms",
    "rounds": "the median ratio of interleaved rounds, by order statistics; no seed changes it",
    "none": "none: one seed an arm gives no estimate of training noise",
}


@dataclass(frozen=True)
class Page:
    """Everything that the templates print."""

    outcome: GridOutcome
    verdict: ClaimVerdict
    analysis: Analysis
    styles: dict[str, ArmStyle]
    key: Table
    targets: Table | None
    composition: Table | None
    trials: Table
    charts: list[Chart]
    samples: list[SampleGrid]
    left_out: str  # which arms figures and samples do not show
    failures: list[Failure]
    facts: list[tuple[str, str]]
    changes: list[tuple[str, str]]  # arm -> what matching changed
    notes: list[str]
    command: str
    next_command: str  # "" when seeds are enough
    departed: list[dict[str, str]]  # from what was registered, this run's first
    registration: str  # when the question was written down, or that it was not
    neighbours: list[Neighbour]  # other reports of this grid


def write_report(outcome: GridOutcome, folder: Path) -> Path:
    """Writes the report of a grid into ``folder`` (made if needed; an older report there is replaced).

    Returns the path of index.html. Raises ValueError when no record is the baseline or ``decide`` cannot be read.
    """
    page = _page_without_figures(outcome)
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        return _write(page, outcome, folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two commands on one grid end at the same time: the second writes when the first has."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write(page: dict[str, Any], outcome: GridOutcome, folder: Path) -> Path:
    figures = folder / "figures"
    for old in figures.glob("*.png"):  # figures of arms or seeds that are gone must not stay beside the new ones
        old.unlink()
    page["neighbours"] = neighbours(folder, outcome.name)
    page["charts"] = draw_charts(outcome, page["analysis"], page["styles"], folder)
    page["samples"] = sample_grids(outcome, drawn_arms(outcome, page["analysis"]), folder)
    write_csv(outcome, folder / "results.csv")
    write_json(folder / VERDICT, verdict_facts(outcome, page))
    light, dark = css_variables()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ablations.report"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=lambda name: bool(name) and name.endswith(".html"),
    )
    environment.filters |= {"md": _markdown_cell, "svg": Markup}
    style = environment.loader.get_source(environment, "style.css")[0] if environment.loader else ""
    values = {"page": Page(**page), "real": REAL, "style": Markup(style), "light": light, "dark": dark}
    for template, name in (("report.md", "report.md"), ("index.html", "index.html")):
        text = environment.get_template(template).render(values)
        (folder / name).write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")
    return folder / "index.html"


def verdict_facts(outcome: GridOutcome, page: dict[str, Any]) -> dict[str, Any]:
    """What the terminal, MLflow and a register of claims read of a report, as plain values."""
    verdict: ClaimVerdict = page["verdict"]
    analysis: Analysis = page["analysis"]
    return {
        "grid": outcome.name,
        "question": outcome.question,
        "claim": outcome.claim,
        "metric": analysis.metric,
        "verdict": verdict.word,
        "sentence": verdict.sentence,
        "sureness": verdict.sureness,
        "reading": verdict.reading,
        "answers": verdict.answers,
        "registration": page["registration"],
        "departures": (outcome.registration or {}).get("now", []),
        "arms": {arm: _arm_facts(analysis, arm) for arm in analysis.arms},
        "seeds": sorted({record.seed for record in outcome.records}),
        "judge": {name: outcome.judge.get(name) for name in ("name", "sha256")},
        "data": {name: outcome.data.get(name) for name in ("name", "fingerprint")},
        "hardware": outcome.hardware,
        "commit": outcome.commit,
        "command": page["command"],
        "next_command": page["next_command"],
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _arm_facts(analysis: Analysis, arm: str) -> dict[str, Any]:
    """An arm's mean with its interval, and how it compares with the baseline: as a fraction of it on the log scale."""
    summary, comparison = analysis.arms[arm], analysis.comparisons.get(arm)
    known = {"mean": summary.mean, "low": summary.low, "high": summary.high, "seeds": len(summary.values)}
    if comparison is None:
        return known | {"verdict": "baseline"}
    difference = {"mean": comparison.difference, "low": comparison.low, "high": comparison.high}
    return known | {"verdict": comparison.verdict, "difference": difference, "scale": analysis.scale}


def _page_without_figures(outcome: GridOutcome) -> dict[str, Any]:
    analysis, styles = analyse_outcome(outcome), arm_styles(outcome)
    command = tidy_paths(outcome.command)
    verdict = judge_outcome(outcome, analysis)
    changes = [(arm, next((t.matched for t in trials if t.matched), "")) for arm, trials in arms_of(outcome).items()]
    return {
        "outcome": outcome,
        "verdict": verdict,
        "analysis": analysis,
        "styles": styles,
        "key": key_table(outcome, analysis, styles),
        "targets": target_table(outcome, styles),
        "composition": composition_table(outcome, styles),
        "trials": trial_table(outcome, styles),
        "left_out": left_out(outcome, analysis),
        "failures": failures_of(outcome),
        "facts": _facts(outcome, analysis),
        "changes": [c for c in changes if c[1]],
        "notes": [tidy_paths(note) for note in outcome.notes],
        "command": command,
        "departed": _departed(outcome),
        "registration": registration_words(outcome),
        "next_command": more_seeds(command) if verdict.word == stats.NOT_ENOUGH_SEEDS else "",
    }


def _departed(outcome: GridOutcome) -> list[dict[str, str]]:
    known = outcome.registration or {"departures": [], "now": []}
    return sorted(known["departures"], key=lambda entry: entry["what"] not in known["now"])


def registration_words(outcome: GridOutcome) -> str:
    """When the question was written down, with its hash; exploratory where trials were finished before."""
    known = outcome.registration
    if known is None:
        return "Exploratory: the question was not registered before its trials."
    hashed = f"{known['when'][:16]}, sha256 {known['sha256'][:16]}"
    text = f"Registered {hashed}, before the first trial."
    if known["finished"]:
        done = f"{known['finished']} of {known['trials']} trials were finished"
        text = f"Exploratory: {done} when the question was registered, {hashed}."
    if known["earlier"]:
        times = "once" if known["earlier"] == 1 else f"{known['earlier']} times"
        text += f" Before it the grid was registered {times} with other settings."
    return text


def more_seeds(command: str) -> str:
    """The command with three seeds."""
    words = [word for word in shlex.split(command) if not word.startswith(("seeds=", "action=", "reason="))]
    return " ".join([*map(shlex.quote, words), "'seeds=[0,1,2]'"])


def _setting(outcome: GridOutcome, *path: str) -> str:
    """The setting's value over all trials, distinct ones in order; "" where no trial has it."""
    found = []
    for record in outcome.records:
        value: Any = record.settings
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None and str(value) not in found:
            found.append(str(value))
    return ", ".join(found)


def _facts(outcome: GridOutcome, analysis: Analysis) -> list[tuple[str, str]]:
    """How it was measured; lines without a value are left out."""
    counts = sorted({int(v) for r in outcome.records if (v := value_of(r.metrics, "samples")) is not None})
    seeds = sorted({r.seed for r in outcome.records})
    steps, hardware = _setting(outcome, "train", "steps"), outcome.hardware
    generated = f"{' or '.join(f'{n:,}' for n in counts)} generated pictures a trial"
    facts = [
        ("Judge", _named(outcome.judge, "sha256")),
        ("Samples", generated if counts else ""),
        ("Data", _named(outcome.data, "fingerprint")),
        ("Seeds", f"{len(seeds)} an arm ({', '.join(map(str, seeds))})"),
        ("Training", f"{steps} steps a trial" if steps else ""),
        (
            "Matching",
            "none" if outcome.match == "none" else f"{outcome.match}: swapped parts resized to the baseline's",
        ),
        ("Statistics", _statistics(analysis)),
        ("Hardware", _machine(hardware)),
        ("Trained on", _trained_on(outcome)),
        ("Threads", str(hardware.get("threads") or "")),
        ("PyTorch", str(hardware.get("torch") or "")),
        ("Commit", outcome.commit),
        ("Time", duration(outcome.wall_seconds) if outcome.wall_seconds else ""),
    ]
    return [(name, tidy_paths(text)) for name, text in facts if text]


def _named(record: dict[str, Any], digest: str) -> str:
    """Name, sizes where there are any, and the digest of a judge or a data set."""
    parts = [str(record.get("name") or "")]
    parts += [f"{record[k]:,} {k}" for k in ("train", "validation") if isinstance(record.get(k), int)]
    parts += [f"{digest} {record[digest]}"] if record.get(digest) else []
    return ", ".join(part for part in parts if part)


def _machine(hardware: dict[str, Any]) -> str:
    parts = [str(hardware[k]) for k in ("device", "cpu") if hardware.get(k)]
    parts += [f"{hardware['cores']} cores"] if hardware.get("cores") else []
    parts += [f"{float(hardware['memory_gb']):.3g} GB memory"] if hardware.get("memory_gb") else []
    return ", ".join(parts)


def _trained_on(outcome: GridOutcome) -> str:
    """Devices of the trials, where they are not those of the machine that the report is written on."""
    here = (outcome.hardware.get("device"), outcome.hardware.get("cpu"))
    made = {(r.environment.get("device"), r.environment.get("cpu")) for r in outcome.records if r.environment}
    if made <= {here}:
        return ""
    return "; ".join(sorted(", ".join(str(part) for part in one if part) for one in made))


def _statistics(analysis: Analysis) -> str:
    text = METHODS[analysis.noise.method]
    if analysis.noise.correlation is not None:
        text += f"; measured correlation between arms at equal seeds {number(analysis.noise.correlation, 2)}"
    if analysis.scale == "log":
        text += "; compared on the log scale"
    if analysis.noise.method == "rounds":
        return text
    if analysis.noise.method == "none":
        return f"{text}; intervals corrected for all comparisons (Bonferroni)"
    return f"{text}; intervals hold together (as Dunnett's), and none is narrower than its arms' own noise allows"


def _markdown_cell(text: str) -> str:
    """Text that cannot break a Markdown table."""
    return re.sub(r"\s*\n\s*", ", ", text).replace("|", "\\|")
