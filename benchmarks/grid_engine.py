"""What a grid costs beside its trials; writes benchmarks/grid_engine.md.

    python -m benchmarks.grid_engine [trials=1000] [scale=default] [work=DIR]

A grid of a thousand trials is planned, submitted to a real Slurm on this machine as job arrays of jobs that do nothing (and
cancelled), looked at, and reported from made-up results. Then ``grid=mixers`` runs, at ``scale=smoke`` or, with
``scale=default``, as it is (half an hour), and the wall clock of that command is divided into what is training and measuring and
what is not. Its runs and report are left in ``work``, if that is given. Each row is a process of its own. Beside
seconds on the clock there is processor time, which other processes on the machine do not change.

Submitting needs root and Debian's packages of Slurm (tests/cluster/cluster.sh installs them); without, that row is left out.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
MIXERS, PASSES, RATES = ("grfm", "attention", "fourier", "recurrence", "spatial"), 8, 25
TARGETS = {"plan": 5.0, "submit": 10.0, "status": 2.0, "report": 30.0, "told": 40.0}  # seconds for a thousand trials


def main() -> None:
    """Measure every row and write the page."""
    given = {"trials": "1000", "scale": "smoke", "work": ""} | dict(word.split("=", 1) for word in sys.argv[1:])
    trials, load = int(given["trials"]), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="grid-engine-") as folder:
        rows = {
            name: in_process(name, trials, f"{folder}/{name}")
            for name in ("plan", "submit", "look", "status", "report", "told", "driver")
        }
        parts = overhead(Path(given["work"] or f"{folder}/grid"), given["scale"])
    text = page(trials, {name: row for name, row in rows.items() if row}, parts, given["scale"], load)
    Path(__file__).with_suffix(".md").write_text(text)
    print(text)


def in_process(name: str, trials: int, folder: str) -> dict[str, Any]:
    """What the function ``name`` of this module returns in a fresh process."""
    code = f"import json; from benchmarks.grid_engine import {name}; print(json.dumps({name}({trials}, {folder!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def page(trials: int, rows: dict[str, dict[str, Any]], parts: dict[str, float], scale: str, load: float) -> str:
    """The Markdown page."""
    import torch

    from iris.io.machine import processor_name

    names = {
        "plan": "plan: expand, match parameters, check and name every trial",
        "submit": "submit to Slurm as job arrays",
        "look": "a driver's look at all of them, twice a second",
        "status": "`action=status`, the whole command",
        "report": "the report",
        "told": "MLflow told of all of them: curves, measures, pictures, into a new sqlite store",
        "driver": "`action=report`, the whole command: plan, tell MLflow of every trial, and the report",
    }
    table = [
        f"| {names[name]} | {row['seconds']:.2f} | {row['processor']:.2f} | {TARGETS.get(name, '') or '–'} | "
        f"{row['peak_mb']:.0f} | {row.get('note', '')} |"
        for name, row in rows.items()
    ]
    whole = sum(parts.values())
    work = sum(parts[name] for name in WORK)
    return "\n".join(
        [
            f"# The grid engine: {trials} trials",
            "",
            f"`uv run python -m benchmarks.grid_engine`, {processor_name()}, {os.cpu_count()} cores, torch {torch.__version__}, load "
            f"average {load:.1f} before the first row. Seconds on the clock suffer from that load; processor seconds, those of the "
            "process and its children, do not. MB is the peak resident memory of the process, in 10^6 bytes; the driver's target is 1,000.",
            "",
            "| | seconds | processor seconds | target, seconds | MB | |",
            "|---|---|---|---|---|---|",
            *table,
            "",
            "## What is not training or measuring",
            "",
            f"`grid=mixers` at `scale={scale}`: where the command's wall clock goes.",
            "",
            "| | seconds |",
            "|---|---|",
            *(f"| {name} | {seconds:.1f} |" for name, seconds in parts.items()),
            f"| all | {whole:.1f} |",
            "",
            f"What is not training or measuring takes {whole - work:.1f} s, {100 * (whole - work) / whole:.1f} % of the whole.",
            "",
        ]
    )


# -- the rows, each in its own process --------------------------------------------------------------------------------


@contextmanager
def measured(into: dict[str, Any]) -> Iterator[None]:
    """Seconds, processor seconds and peak memory of what is done inside."""
    before, started = _processor_seconds(), time.monotonic()
    yield
    into |= {"seconds": time.monotonic() - started, "processor": _processor_seconds() - before, "peak_mb": _peak_mb()}


def _processor_seconds() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _peak_mb() -> float:
    """Of this process alone: ru_maxrss would hold the parent's from before it was replaced."""
    return _megabytes("VmHWM", Path("/proc/self/status").read_text())


def _megabytes(what: str, status: str) -> float:
    """A row of /proc/PID/status, in MB as the targets are, of 10^6 bytes."""
    return int(re.search(rf"{what}:\s+(\d+) kB", status)[1]) * 1024 / 1e6


def words(trials: int, folder: str) -> list[str]:
    """The command line of a grid of this many trials: mixers x passes x learning rates, seeds for what is left."""
    arms = len(MIXERS) * PASSES * RATES
    rates = [round(1e-3 * 1.05**k, 6) for k in range(RATES)]
    axes = f"{{model.mixer: [{','.join(MIXERS)}], model.iterations: {[*range(1, PASSES + 1)]}, train.learning_rate: {rates}}}"
    seeds = list(range(max(1, trials // arms)))
    return [
        "grid=mixers",
        "scale=smoke",
        f"grid.axes={axes}",
        "grid.match=params",
        f"seeds={seeds}".replace(" ", ""),
        f"runs_dir={folder}/runs",
        f"reports_dir={folder}/reports",
        "launcher.interrupt=detach",
    ]


def _plan(trials: int, folder: str, *more: str) -> tuple[Any, Any]:
    """The plan, and the settings that it was made from."""
    from ablations.question.plan import make_plan
    from ablations.question.settings import TREE

    settings = TREE.build([*words(trials, folder), *more])
    return make_plan(settings), settings


def plan(trials: int, folder: str) -> dict[str, Any]:
    """Seconds to plan, torch imported."""
    import ablations.question.plan  # noqa: F401

    row: dict[str, Any] = {}
    with measured(row):
        planned, _ = _plan(trials, folder)
    return row | {"note": f"{len(planned.trials)} trials of {len(planned.arms)} arms"}


def nothing(folder: str, plan: dict[str, Any]) -> None:
    """A job that does nothing."""


def jobs_of(trials: int, folder: str) -> tuple[list[Any], Any]:
    """A job that does nothing for each trial, with the trial's own plan; and the settings of a launcher on Slurm."""
    from ablations.launch.job import Job

    planned, settings = _plan(
        trials, folder, "launcher=slurm", "launcher.gpus_per_trial=0", "launcher.memory_gb=1", "threads=1"
    )
    import benchmarks.grid_engine as module

    return [
        Job(t.key, module.nothing, planned.job_plan(t), planned.folder(t)) for t in planned.trials
    ], settings.launcher


def submit(trials: int, folder: str) -> dict[str, Any]:
    """Seconds to submit all trials as arrays; they are cancelled then. Empty where there is no Slurm."""
    from ablations.launch.slurm import Slurm

    place, row = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp")), {}
    script = str(TESTS / "cluster" / "cluster.sh")
    try:
        if (
            os.geteuid()
            or subprocess.run(["bash", script, "up", "none", str(place)], stdout=sys.stderr, check=False).returncode
        ):
            return {}
        os.environ["SLURM_CONF"] = str(place / "slurm.conf")
        jobs, launcher = jobs_of(trials, folder)
        backend = Slurm(launcher, Path(folder) / "slurm", 1)
        with measured(row):
            backend.begin(jobs)
        ids = {number.partition("_")[0] for number in backend.ids.values()}
        backend.cancel()
        return row | {"note": f"{len(backend.ids)} jobs in {len(ids)} arrays"}
    finally:
        subprocess.run(["bash", script, "down", "x", str(place)], capture_output=True, check=False)
        shutil.rmtree(place, ignore_errors=True)


def look(trials: int, folder: str) -> dict[str, Any]:
    """Seconds of one look of a driver at trials that all wait for local workers."""
    from rich.console import Console

    from ablations.launch.backend import JobRun
    from ablations.launch.pool import Pool
    from ablations.session.watch import Watch

    class Waiting(Pool):
        """No worker is started."""

        def _fill(self, wanted: int) -> bool:
            return True

    jobs, launcher = jobs_of(trials, folder)
    watch = Watch("grid", console=Console(file=open(os.devnull, "w")))
    for job in jobs:
        watch.add_trial(job.key, job.key, 0, job.folder)
    run = JobRun(jobs, Waiting(launcher, Path(folder) / "look", 1), lambda job: None, lambda job, error: None)
    row: dict[str, Any] = {}
    with measured(row):
        for _ in range(10):
            watch.update()
            run.look()
    return {**row, "seconds": row["seconds"] / 10, "processor": row["processor"] / 10}


def status(trials: int, folder: str) -> dict[str, Any]:
    """Seconds of ``action=status`` on a grid of which most is done."""
    from ablations.session.grid_record import GridRecord, record_path

    planned, settings = _plan(trials, folder)
    record = GridRecord.of(planned, "mixers", settings.grid.question, "", settings.launcher)
    record.save(record_path(settings))
    for number, trial in enumerate(planned.trials):
        _made_up(planned.folder(trial), number)
    row, printed = _command([*words(trials, folder), "action=status"])
    counted = next(line for line in printed if line.startswith(f"{len(planned.trials)} trials: "))
    return row | {"note": counted.partition(";")[0]}


def _command(given: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Run the command with these words; what it took, its own peak memory, and the lines that it printed."""
    code = "import sys; from ablations.run import main; main(sys.argv[1:]); print(open('/proc/self/status').read())"
    row: dict[str, Any] = {}
    with measured(row):
        done = subprocess.run(
            [sys.executable, "-c", code, *given], cwd=ROOT, capture_output=True, text=True, check=True
        )
    return row | {
        "peak_mb": _megabytes("VmHWM", done.stdout),
        "file_mb": _megabytes("RssFile", done.stdout),
    }, done.stdout.splitlines()


def _made_up(folder: Path, number: int) -> None:
    """The files of a trial: of ten, seven done, one failed, one begun and one waiting."""
    kind = ("done",) * 7 + ("failed", "begun", "waiting")
    folder.mkdir(parents=True, exist_ok=True)
    if kind[number % 10] == "waiting":
        return
    (folder / "claim").touch()
    (folder / "lock").touch()
    status = {
        "state": "running",
        "phase": "train",
        "step": 40,
        "steps": 100,
        "loss": 0.7,
        "images_per_s": 90.0,
        "host": "node1",
    }
    (folder / "status.json").write_text(json.dumps(status))
    if kind[number % 10] == "done":
        metrics = {f"measure_{k}": 0.5 * k for k in range(30)} | {"fid": 20.0 + number % 7}
        (folder / "result.json").write_text(json.dumps({"metrics": metrics, "seconds": {"train": 30.0}}))
    if kind[number % 10] == "failed":
        (folder / "error.json").write_text(json.dumps({"cause": "nan", "message": "step 3: loss nan", "traceback": ""}))


def report(trials: int, folder: str) -> dict[str, Any]:
    """Seconds to write a report; 20 seeds an arm, with curves, gates and pictures."""
    from ablations.report.build import write_report

    outcome = _outcome(trials, folder)
    row: dict[str, Any] = {}
    with measured(row):
        page = write_report(outcome, Path(folder) / "report")
    return row | {"note": f"{len(outcome.records)} trials; the page has {page.stat().st_size / 1e6:.1f} MB"}


def _outcome(trials: int, folder: str) -> Any:
    sys.path.append(str(TESTS / "ablations"))
    from fake_outcome import build_outcome

    passes = list(range(1, max(1, trials // (20 * len(MIXERS))) + 1))
    return build_outcome(
        Path(folder) / "made",
        seeds=range(20),
        axes={"model.mixer": list(MIXERS), "model.iterations": passes},
        steps=300,
    )


def told(trials: int, folder: str) -> dict[str, Any]:
    """Seconds to bring a new store up to a grid that has ended, MLflow imported."""
    from ablations.answer.records import PlannedTrial
    from ablations.track.grid import Grid
    from ablations.track.journal import Journal
    from ablations.track.location import Location
    from ablations.track.store import Store

    outcome = _outcome(trials, folder)
    (Path(folder) / "made" / "trials").rename(Path(folder) / "trials")
    journal = Journal.of(Path(folder), "mixers", [record.key for record in outcome.records])
    journal.acquire()
    journal.plan(outcome, [PlannedTrial.of(record) for record in outcome.records], {})
    for record in outcome.records:
        journal.ended(record)
    journal.closed(outcome, None, "FINISHED", None)
    store, grid = Store(Location.of(f"sqlite:///{folder}/mlflow.db", Path(folder))), Grid(journal.path, 50.0)
    store.runs("another experiment")
    row: dict[str, Any] = {}
    with measured(row):
        grid.sync(store, alive=False)
    return row | {"note": f"{grid.has}, {grid.points} points"}


def driver(trials: int, folder: str) -> dict[str, Any]:
    """The whole command on trials that are done: it plans, has MLflow told of each of them, and has the report written.

    Twice, since it waits for MLflow two minutes at most: the second time it finds the runs of the first and sends the rest.
    """
    planned, _ = _plan(trials, folder)
    records = _outcome(trials, folder).records
    for trial, record in zip(planned.trials, records, strict=True):
        curve = planned.runs / trial.curves[-1]
        for place in (planned.folder(trial).parent, curve.parent):
            place.mkdir(parents=True, exist_ok=True)
        record.curve.rename(curve)
        record.folder.rename(planned.folder(trial))
    given = [*words(trials, folder), "action=report", f"track.uri=sqlite:///{folder}/mlflow.db"]
    (first, _), (second, printed) = _command(given), _command(given)
    row = {name: first[name] + second[name] for name in ("seconds", "processor")}
    row |= {name: max(first[name], second[name]) for name in ("peak_mb", "file_mb")}
    lost = [line for line in printed if "Nothing is lost" in line]
    return row | {
        "note": "; ".join([*lost, f"run twice; {row['file_mb']:.0f} MB of it are libraries' files in memory"])
    }


# -- overhead ---------------------------------------------------------------------------------------------------------

# What the command says when a part of it begins, after the first, in this order.
PARTS = {
    "imports": "",
    "plan and start of workers": "checking the settings",
    "shared work and trials": "latent wavelet_vae: ",
    "speed and memory": "measuring speed",
    "report": "writing the report",
    "MLflow, its last": "finishing MLflow",
}
WORK = ("shared work and trials", "speed and memory")


def overhead(folder: Path, scale: str) -> dict[str, float]:
    """Seconds of each part of a grid's command, by when it says that the part begins."""
    folder.mkdir(parents=True, exist_ok=True)
    began, times, wanted = time.monotonic(), [time.monotonic()], list(PARTS.values())[1:]
    command = [sys.executable, "-m", "ablations.run", "grid=mixers", f"scale={scale}"]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as process:
        for line in process.stdout:
            if wanted and wanted[0] in line:
                times.append(time.monotonic())
                del wanted[0]
    if process.returncode or wanted:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode} before it said {wanted}")
    times.append(time.monotonic())
    parts = {name: end - start for name, start, end in zip(PARTS, times[:-1], times[1:], strict=True)}
    idle = _idle(folder / "runs", parts["shared work and trials"])
    assert abs(sum(parts.values()) - (time.monotonic() - began)) < 1
    return parts | {"shared work and trials": parts["shared work and trials"] - idle, "between jobs": idle}


def _idle(runs: Path, seconds: float) -> float:
    """Of ``seconds``, those in which nothing was made: its settings are written when that begins, its result in the end."""
    folders = [
        *(runs / "trials").glob("*"),
        *(path for path in (runs / "stages").glob("*") if "speed" not in path.name),
    ]
    spans = sorted(
        ((path / "settings.json").stat().st_mtime, (path / "result.json").stat().st_mtime) for path in folders
    )
    busy, reached = 0.0, 0.0
    for start, end in spans:
        busy, reached = busy + max(0.0, end - max(start, reached)), max(reached, end)
    return max(0.0, seconds - busy)


if __name__ == "__main__":
    main()
