"""Work in forked processes, where torch is loaded already; several of them as torchrun would start them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial

import torch


def free_port() -> int:
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ranks(world: int) -> list[dict[str, str]]:
    """The environments of ``world`` processes that meet at a port of their own."""
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank)} | shared for rank in range(world)]


def start(work: Callable[[], object], environment: dict[str, str] | None = None) -> int:
    """Do ``work`` in a process of its own; its number."""
    child = os.fork()
    if child == 0:
        _work(work, environment or {})
    return child


def ended(child: int) -> int | None:
    """The exit code of a process, once: what its work returned, negative for a signal. None: it works."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def together(work: Callable[[int], object], environments: list[dict[str, str]], timeout: float = 90) -> list[int]:
    """Do ``work(rank)`` in a process for each environment; their exit codes. One that takes longer is killed."""
    children = [start(partial(work, rank), environment) for rank, environment in enumerate(environments)]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < len(children):
        for child in set(children) - set(codes):
            code = ended(child)
            if code is not None:
                codes[child] = code
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


def _work(work: Callable[[], object], environment: dict[str, str]) -> None:
    """In the child; it never returns."""
    code = 1
    try:
        os.environ.update(environment)
        torch.set_num_threads(1)
        code = work() or 0
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
