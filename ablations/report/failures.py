"""Failed trials, told so that a person knows what to do: the cause in words, the last lines, where the log is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ablations.answer.records import GridOutcome, TrialRecord

CAUSES = {
    "oom": "out of memory",
    "nan": "loss became not a number",
    "timeout": "ran out of time",
    "killed": "killed from outside",
    "disk": "no room on the disk",
    "error": "error",
}
LAST_LINES = 8


@dataclass(frozen=True)
class Failure:
    """One failed trial, or several of one arm that failed in the same way."""

    label: str
    keys: list[str]
    cause: str
    message: str
    lines: str  # the end of the traceback
    logs: list[str]  # paths relative to the working directory where they lie inside it


def failures_of(outcome: GridOutcome) -> list[Failure]:
    """The failed trials in the order of the records; seeds of an arm that failed alike share an entry."""
    groups: dict[tuple[str, str, str, str], list[TrialRecord]] = {}
    for record in outcome.records:
        if record.state == "failed":
            groups.setdefault((record.arm, *_told(record)), []).append(record)
    return [
        Failure(
            f"{arm}, seed{'s' if len(trials) > 1 else ''} {', '.join(str(t.seed) for t in trials)}",
            [t.key for t in trials],
            cause,
            message,
            lines,
            list(dict.fromkeys(tidy_paths(t.error["log"]) for t in trials if t.error and t.error.get("log"))),
        )
        for (arm, cause, message, lines), trials in groups.items()
    ]


def _told(record: TrialRecord) -> tuple[str, str, str]:
    """Cause, message and last lines of the traceback."""
    error = record.error or {}
    cause = str(error.get("cause") or "error")
    lines = [line.rstrip() for line in str(error.get("traceback") or "").splitlines() if line.strip()]
    return (
        CAUSES.get(cause, cause),
        tidy_paths(str(error.get("message") or "no message")),
        tidy_paths("\n".join(lines[-LAST_LINES:])),
    )


def tidy_paths(text: str) -> str:
    """``text`` without this machine's folders: a report is read elsewhere."""
    text = re.sub(r"[^\s\"']*/site-packages/", "site-packages/", text)
    for folder, short in ((Path.cwd(), ""), (Path.home(), "~/")):
        if len(folder.parts) > 1:
            text = text.replace(f"{folder}/", short)
    return text
