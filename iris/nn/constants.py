"""Tensors that depend on sizes alone, made once and kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

Made = TypeVar("Made")


def cached_constant(build: Callable[..., Made]) -> Callable[..., Made]:
    """Decorate a function of hashable arguments that returns tensors, so that each is made once.

    The first call may come from anywhere, and what it makes must serve everywhere: made under inference mode it could
    not take part in training, and made while torch.export traces with fake tensors it would stay fake. torch.compile
    traces the making itself, since dynamic sizes have no value to look up.
    """

    @functools.lru_cache(maxsize=64)
    def kept(*key: object) -> Made:
        with torch.inference_mode(False), _disable_current_modes():
            return build(*key)

    @functools.wraps(build)
    def look_up(*key: object) -> Made:
        return build(*key) if torch.compiler.is_dynamo_compiling() else kept(*key)

    return look_up
