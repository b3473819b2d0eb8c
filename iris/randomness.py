"""Addressed randomness: every draw is named by what it is for, never by what was drawn before it.

Data order, times, noise and caption dropout are addressed by (seed, purpose, step); sampling noise by (seed, purpose,
image index); a module's initial weights by (seed, module name). So all trials of a grid see the same data and noise, parts they share
start equal, and a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def seed_of(*address: object) -> int:
    """A 63-bit seed for an address such as ``(0, "noise", 120)``; the same on every machine and Python version."""
    text = "\x1f".join(str(part) for part in address)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def addressed(*address: object) -> torch.Generator:
    """A CPU generator for one address; CPU so that the numbers do not depend on the device that uses them."""
    return torch.Generator().manual_seed(seed_of(*address))


def image_noise(seed: int, first: int, count: int, shape: tuple[int, ...]) -> Tensor:
    """Unit Gaussian noise [count, *shape] for images first … first + count - 1, independent of the batch size."""
    return torch.stack([torch.randn(shape, generator=addressed(seed, "sample", first + i)) for i in range(count)])


@contextlib.contextmanager
def blueprint() -> Iterator[None]:
    """Modules built inside have shapes and no values, and draw none: that would load torch.compile, 3 s and 150 MB."""
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    """Leaves out what ``torch.nn.init`` does."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


def initialise(module: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter of ``module`` again, from a generator addressed by (seed, name of the module that owns it).

    Modules draw their parameters when they are built, from torch's global generator and so by what was built before;
    ``reset_parameters``, which each that owns some must have, is called a second time here. What lies in a module
    whose ``frozen`` is True, such as a pretrained text encoder, keeps its weights. Returns ``module``.

    Raises:
        TypeError: a module owns parameters but cannot initialise them, which would leave them to chance.
    """
    frozen = [part for part in module.modules() if getattr(part, "frozen", False) is True]
    kept = {id(part) for whole in frozen for part in whole.modules()}
    for name, part in module.named_modules():
        if id(part) in kept or not list(part.parameters(recurse=False)):
            continue
        if not hasattr(part, "reset_parameters"):
            raise TypeError(f"{type(part).__name__} at '{name}' owns parameters but has no reset_parameters()")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "weights", name))
            part.reset_parameters()
    return module
