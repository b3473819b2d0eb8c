"""The report, written by a process of its own: what analyses and draws it never enters the driver's memory."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path

from ablations.answer.records import GridOutcome


class ReportLost(RuntimeError):
    """The process that writes the report ended without an answer: it was killed, or could not start."""


def write_report_apart(outcome: GridOutcome, folder: Path) -> Path:
    """As ``ablations.report.build.write_report``.

    Raises what ``write_report`` raises, and ReportLost when the process ended without an answer.
    """
    # In a group of its own: Ctrl-C reaches the driver alone, which stops it.
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=pickle.dumps((outcome, folder)),
        stdout=subprocess.PIPE,
        check=False,
        process_group=0,
    )
    if done.returncode:
        raise ReportLost(
            f"the process that writes the report ended with {done.returncode}; the same command writes it anew"
        )
    answer = pickle.loads(done.stdout)
    if isinstance(answer, Exception):
        raise answer
    return answer


def main() -> None:
    """The process: an outcome and a folder come through standard input, the answer goes to standard output."""
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what a library prints is no answer
        answers.write(pickle.dumps(_answer(*pickle.load(sys.stdin.buffer))))


def _answer(outcome: GridOutcome, folder: Path) -> Path | Exception:
    from ablations.report.build import write_report

    try:
        return write_report(outcome, folder)
    except Exception as error:  # a full disk, a setting that cannot be read: the driver says it
        error.add_note(traceback.format_exc())
        return error


if __name__ == "__main__":
    main()
