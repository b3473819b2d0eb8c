"""A part of an exported model in ExecuTorch's C++ runtime, from NumPy alone, as an app on a phone would hold it.

ExecuTorch's own Python runtime needs PyTorch, which takes as much memory as the models. The wheel also has the runtime as
libraries with headers; executorch.cpp puts a C interface before them, compiled once (about 10 s) and kept in the user's
cache.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from iris.errors import SettingError

SOURCE = Path(__file__).with_suffix(".cpp")
LIBRARIES = (
    "executorch",
    "executorch_backend_xnnpack",
    "executorch_kernels_optimized",
    "executorch_kernels_quantized",
    "executorch_threadpool",
)
NUMBERS = {"float32": 6, "int64": 4, "bool": 11}  # of ExecuTorch's ScalarType
NO_MEMORY = (0x21, 0x31)  # MemoryAllocationFailed, the host's and a delegate's, of runtime/core/error.h
OWN_ERRORS = {
    1001: "it has another number of outputs",
    1002: "an output has another size",
    1003: "the thread pool took no number of threads",
}


class _Array(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("sizes", ctypes.POINTER(ctypes.c_int32)),
    ]


class ExecutorchPart:
    """See ``eval.export.host.pipeline.OpenPart``. Every method of the program is loaded; threads are of all open programs.

    Raises:
        SettingError: the file cannot be loaded, no ExecuTorch, or no compiler.
        MemoryError: ExecuTorch says that it has no memory.
    """

    def __init__(self, path: Path, entry: Mapping[str, Any], threads: int = 1, lean: bool = False) -> None:
        self.path, self.methods = path, entry["methods"]
        self._handle = ctypes.c_void_p()  # before anything fails, for close
        self._library = load_library()
        try:
            self._use(threads)
            self._check(self._library.host_open(os.fsencode(self.path), ctypes.byref(self._handle)), "opening")
            for method in self.methods:
                self._check(self._library.host_load(self._handle, method.encode()), f"loading {method}")
        except RuntimeError as error:
            raise SettingError(f"model={path.parent}: {path.name} cannot be loaded ({error})") from error

    def _use(self, threads: int) -> None:
        """Set the pool's threads, unless they are: ExecuTorch prints a line each time."""
        if self._library.threads != threads:
            self._check(self._library.host_threads(threads), "setting threads")
            self._library.threads = threads

    def run(self, method: str, known: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See ``OpenPart``.

        Raises:
            ValueError: an input of another shape than the file was exported for.
            RuntimeError: ExecuTorch fails.
        """
        about = self.methods[method]
        inputs = [_as_exported(known[name], wanted, name) for name, wanted in about["inputs"].items()]
        outputs = {name: np.empty(made["shape"], made["dtype"]) for name, made in about["outputs"].items()}
        self._check(
            self._library.host_run(
                self._handle,
                method.encode(),
                _arrays(inputs),
                len(inputs),
                _arrays(list(outputs.values())),
                len(outputs),
            ),
            f"running {method}",
        )
        return outputs

    def close(self) -> None:
        """Free the program and its memory."""
        if self._handle:
            self._library.host_close(self._handle)
            self._handle = None

    __del__ = close

    def _check(self, code: int, what: str) -> None:
        if code in NO_MEMORY:
            raise MemoryError(f"{self.path.name}: {what} failed, MemoryAllocationFailed")
        if code:
            why = OWN_ERRORS.get(code, f"ExecuTorch error 0x{code:x} of runtime/core/error.h")
            raise RuntimeError(f"{self.path.name}: {what} failed, {why}")


@cache
def load_library() -> ctypes.CDLL:
    """The C interface, compiled if this source and this version of ExecuTorch were not yet.

    Raises:
        SettingError: ExecuTorch is not installed, or there is no compiler, or it fails.
    """
    library = ctypes.CDLL(str(build()))
    library.threads = None  # of its pool, as it was set last
    library.host_open.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p)]
    library.host_close.argtypes = [ctypes.c_void_p]
    library.host_load.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.host_run.argtypes = [
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.POINTER(_Array),
        ctypes.c_int32,
        ctypes.POINTER(_Array),
        ctypes.c_int32,
    ]
    return library


def build(folder: Path | None = None) -> Path:
    """The compiled interface; ``folder`` keeps it (None: iris/ in the user's cache).

    Raises:
        SettingError: as ``load_library``.
    """
    package = _package()
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "iris"
    key = hashlib.sha256(
        SOURCE.read_bytes()
        + str(package).encode()
        + sysconfig.get_platform().encode()
        + importlib.metadata.version("executorch").encode()
    ).hexdigest()[:16]
    path = folder / f"executorch-{key}.so"
    if path.exists():
        return path
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise SettingError("running ExecuTorch without PyTorch needs a C++ compiler; install one or set CXX")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / path.name
        run = subprocess.run(_command(compiler, package, made), capture_output=True, text=True)
        if run.returncode:
            raise SettingError(f"{compiler} cannot compile {SOURCE.name}: {run.stderr[-2000:]}")
        made.replace(path)  # whole or not at all, whoever else builds it
    return path


def _package() -> Path:
    """Where ExecuTorch lies, found without importing it."""
    spec = importlib.util.find_spec("executorch")
    places = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    for place in places:
        if (place / "lib" / "libexecutorch.so").exists():
            return place
    raise SettingError(
        "runtime.name=executorch needs executorch with its C++ libraries, which is not installed: uv sync --extra executorch"
    )


def _command(compiler: str, package: Path, out: Path) -> list[str]:
    headers, libraries = package / "include", package / "lib"
    return [
        compiler,
        "-std=c++17",
        "-O2",
        "-w",
        "-fPIC",
        "-shared",
        "-DC10_USING_CUSTOM_GENERATED_MACROS",
        f"-I{headers}",
        f"-I{headers}/executorch/runtime/core/portable_type/c10",
        str(SOURCE),
        "-o",
        str(out),
        f"-L{libraries}",
        # backends and kernels register themselves when they are loaded; nothing refers to them
        "-Wl,--no-as-needed",
        *(f"-l{name}" for name in LIBRARIES),
        f"-Wl,-rpath,{libraries}",
    ]


def _as_exported(array: np.ndarray, wanted: Mapping[str, Any], name: str) -> np.ndarray:
    array = np.ascontiguousarray(array, wanted["dtype"])
    if list(array.shape) != wanted["shape"]:
        raise ValueError(f"{name} must be {wanted['shape']}, got {list(array.shape)}")
    return array


def _arrays(arrays: Sequence[np.ndarray]) -> Any:
    made = (_Array * len(arrays))()
    for one, array in zip(made, arrays, strict=True):
        sizes = (ctypes.c_int32 * array.ndim)(*array.shape)
        one.data, one.bytes, one.dtype, one.rank, one.sizes = (
            array.ctypes.data,
            array.nbytes,
            NUMBERS[str(array.dtype)],
            array.ndim,
            sizes,
        )
    return made
