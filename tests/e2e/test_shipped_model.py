"""The small model in the package makes what captions say, at any number of passes through its core."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
import torch

from eval.judges import load_judge
from iris import IrisPipeline, SamplingSettings
from iris import data as sources
from iris.io.pixels import to_images

COUNT = 64


@pytest.fixture(scope="module")
def captions() -> tuple[list[str], dict[str, torch.Tensor]]:
    """Captions of the embedded world that training did not see, and what they ask for."""
    rows = sources.load(
        "shapes",
        path=None,
        size=32,
        image_column="image",
        text_column="text",
        labels=None,
        train=1,
        validation=COUNT,
        heldout=1,
        seed=123,
    )["validation"]
    decoded = sources.pixels(rows, 32, 0.0)
    return decoded.captions, {name: torch.as_tensor(values) for name, values in decoded.attributes.items()}


@pytest.mark.parametrize("iterations", [1, 4, 16])
def test_it_makes_what_captions_say(captions, iterations):
    texts, wanted = captions
    pipeline = IrisPipeline.from_pretrained(Path(str(files("iris").joinpath("weights/shapes"))))
    images = pipeline.generate(texts, SamplingSettings(6, guidance=2.5, iterations=iterations))
    read = load_judge("shapes").attributes("shapes", to_images(images))
    accuracy = {name: (read[name].cpu() == wanted[name]).double().mean() for name in wanted}
    assert accuracy["colour"] > 0.9 and accuracy["background"] > 0.9 and accuracy["position"] > 0.9
    assert accuracy["shape"] > 0.6  # by chance 1 in 5 or less
