"""The parent's side of a measuring worker: start it, ask it, and say what went wrong when it dies."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

TAIL = 2000  # characters of the worker's stderr in an error
# glibc's heap without arenas and thresholds that move: freed memory goes back to the system, so that resident memory
# follows what is alive. Costs time, so it is for measuring memory.
STEADY_HEAP = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class WorkerError(RuntimeError):
    """A model could not be measured: its worker raised, died or took too long."""


@dataclass(frozen=True)
class Loader:
    """How a fresh process gets its model.

    ``function`` is "module:name"; called with ``argument`` (anything JSON holds) it returns ``generate``, a function of
    no arguments that makes one image (or a batch), text in and image out. ``generate`` may carry the attributes

    - ``weights_bytes``: bytes of all parameters and buffers that it uses;
    - ``device``: "cuda" when it runs there;
    - ``parts``: {name: function of no arguments that computes this part once}, for a model that can be measured part by
      part. Such a function may carry ``weights_bytes``, ``activations_bytes`` (what its architecture predicts for the
      peak of its live tensors), ``count`` (runs that one call of ``generate`` takes, 1 if absent) and ``within`` (the
      name of the part that contains it). Given {"part": name} in its argument, ``function`` loads that part alone, and
      given {"batch": n} it makes n images at once.

    ``function`` may carry ``imports``; called with ``argument`` first, it imports what loading will need, so that this
    counts as the runtime's memory.
    """

    function: str
    argument: Any = None

    def __post_init__(self) -> None:
        module, colon, name = self.function.partition(":")
        if not (module and colon and name):
            raise ValueError(f'a loader is "module:function", got {self.function!r}')

    def given(self, **changes: Any) -> Loader:
        """The same with other values in its argument.

        Raises:
            ValueError: the argument is not a JSON object.
        """
        if not isinstance(self.argument, dict):
            raise ValueError(
                f"{self.function}: the argument must be an object to take {', '.join(changes)}, got {self.argument!r}"
            )
        return replace(self, argument=self.argument | changes)


class Worker:
    """A process that has loaded one model; a context manager that ends it."""

    def __init__(
        self, name: str, loader: Loader, threads: int, timeout: float, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start the process and load the model.

        Args:
            name: what errors call the model.
            loader: where the model comes from.
            threads: processor threads of the process, whose number is fixed; the system places them.
            timeout: seconds that any one answer may take.
            environment: variables of the process beside ``worker_environment``'s.

        Raises:
            WorkerError: the loader failed.
            ValueError: threads below 1, timeout not above 0, or an argument that JSON cannot hold.
        """
        if threads < 1 or timeout <= 0:
            raise ValueError(f"threads must be at least 1 and timeout above 0, got {threads} and {timeout}")
        try:
            json.dumps(loader.argument)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the loader's argument for {name} must be JSON: {error}") from error
        self.name, self.timeout = name, timeout
        self._stderr: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "eval.speed.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=worker_environment(threads) | dict(environment or {}),
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.loaded = self.ask("load", function=loader.function, argument=loader.argument, threads=threads)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Process id, for its processor time."""
        return self._process.pid

    def ask(self, action: str, **details: Any) -> dict[str, Any]:
        """One request and its answer. Raises WorkerError when the worker fails, dies or is late."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": action, **details}) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=self.timeout)
        except BrokenPipeError:
            line = None
        except queue.Empty:
            self._process.kill()
            raise WorkerError(f'{self.name}: no answer to "{action}" in {self.timeout:g} s{self._tail()}') from None
        if line is None:
            raise WorkerError(f'{self.name}: the process died during "{action}" ({self._death()}){self._tail()}')
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f'{self.name}: "{action}" failed, {answer["error"]}{self._tail()}')
        return answer

    def close(self) -> None:
        """End the process; it is killed when it does not go by itself."""
        assert self._process.stdin is not None
        try:
            with self._process.stdin as requests:  # leaving flushes, so a dead worker shows here as a broken pipe
                requests.write('{"do": "quit"}\n')
            self._process.wait(timeout=5)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            self._process.kill()
        self._process.wait()
        self._stderr.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._answers.put(line)
        self._answers.put(None)

    def _death(self) -> str:
        code = self._process.wait()
        if code == -9:
            return "killed by signal 9, often for want of memory"
        return f"killed by signal {-code}" if code < 0 else f"exit status {code}"

    def _tail(self) -> str:
        # pread: the worker writes through the same file offset
        size = os.fstat(self._stderr.fileno()).st_size
        text = os.pread(self._stderr.fileno(), 4 * TAIL, max(0, size - 4 * TAIL)).decode(errors="replace").strip()
        return f"; its stderr ends:\n{text[-TAIL:]}" if text else ""


def worker_environment(threads: int) -> dict[str, str]:
    """Environment of a worker: this process's, its import path, and ``threads`` processor threads that do not spin.

    Spinning OpenMP threads slow every process beside them, and themselves tenfold on a shared machine.
    """
    here = [str(Path(__file__).parents[2])]
    path = here + [entry or os.getcwd() for entry in sys.path]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }
