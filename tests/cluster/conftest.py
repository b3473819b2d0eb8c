"""A real Slurm on this machine, once without accounting and once with it."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_jobs import SCRIPT

ROOT = Path(__file__).parents[2]


def _missing() -> str:
    """Why no cluster can be started here; empty when one can."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        return "a local Slurm needs root on Linux"
    if not shutil.which("slurmctld") and not shutil.which("apt-get"):
        return "Slurm is not installed, and there is no apt-get to install it"
    return ""


def _free_ports(count: int = 10) -> int:
    """The first of so many ports in a row that nobody listens on."""
    while True:
        first = random.randrange(20_000, 30_000)
        with contextlib.ExitStack() as sockets, contextlib.suppress(OSError):
            for port in range(first, first + count):
                sockets.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


@pytest.fixture(scope="session", params=["none", "dbd"], ids=["no accounting", "accounting"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Folder of a running cluster; its configuration is in the environment."""
    if reason := _missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    folder.chmod(0o755)  # the database's user has to reach its files
    before = dict(os.environ)
    os.environ["SLURM_PORT"] = str(_free_ports())
    started = subprocess.run(
        ["bash", str(SCRIPT), "up", request.param, str(folder)], capture_output=True, text=True, check=False
    )
    os.environ |= {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
    }
    try:
        if started.returncode:
            said = (started.stderr.strip().splitlines() or ["no message"])[-1]
            if shutil.which("slurmctld") and (request.param == "none" or shutil.which("slurmdbd")):
                pytest.fail(f"Slurm is installed and does not start: {said}")
            pytest.skip(f"Slurm cannot be installed here: {said}")
        yield folder
    finally:
        if not started.returncode:
            subprocess.run(["scancel", "--user=root"], capture_output=True, check=False)
        subprocess.run(["bash", str(SCRIPT), "down", "x", str(folder)], capture_output=True, check=False)
        os.environ.clear()
        os.environ |= before
        shutil.rmtree(folder, ignore_errors=True)
