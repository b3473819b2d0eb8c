"""A job: something to run in a folder of its own, and what its files say of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iris.io.files import read_json, write_json

RESULT, ERROR = "result.json", "error.json"
PROBE_BYTES = 1 << 16  # what a disk must take to count as one that can be written


@dataclass(frozen=True)
class Job:
    """``function(folder, plan)``, which leaves result.json or error.json in ``folder``.

    ``function`` is a module's own, so that another process finds it by name. ``needs`` are folders of jobs that must have
    ended before; one that failed stops this job. ``spread``: over as many nodes as the launcher says;
    ``exclusive``: alone on its node.
    """

    key: str
    function: Callable[[str, dict[str, Any]], None]
    plan: dict[str, Any]
    folder: Path
    needs: tuple[Path, ...] = ()
    spread: bool = False
    exclusive: bool = False

    @property
    def succeeded(self) -> bool:
        """Whether the result is there."""
        return (self.folder / RESULT).exists()

    @property
    def failed(self) -> bool:
        """Whether it has said that it failed."""
        return (self.folder / ERROR).exists()

    @property
    def needed(self) -> str:
        """What the jobs before it allow: "ready", "waiting", or "failed" when one of them has no result but an error."""
        if all((place / RESULT).exists() for place in self.needs):
            return "ready"
        missing = (place for place in self.needs if not (place / RESULT).exists())
        return "failed" if any((place / ERROR).exists() for place in missing) else "waiting"


def forget_error(job: Job) -> None:
    """Make ready for another attempt."""
    (job.folder / ERROR).unlink(missing_ok=True)


def write_error(folder: Path, cause: str, message: str, traceback: str = "", log: str = "") -> None:
    """Say that a job failed, where it could not say so itself; what it said itself stays."""
    if not (folder / ERROR).exists() and not (folder / RESULT).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(
            folder / ERROR, {"cause": cause, "kind": cause, "message": message, "traceback": traceback, "log": log}
        )


def needs_failed(job: Job) -> dict[str, str]:
    """The error of a job whose shared work failed: that work's own."""
    found = next(filter(None, (read_json(place / ERROR) for place in job.needs)), {})
    return {
        "cause": str(found.get("cause", "error")),
        "message": f"shared work failed: {found.get('message', '')}",
        "traceback": str(found.get("traceback", "")),
        "log": str(found.get("log", "")),
    }


def failure(job: Job, cause: str, message: str, log: str) -> dict[str, str]:
    """What went wrong: as the job wrote it, or else ``cause`` and ``message`` with the end of its log."""
    written = read_json(job.folder / ERROR)
    if written is not None:
        return written | {"log": written.get("log") or log or str(job.folder / ERROR)}
    return {"cause": cause, "kind": cause, "message": message, "traceback": tail(log), "log": log}


def tail(log: str | Path, lines: int = 20) -> str:
    """The last lines of a log; nothing when there is none."""
    try:
        return "\n".join(Path(log).read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def no_room(folder: Path) -> str:
    """Why nothing can be written to a folder that is there or would be made, such as a full disk; empty when it can be."""
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    probe = place / f".probe.{os.getpid()}"
    try:
        probe.write_bytes(bytes(PROBE_BYTES))
        return ""
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror}"
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
