"""What the cluster's tests run as jobs; nodes import this module by name."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from iris.io.files import write_json

SCRIPT = Path(__file__).with_name("cluster.sh")


def count_up(folder: str, plan: dict[str, Any]) -> None:
    """Count to plan["to"], a step each 0.2 s, going on from the number in the folder; leaves where each part ran."""
    place = Path(folder)
    with open(place / "parts", "a") as parts:
        parts.write(f"{os.environ['SLURMD_NODENAME']} {os.getpid()}\n")
    counted = place / "counted"
    number = int(counted.read_text()) if counted.exists() else 0
    while number < plan["to"]:
        time.sleep(0.2)
        number += 1
        partial = place / f".counted.{os.getpid()}"
        partial.write_text(str(number))
        partial.replace(counted)
    write_json(place / "result.json", {"counted": number})


def say(folder: str, plan: dict[str, Any]) -> None:
    """Leave the environment that a job sees."""
    names = (
        "OMP_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES",
        "SLURMD_NODENAME",
        "SLURM_JOB_NUM_NODES",
        "IRIS_TEST_SETUP",
        "SLURM_ARRAY_JOB_ID",
        "SLURM_NTASKS",
        "IRIS_WRAPPED",
    )
    write_json(Path(folder) / "result.json", {name: os.environ.get(name) for name in names})


def nothing(folder: str, plan: dict[str, Any]) -> None:
    """The quickest job there is."""
    (Path(folder) / "result.json").write_text("{}")


def fill_memory(folder: str, plan: dict[str, Any]) -> None:
    """Take memory until somebody objects."""
    held = []
    while len(held) < 60:
        held.append(bytearray(b"x") * 100_000_000)
        time.sleep(0.3)


def raise_an_error(folder: str, plan: dict[str, Any]) -> None:
    """Fail before anything could be written down."""
    raise ValueError("this job's own reason")
