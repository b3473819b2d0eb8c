"""The proof that an image can be made in so much memory: a process that makes one under a hard cap, or fails.

Three kinds of cap. RLIMIT_DATA limits private writable memory, touched or not: what a process allocates, and not the
code that it maps; it is the default. RLIMIT_AS limits all address space, mapped libraries too, so that torch's CUDA
build cannot even be imported below 3.1 GB; it suits small runtimes such as ONNX Runtime. A cgroup limits resident
memory with the page cache, as a phone does; it needs a group that this user may write to, and is only used when one is
given.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eval.speed.process import MB
from eval.speed.workers import TAIL, Loader, worker_environment

CAPS_MB = (600, 1000, 2000, 3000, 4000)
METHODS = ("RLIMIT_DATA", "RLIMIT_AS", "cgroup")
Scope = Literal["process", "above import", "control"]
CONTROL = 0.5  # of the measured need, where the cap must not hold
CHARGED = {"RLIMIT_DATA": "VmData", "RLIMIT_AS": "VmSize", "cgroup": "VmRSS"}  # what each method counts
POLL_SECONDS = 0.01
LINE = 160  # characters of a reason

# What runtimes say when an allocation fails. Loading a library and starting a thread map memory, too.
OUT_OF_MEMORY = re.compile(
    r"(can't|cannot|failed to|unable to) allocate|MemoryError|bad_?alloc|unable to mmap|failed to map segment"
    r"|out[ _]of[ _]memory|memory ?allocation ?failed|can't start new thread|thread creation failed|pthread_create failed",
    re.IGNORECASE,
)
SIGNALS = (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)

# Limits itself, then becomes the command: nothing runs between the two.
LIMIT = """
import os, resource, sys
method, limit, group = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if method == "cgroup":
    with open(os.path.join(group, "cgroup.procs"), "w") as procs:
        procs.write(str(os.getpid()))
else:
    resource.setrlimit(getattr(resource, method), (limit, limit))
os.execvp(sys.argv[4], sys.argv[4:])
"""


class CapError(RuntimeError):
    """A run under a cap failed for another reason than memory, so that it says nothing about the cap."""


@dataclass(frozen=True)
class CapResult:
    """One run under a cap; MB are 10^6 bytes.

    Attributes:
        cap_mb: the budget.
        scope: "process": the budget is all that the process gets; "above import": the runtime's import is added to it;
            "control": half of what an unlimited run used above its import, which must not suffice.
        limit_mb: what was set.
        method: how.
        held: an image was made.
        peak_mb: peak resident memory of the process.
        charged_mb: peak of what the method counts, sampled every 10 ms.
        why: in words, what failed or what was used.
    """

    cap_mb: float
    scope: Scope
    limit_mb: float
    method: str
    held: bool
    peak_mb: float | None
    charged_mb: float | None
    why: str


@dataclass(frozen=True)
class _Run:
    """How a process ended and what it took; ``ended_by`` is a signal, ``failure`` its words, None if all went well."""

    failure: str | None
    ended_by: int | None
    peak_mb: float | None
    charged_mb: float | None
    output: str


def caps_held(
    start: Loader | Sequence[str],
    caps_mb: Sequence[float] = CAPS_MB,
    method: str = "RLIMIT_DATA",
    threads: int = 1,
    timeout: float = 600.0,
    baseline: Sequence[str] | None = None,
    group: Path | None = None,
) -> list[CapResult]:
    """Make an image under each cap, and say which hold.

    An unlimited run comes first: what it took above the runtime's import is the need that the control gets half of.
    Then each cap is tried as it is and, where the import is known, on top of it; last the control.

    Args:
        start: what makes one image: a model's loader, run by ``eval.speed.worker``, or a command that ends with status 0.
        caps_mb: budgets in MB.
        method: one of ``METHODS``.
        threads: processor threads of the process; their stacks count.
        timeout: seconds of one run.
        baseline: for a command, another one that does its imports and ends; None: only caps as they are. A loader's
            import is measured in its own process.
        group: for the method cgroup, the folder of a memory group of this user's that has no processes; groups are made
            in it. Such a one comes from ``systemd-run --user --scope -p Delegate=yes``.

    Raises:
        ValueError: no caps or one that is not positive, an unknown method, an empty command, a group without the method
            cgroup or the reverse, a group that is not one.
        CapError: a run failed for another reason than memory, took too long, or fails without a cap.
    """
    _check(start, caps_mb, method, group)
    words = _words(start, threads)
    free = _run(words, method, threads, timeout)
    if free.failure is not None:
        raise CapError(f"without a cap the run fails: {free.failure}")
    imported = _imported(start, free, baseline, method, threads, timeout)
    trials: list[tuple[Scope, float, float]] = [("process", cap, cap) for cap in caps_mb]
    if imported is not None:
        trials += [("above import", cap, cap + imported) for cap in caps_mb]
    if free.charged_mb is not None:
        base = imported or 0.0
        half = CONTROL * max(free.charged_mb - base, 0.0)
        trials.append(("control", half, base + half))
    return [_capped(words, *trial, method, threads, timeout, group) for trial in trials]


def proven(results: Sequence[CapResult]) -> bool:
    """Whether the caps limited something: the control, half of what is needed, did not suffice."""
    controls = [one for one in results if one.scope == "control"]
    return bool(controls) and not any(one.held for one in controls)


def _check(start: Loader | Sequence[str], caps_mb: Sequence[float], method: str, group: Path | None) -> None:
    if not caps_mb or min(caps_mb) <= 0:
        raise ValueError(f"caps_mb must be positive budgets in MB, got {list(caps_mb)}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not isinstance(start, Loader) and (isinstance(start, str) or not start):
        raise ValueError(f"start must be a Loader or a command as a list of words, got {start!r}")
    if (group is not None) != (method == "cgroup"):
        raise ValueError(f"group goes with method=cgroup, got method={method!r} and group={group}")
    if group is not None and not (group / "cgroup.procs").exists():
        raise ValueError(f"group={group} is not a cgroup: it has no cgroup.procs")


def _words(start: Loader | Sequence[str], threads: int) -> list[str]:
    if not isinstance(start, Loader):
        return list(start)
    request = {"function": start.function, "argument": start.argument, "threads": threads}
    return [sys.executable, "-m", "eval.speed.worker", json.dumps(request)]


def _imported(
    start: Loader | Sequence[str], free: _Run, baseline: Sequence[str] | None, method: str, threads: int, timeout: float
) -> float | None:
    """MB that the runtime's import takes by the method's count; None where it is not known."""
    if isinstance(start, Loader):
        name = {"RLIMIT_DATA": "import_data_mb", "RLIMIT_AS": "import_size_mb", "cgroup": "import_mb"}[method]
        return json.loads(free.output)[name]
    if baseline is None:
        return None
    run = _run(list(baseline), method, threads, timeout)
    if run.failure is not None:
        raise CapError(f"the baseline fails: {run.failure}")
    return run.charged_mb


def _capped(
    words: list[str],
    scope: Scope,
    cap_mb: float,
    limit_mb: float,
    method: str,
    threads: int,
    timeout: float,
    group: Path | None,
) -> CapResult:
    with _limits(method, limit_mb, group) as prefix:
        run = _run([*prefix, *words], method, threads, timeout)
    if run.failure is None:
        why = f"{method} counted {run.charged_mb:.0f} of {limit_mb:.0f} MB" if run.charged_mb is not None else ""
    else:
        why = reason(run.failure, run.ended_by)
    return CapResult(cap_mb, scope, limit_mb, method, run.failure is None, run.peak_mb, run.charged_mb, why)


def reason(failure: str, ended_by: int | None = None) -> str:
    """Why a run under a cap failed, in short, if it was for want of memory.

    A signal that ended it counts: allocations that nobody checks end in one, and without the cap the run succeeded.

    Raises:
        CapError: it failed for another reason.
    """
    found = OUT_OF_MEMORY.search(failure)
    if found:
        line = next(line for line in failure.splitlines() if found[0] in line).strip()
        if len(line) <= LINE:
            return line
        start = max(0, line.index(found[0]) - LINE // 4)
        return f"…{line[start : start + LINE]}…"
    if ended_by in SIGNALS:
        return f"ended by {signal.Signals(ended_by).name}, which does not happen without the cap"
    raise CapError(f"the run under the cap failed for another reason than memory: {failure}")


@contextmanager
def _limits(method: str, limit_mb: float, group: Path | None) -> Iterator[list[str]]:
    """The words before a command that limit it; for a cgroup, with a group made for it."""
    words = [sys.executable, "-S", "-c", LIMIT, method, str(int(limit_mb * MB))]
    if group is None:
        yield [*words, "-"]
        return
    made = Path(tempfile.mkdtemp(prefix="cap-", dir=group))
    try:
        _write_limit(made, int(limit_mb * MB))
        yield [*words, str(made)]
    finally:
        made.rmdir()  # the kernel takes its files along; it refuses while a process is left in it


def _write_limit(group: Path, limit: int) -> None:
    """Memory, and no swap beside it, by the names of version 2 or of version 1."""
    for memory, swap, beside in (
        ("memory.max", "memory.swap.max", 0),
        ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", limit),
    ):
        if (group / memory).exists():
            (group / memory).write_text(str(limit))
            if (group / swap).exists():
                (group / swap).write_text(str(beside))
            return
    raise ValueError(f"group={group.parent}: the memory controller is not enabled for the groups in it")


def _run(words: list[str], method: str, threads: int, timeout: float) -> _Run:
    """Run a command to its end, sampling its memory."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=worker_environment(threads)
        )
        peaks: dict[str, float] = {}
        deadline = time.monotonic() + timeout
        try:
            while process.poll() is None:
                for name, value in _status(process.pid, ("VmHWM", CHARGED[method])).items():
                    peaks[name] = max(value, peaks.get(name, 0.0))
                if time.monotonic() > deadline:
                    raise CapError(f"a run took more than {timeout:g} s: {' '.join(words[-3:])}")
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace").strip())
    code, failure = process.returncode, None
    if code != 0:
        ended = f"signal {-code}" if code < 0 else f"exit status {code}"
        failure = f"{ended}; its stderr ends:\n{texts[1][-TAIL:]}"
    return _Run(failure, -code if code < 0 else None, peaks.get("VmHWM"), peaks.get(CHARGED[method]), texts[0])


def _status(pid: int, names: Sequence[str]) -> dict[str, float]:
    """Fields of a process's status in MB; those that it has, none when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines)
    return {name: int(value.split()[0]) * 1024 / MB for name, value in pairs if name in names}


def cap_table(results: Sequence[CapResult]) -> list[str]:
    """Markdown: a row a run."""
    lines = ["| budget, MB | of | limit set, MB | held | peak resident, MB | why |", "|---|---|---|---|---|---|"]
    for one in results:
        of = {
            "process": "the whole process",
            "above import": "what comes after the import",
            "control": "control: half of what is needed",
        }[one.scope]
        peak = "-" if one.peak_mb is None else f"{one.peak_mb:.0f}"
        why = one.why.replace("|", "\\|")
        lines.append(
            f"| {one.cap_mb:.0f} | {of} | {one.limit_mb:.0f} by {one.method} "
            f"| {'yes' if one.held else 'no'} | {peak} | {why} |"
        )
    return lines
