"""What measuring processes load of a diffusers pipeline: see ``eval.speed.workers.Loader``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eval.subjects.diffusers_model import load, networks
from iris.randomness import addressed

DECODER = "vae"  # of which a pipeline calls ``decode``; of the other networks it calls ``forward``


@dataclass
class Part:
    """A network of the pipeline with the arguments of its last call; see ``eval.speed.workers.Loader`` for the attributes."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    weights_bytes: int
    device: str
    count: int = field(default=1)
    within: str | None = None

    @torch.no_grad()
    def __call__(self) -> Any:
        return self.function(*self.arguments, **self.named)


def load_for_measuring(given: dict[str, Any]) -> Callable[[], Any]:
    """A function that makes images with the pipeline.

    Args:
        given: "folder", "caption", "dtype", "device", "call" (arguments of the pipeline's call), "batch" (1), and
            "parts": whether to find out the parts, which takes one run.

    Returns:
        the function, with ``weights_bytes``, ``device`` and, if wanted, ``parts``: the networks that it calls.
    """
    pipeline, batch = load(Path(given["folder"]), given["dtype"], given["device"]), given.get("batch", 1)

    def generate() -> Any:
        noise = [addressed(0, "sample", i) for i in range(batch)]
        return pipeline(prompt=[given["caption"]] * batch, generator=noise, output_type="np", **given["call"]).images

    generate.weights_bytes = sum(size_of(network) for network in networks(pipeline).values())
    generate.device = given["device"]
    if given.get("parts", False):
        with recorded(pipeline, given["device"]) as parts:
            generate()
        generate.parts = dict(parts)
    return generate


def _imports(given: dict[str, Any]) -> None:
    """Import what loading will need, so that it is counted with the runtime and not with the weights."""
    import json

    import diffusers
    import transformers

    index = json.loads((Path(given["folder"]) / "model_index.json").read_text(encoding="utf-8"))
    for library, name in [entry for entry in index.values() if isinstance(entry, list) and len(entry) == 2]:
        for module in (diffusers, transformers):
            if module.__name__ == library and name:
                getattr(module, name, None)  # both libraries import a class when it is asked for
    getattr(diffusers, index.get("_class_name", ""), None)


load_for_measuring.imports = _imports


@contextmanager
def recorded(pipeline: Any, device: str) -> Iterator[dict[str, Part]]:
    """Inside, calls of the pipeline's networks are counted and their last arguments kept."""
    parts: dict[str, Part] = {}

    def record(name: str, function: Callable[..., Any], size: int, *arguments: Any, **named: Any) -> Any:
        count = parts[name].count + 1 if name in parts else 1
        parts[name] = Part(function, arguments, named, size, device, count)
        return function(*arguments, **named)

    replaced: list[tuple[nn.Module, str]] = []
    for name, network in networks(pipeline).items():
        method = "decode" if name == DECODER else "forward"
        setattr(network, method, partial(record, name, getattr(network, method), size_of(network)))
        replaced.append((network, method))
    try:
        yield parts
    finally:
        for network, method in replaced:
            delattr(network, method)  # the class's own shows again


def size_of(network: nn.Module) -> int:
    """Bytes of a network's parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))
