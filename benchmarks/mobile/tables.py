"""The tables and sentences of the mobile report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ablations.report.measures import DASH, number
from ablations.report.tables import Cell, Row, Table
from benchmarks.mobile.plan import DTYPES, PRESETS, Setup
from benchmarks.mobile.rows import Rows, ratio_to_pytorch, smallest_cap, without_iterations
from eval.export import PARTS
from eval.export.host.pipeline import size_of
from eval.speed.caps import CAPS_MB, CapResult, proven
from eval.speed.latency import QUOTED, few_rounds
from eval.targets import TargetResult, check, published, targets

ALLOWED = 1e-3  # relative, of what is computed in float32
STARRED = "* the machine was not quiet, or the times spread by more than 10 %."
PART_TITLES = dict(zip(PARTS, ("text encoder", "generator", "decoder"), strict=True))


def cell(value: float | None, note: str = "", kind: str = "") -> Cell:
    return Cell(number(value), note=note, kind=kind)


def caps_table(rows: Rows) -> Table:
    """The smallest cap under which each setup made an image: everything loaded, and one part at a time."""
    columns = [
        ("peak", "MB"),
        ("of it import", "MB"),
        ("weights", "MB"),
        ("smallest cap", "all loaded"),
        ("above the import", "all loaded"),
        ("smallest cap", "one part at a time"),
        ("peak", "one part, MB"),
    ]
    lines = []
    for key in rows.keys:
        image = rows.memory.get(key, {}).get("image", {})
        whole, one = image.get("all", {}), image.get("one part", {})
        lines.append(
            Row(
                key.label,
                [
                    cell(whole.get("peak_memory_mb")),
                    cell(whole.get("import_mb")),
                    cell(whole.get("weights_mb")),
                    _cap(rows, key, "all"),
                    _cap(rows, key, "all", "above import"),
                    _cap(rows, key, "one part"),
                    cell(one.get("peak_memory_mb")),
                ],
            )
        )
    tried = sorted({run["cap_mb"] for runs in rows.caps.values() for run in runs if run["scope"] == "process"})
    foot = [
        f"Caps tried: {', '.join(f'{cap:g}' for cap in tried or CAPS_MB)} MB, by RLIMIT_DATA on a fresh process that "
        "imports, loads and makes one image: private writable memory, without code and mapped files. "
        "“Above the import” leaves the runtime's own import out of the budget. " + _control(rows)
    ]
    return Table(columns, lines, foot)


def _cap(rows: Rows, key: Setup, resident: str, scope: str = "process") -> Cell:
    if (key, resident) not in rows.caps:
        return Cell(DASH)
    found = smallest_cap(rows, key, resident, scope)
    if found is None:
        return Cell("none", kind="target-fail")
    return Cell(f"{found:g}", kind="target-pass" if found <= targets()["memory_mb"] else "")


def _control(rows: Rows) -> str:
    """Whether the caps limited something."""
    good = sum(proven(_results(runs)) for runs in rows.caps.values())
    return (
        f"Control: with half of the memory that it needs, a run fails in {good} of {len(rows.caps)} cases."
        if rows.caps
        else ""
    )


def _results(runs: Iterable[dict[str, Any]]) -> list[CapResult]:
    return [CapResult(**run) for run in runs]


def latency_table(rows: Rows) -> Table:
    """Milliseconds of an image, and the ratio to PyTorch in the same round."""
    iterations = sorted({key.iterations for key, _ in rows.latency})
    columns = [(f"4 × {count}", unit) for count in iterations for unit in ("ms", "ratio to PyTorch")]
    lines = []
    for key in without_iterations(rows):
        cells = []
        for count in iterations:
            found = rows.latency.get((key.at(count), "image"))
            if found is None:
                cells += [Cell(DASH), Cell(DASH)]
                continue
            spread = f"{number(found['q1_ms'])} to {number(found['q3_ms'])}" + (" *" if found["contended"] else "")
            ratio = ratio_to_pytorch(found)
            between = "" if ratio is None else f"{number(found['ratio_q1'])} to {number(found['ratio_q3'])}"
            cells += [cell(found["median_ms"], spread), cell(ratio, between)]
        lines.append(Row(f"{key.preset}, {key.name}", cells, baseline=key.runtime == "pytorch"))
    few = few_rounds(min((one["n"] for one in rows.latency.values()), default=QUOTED))
    return Table(
        columns,
        lines,
        [
            "Median and quartiles; runtimes in turn, there and back, in processes of their own.",
            *([few] if few else []),
            STARRED,
        ],
    )


def parts_table(rows: Rows) -> Table:
    """Milliseconds and peak memory of each part alone."""
    columns = [(title, unit) for title in PART_TITLES.values() for unit in ("ms", "peak MB", "weights MB")]
    lines = []
    for key in rows.keys:
        memory = rows.memory.get(key, {}).get("parts", {})
        cells = []
        for part in PART_TITLES:
            timed, held = rows.latency.get((key, part), {}), memory.get(part, {})
            star = " *" if timed.get("contended") else ""
            cells += [
                Cell(f"{number(timed.get('median_ms'))}{star}"),
                cell(held.get("peak_memory_mb")),
                cell(held.get("weights_mb")),
            ]
        lines.append(Row(key.label, cells))
    return Table(
        columns,
        lines,
        [
            "One evaluation of the generator. Peaks are of a process that holds this part alone, its import included.",
            STARRED,
        ],
    )


def agreement_table(rows: Rows) -> Table:
    """Relative distance from PyTorch in float32, of each exported file and of the whole image."""
    columns = [*((title, "") for title in ("text encoder", "generator", "decoder")), ("image", "4 steps")]
    files = {(one["preset"], one["runtime"], one["dtype"], one["part"], one["iterations"]): one for one in rows.files}
    lines = []
    for key in sorted(rows.agreement):
        cells = []
        for part in PART_TITLES:
            names = (key.preset, key.runtime, key.dtype, part)
            entry = files.get((*names, key.iterations)) or files.get((*names, None))
            cells.append(_error(entry["agreement"]["rms"] if entry else None, key.dtype))
        cells.append(_error(rows.agreement[key]["rms"], key.dtype))
        lines.append(Row(key.label, cells))
    return Table(
        columns,
        lines,
        [
            "Root mean square of the difference over that of PyTorch's output, equal inputs; of an image, equal token numbers "
            f"and noise. In fp32, more than {ALLOWED:g} would be red. ExecuTorch's generator file is one for all iterations "
            "and was compared at the preset's own."
        ],
    )


def _error(value: float | None, dtype: str) -> Cell:
    if value is None:
        return Cell(DASH)
    return Cell(f"{value:.1e}", kind="target-fail" if dtype == "fp32" and value > ALLOWED else "")


def files_table(rows: Rows) -> Table:
    """Sizes, and what ExecuTorch's delegate took."""
    columns = [("size", "MB"), ("subgraphs in XNNPACK", ""), ("operators left", ""), ("planned activations", "MB")]
    lines = []
    for one in sorted((one for one in rows.files if one["runtime"] == "executorch"), key=_file_order):
        methods = one["methods"].values()
        left = sum(sum(method["undelegated"].values()) for method in methods)
        lines.append(
            Row(
                f"{one['preset']}, ExecuTorch {one['dtype']}, {one['part']}",
                [
                    cell(size_of(one) / 1e6),
                    Cell(str(sum(method["delegates"] for method in methods))),
                    Cell(str(left)),
                    cell(max(method["planned_bytes"] for method in methods) / 1e6),
                ],
            )
        )
    return Table(
        columns,
        lines,
        [
            "The generator's numbers are of its three methods together, planned memory of the "
            "largest, since they share it."
        ],
    )


def _file_order(one: dict[str, Any]) -> tuple[Any, ...]:
    return PRESETS.index(one["preset"]), PARTS.index(one["part"]), DTYPES["executorch"].index(one["dtype"])


def mixers_table(rows: Rows) -> Table:
    """Every mixer alone in ExecuTorch."""
    cases = sorted({(one["dtype"] != "fp32", one["side"], one["dtype"]) for one in rows.mixers})
    columns = [(f"{dtype}, {side}×{side}", "") for _, side, dtype in cases] + [("left to portable kernels", "fp32")]
    found = {(one["mixer"], one["side"], one["dtype"]): one for one in rows.mixers}
    lines = []
    for mixer in dict.fromkeys(one["mixer"] for one in rows.mixers):
        cells = []
        for _, side, dtype in cases:
            one = found.get((mixer, side, dtype), {})
            failed = one.get("failed")
            cells.append(Cell(failed, kind="target-fail") if failed else _error(one.get("rms"), dtype))
        left = found.get((mixer, *cases[0][1:]), {}).get("undelegated", {})
        cells.append(Cell(", ".join(f"{name} {count}" for name, count in left.items()) or "nothing"))
        lines.append(Row(mixer, cells))
    return Table(
        columns, lines, ["64 channels, 4 heads, every weight drawn and none zero; relative distance from PyTorch."]
    )


def quality_table(rows: Rows) -> Table | None:
    """The shipped model after quantisation."""
    if rows.quality is None:
        return None
    lines = [
        Row(
            one["dtype"],
            [
                Cell(number(one["fd"]), error=number(one["fd_se"])),
                Cell(f"{one['change']:+.3f}", error=number(one["change_se"], 2))
                if one["dtype"] != "fp32"
                else Cell(DASH),
                cell(one["pixel_rms"]),
                cell(one["bytes"] / 1e6),
            ],
            baseline=one["dtype"] == "fp32",
        )
        for one in rows.quality["rows"]
    ]
    return Table(
        [
            ("FD (shapes)", "lower is better"),
            ("change", "from fp32"),
            ("pixels' difference", "rms of 255"),
            ("files", "MB"),
        ],
        lines,
    )


def coreml_table(rows: Rows) -> Table | None:
    """What converts."""
    if not rows.coreml:
        return None
    lines = [
        Row(
            f"{one['preset']}, {one['part']}" if "preset" in one else f"mixer {one['part']}",
            [
                Cell(one["status"], kind="" if one["converted"] else "target-fail"),
                Cell(str(sum(one["operations"].values()) or DASH)),
                cell(one["size"] / 1e6 or None),
            ],
        )
        for one in rows.coreml
    ]
    return Table([("Core ML", "fp16"), ("operations", ""), ("package", "MB")], lines)


def target_results(rows: Rows) -> list[tuple[Setup, list[TargetResult]]]:
    """The phone targets for each preset in half precision, by weights, live tensors and runs under caps."""
    found = []
    for key in rows.keys:
        plain = next(
            (
                rows.memory[one]
                for one in rows.memory
                if (one.preset, one.runtime, one.iterations) == (key.preset, "pytorch", key.iterations)
            ),
            None,
        )
        if key.dtype != "fp16" or plain is None:
            continue
        weights = rows.memory.get(key, {}).get("image", {}).get("all", {}).get("weights_mb")
        timed = rows.latency.get((key, "image"), {})
        metrics = {
            "weights_mb": weights,
            "activations_mb": plain["image"]["all"]["activations_mb"],
            "nfe": 4,
            "latency_ms": timed.get("median_ms"),
        }
        found.append((key, check(metrics, "float16", _results(rows.caps.get((key, "all"), [])))))
    return found


def passed_beside_import(rows: Rows) -> list[Setup]:
    """Those that meet the memory target although a whole process, its runtime's import included, fails under it."""
    limit, found = targets()["memory_mb"], []
    for key, results in target_results(rows):
        failed = any(
            not one["held"]
            for one in rows.caps.get((key, "all"), [])
            if (one["cap_mb"], one["scope"]) == (limit, "process")
        )
        found += [key] if results[0].verdict == "pass" and failed else []
    return found


def targets_table(rows: Rows) -> Table | None:
    """A verdict for each target; nothing about a phone is guessed."""
    found = target_results(rows)
    if not found:
        return None
    columns = [(one.name.replace("_", " "), one.target) for one in found[0][1]]
    lines = [
        Row(
            key.label,
            [
                Cell(one.verdict, note=f"{one.measured}; {one.why}", kind=f"target-{one.verdict.replace(' ', '-')}")
                for one in results
            ],
        )
        for key, results in found
    ]
    return Table(columns, lines)


def published_table() -> Table:
    """What others state of their systems."""
    columns = [("device", ""), ("image", "pixels"), ("steps", ""), ("latency", ""), ("memory", ""), ("source", "")]
    return Table(
        columns,
        [
            Row(
                one.system,
                [
                    Cell(one.device),
                    Cell(f"{one.resolution}×{one.resolution}"),
                    Cell(one.steps),
                    Cell(one.latency),
                    Cell(one.memory),
                    Cell(one.source),
                ],
            )
            for one in published()
        ],
    )
