"""``python -m eval.compare A B``: what differs between two models, and whether it is more than noise."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console

    from eval.report.comparison import Comparison
    from eval.results import Results
    from eval.speed.latency import SpeedAndMemory
    from iris.io.progress import Progress

DESCRIPTION = """\
Paired differences B - A of two results of python -m eval (their folders, or results.json), or of two models, which are
measured now; settings such as data=shapes or measure.samples=1024 are those of python -m eval.

  python -m eval.compare eval_results/one eval_results/other
  python -m eval.compare text-0123456789ab iris/weights/shapes measure.samples=512 measure.what=quality,alignment
"""
ROUNDS, WARMUP = 30, 3  # of --speed


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}\n")


def share(text: str) -> float:
    """A confidence in (0, 1)."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number between 0 and 1, such as 0.95")
    return value


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m eval.compare", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("first", metavar="A", help="results, or a model")
    add("second", metavar="B", help="results, or a model")
    add("settings", nargs="*", metavar="key=value", help="of models that are measured now")
    add("--out", type=Path, metavar="FILE", help="JSON file (default: eval_results/<A>-against-<B>.json)")
    add("--confidence", type=share, default=0.95, help="of the intervals (default: %(default)s)")
    add("--speed", action="store_true", help="time both models now, in turn, and give the ratio of their latencies")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow each other down
    parser = make_parser()
    given = parser.parse_intermixed_args(arguments)
    if given.out is not None and given.out.suffix != ".json":
        parser.error(f"argument --out: {given.out} must end in .json")
    from eval.evaluate import MeasureFailed
    from eval.speed.workers import WorkerError
    from iris.errors import SettingError
    from iris.io.command import failed

    try:
        return run(given)
    except SettingError as error:
        return failed(error, 2)
    except (MeasureFailed, WorkerError) as error:
        return failed(error, 1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def run(given: argparse.Namespace) -> int:
    """Read or measure both sides, compare them, print and write the comparison."""
    from eval.report.comparison import compare_results
    from eval.results import read_results
    from iris.errors import SettingError
    from iris.io.progress import Progress

    there = [is_results(place) for place in (given.first, given.second)]
    if all(there) and given.settings:
        raise SettingError(f"{given.settings[0]}: settings are for models that are measured now; A and B are results")
    with Progress() as progress:
        a, b = (
            read_results(place) if found else _measured(place, given.settings, progress)
            for place, found in zip((given.first, given.second), there, strict=True)
        )
        found = compare_results(a, b, given.confidence)
        speed = _speed(a, b, progress) if given.speed else None
        print_comparison(a, b, found, speed, progress.console)
        out = given.out or Path("eval_results") / f"{_folder(a, given.first)}-against-{_folder(b, given.second)}.json"
        write_comparison(out, a, b, found, speed)
        progress.say(f"JSON      {out}")
    return 0


def is_results(place: str) -> bool:
    """Whether a path holds results; anything else is a model to be measured."""
    from eval.results import RESULTS

    path = Path(place).expanduser()
    return path.suffix == ".json" or (path / RESULTS).is_file()


def _measured(model: str, settings: Sequence[str], progress: Progress) -> Results:
    from eval.evaluate import evaluate

    results, folder = evaluate([f"model={model}", *settings], progress)
    progress.say(f"results of {results.name}: {folder}")
    return results


def _folder(results: Results, place: str) -> str:
    path = Path(place).expanduser().resolve()
    return path.parent.name if path.suffix == ".json" else path.name if is_results(place) else results.name


def _speed(a: Results, b: Results, progress: Progress) -> dict[str, SpeedAndMemory]:
    """Latency and memory of both models, timed in turn in fresh processes."""
    from eval.speed.latency import measure_models
    from iris.io.progress import waiting

    loaders = {"A": loader_of(a), "B": loader_of(b)}
    threads = a.settings["measure.threads"]
    with waiting(progress, "latency of A and B in turn"):
        return measure_models(loaders, ROUNDS, WARMUP, threads, a.settings["measure.timeout"])


def loader_of(results: Results) -> Any:
    """How a process gets the model that results are of.

    Raises:
        SettingError: stored images, or a model that is no longer the one that was measured.
    """
    from eval.subjects import Sample, open_subject
    from iris.errors import SettingError

    model, settings = results.model, results.settings
    if model["stored_images"] is not None:
        raise SettingError(f"--speed: {model['path']} are stored images; there is no model to time")
    sample = Sample(
        **{name.removeprefix("sample."): value for name, value in settings.items() if name.startswith("sample.")}
    )
    subject = open_subject(model["path"], model["kind"], sample, model["dtype"], model["device"])
    if subject.fingerprint != model["fingerprint"]:
        raise SettingError(f"--speed: the files of {model['path']} have changed since they were measured")
    return subject.loader(next((row["caption"] for row in results.per_image if row["caption"]), subject.example()))


def print_comparison(
    a: Results, b: Results, found: Comparison, speed: dict[str, SpeedAndMemory] | None, console: Console
) -> None:
    """The differences as a table, what was refused, and how to read it."""
    from rich.text import Text

    from eval.report.comparison import EQUAL, by_chance
    from eval.report.summary import print_table
    from eval.report.tables import Table

    shown = [one for one in found.differences if one.verdict != EQUAL]
    judged = f"/{a.judge['name']}" if a.judge else ""
    rows = [
        [one.metric.removesuffix(judged), *difference_cells(one), one.verdict, one.pairing or "none"] for one in shown
    ]
    percent = f"{100 * found.confidence:g} %"
    judge = f"Judge: {a.judge['name']}. " if a.judge else ""
    note = (
        f"A: {a.name} ({a.model['path']}). B: {b.name} ({b.model['path']}). {judge}Pairs have the same prompt"
        f"{' and noise' if found.same_noise else ''}. Were A and B one model, about "
        f"{by_chance(shown, found.confidence):.1f} of the intervals would leave out 0."
    )
    head = ["metric", "A", "B", "B - A", f"{percent} interval", "verdict", "pairs"]
    print_table(Table("B - A", head, rows, note), console)
    equal = [one.metric for one in found.differences if one.verdict == EQUAL]
    if equal:
        console.print(Text(f"equal in every pair: {', '.join(equal)}"), soft_wrap=True)
    for name, why in found.refused.items():
        console.print(Text(f"not compared: {name}: {why}"), soft_wrap=True)
    if speed is not None:
        console.print(Text(speed_line(speed)), soft_wrap=True)


def difference_cells(one: Any) -> list[str]:
    """A, B, B - A and the interval, to the digits that it allows."""
    from eval.report.tables import digits_of
    from eval.results import Number

    digits = digits_of(Number(one.value, "", "", one.low, one.high, one.standard_error, None, "", one.n))
    ends = "–" if one.low is None else f"[{one.low:+,.{digits}f}, {one.high:+,.{digits}f}]"
    return [f"{one.first:,.{digits}f}", f"{one.second:,.{digits}f}", f"{one.value:+,.{digits}f}", ends]


def speed_line(speed: dict[str, SpeedAndMemory]) -> str:
    """The ratio of the latencies in words."""
    one, first = speed["B"].latency, speed["A"].latency
    text = (
        f"latency of one image, B / A: {one.ratio_to_first:.3f} (quartiles {one.ratio_q1:.3f} to "
        f"{one.ratio_q3:.3f} of {one.n} rounds in turn); A {first.median_ms:.1f} ms, B {one.median_ms:.1f} ms on "
        f"{one.threads} thread(s)"
    )
    reasons = dict.fromkeys((*first.reasons, *one.reasons))
    return f"{text}; contended: {', '.join(reasons)}" if reasons else text


def write_comparison(
    out: Path, a: Results, b: Results, found: Comparison, speed: dict[str, SpeedAndMemory] | None
) -> None:
    """Everything as JSON."""
    from iris.io.files import write_json

    out.parent.mkdir(parents=True, exist_ok=True)
    sides = {
        side: {
            "name": one.name,
            "model": one.model,
            "judge": one.judge.get("name"),
            "judge_sha256": one.judge.get("sha256"),
            "data": one.data,
            "hardware": one.hardware,
            "command": one.command,
        }
        for side, one in (("A", a), ("B", b))
    }
    timed = None if speed is None else {side: asdict(one) for side, one in speed.items()}
    write_json(
        out,
        {
            "format": 1,
            **sides,
            "confidence": found.confidence,
            "same_noise": found.same_noise,
            "refused": found.refused,
            "speed": timed,
            "differences": {one.metric: asdict(one) for one in found.differences},
        },
    )


if __name__ == "__main__":
    sys.exit(main())
