"""What the launcher's tests run as jobs; workers import this module by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from iris.io.files import write_json

ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "IRIS_TEST_SETUP")


def finish(folder: str, plan: dict[str, Any]) -> None:
    """Take plan["seconds"], and say when, where and with what environment it was."""
    place, start = Path(folder), time.time()
    place.mkdir(parents=True, exist_ok=True)
    time.sleep(plan.get("seconds", 0))
    environment = {name: os.environ.get(name) for name in ENVIRONMENT}
    result = {"start": start, "end": time.time(), "pid": os.getpid(), "environment": environment, "plan": plan}
    write_json(place / "result.json", result)


def count(folder: str, plan: dict[str, Any]) -> None:
    """Take plan["seconds"], leaving a mark at the beginning and one at the end."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    for name in ("began", "ended"):
        with open(place / name, "a") as marks:
            marks.write(f"{os.getpid()} {time.time()}\n")
        if name == "began":
            time.sleep(plan.get("seconds", 0))
    write_json(place / "result.json", {})


def fail_and_say_why(folder: str, plan: dict[str, Any]) -> None:
    """Fail as a trial does: error.json first."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "calls", "a") as calls:
        calls.write("called\n")
    error = {"cause": "nan", "kind": "NonFiniteLoss", "message": "step 3: loss nan", "traceback": "…"}
    write_json(place / "error.json", error)
    raise ValueError("step 3: loss nan")


def fail_silently(folder: str, plan: dict[str, Any]) -> None:
    """Fail before error.json can be written."""
    raise ValueError("no error.json from me")


def be_killed(folder: str, plan: dict[str, Any]) -> None:
    """Die as the kernel kills for memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_long(folder: str, plan: dict[str, Any]) -> None:
    """Outlast any time limit."""
    time.sleep(120)


def take_the_worker_along(folder: str, plan: dict[str, Any]) -> None:
    """Die with the worker, as both do when the kernel ends their whole group for memory."""
    with open(Path(folder) / "calls", "a") as calls:
        calls.write("called\n")
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
