"""Settings, plans and chains of ``python -m ablations.run`` from the words of its command line; nothing is made."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from ablations.question.chain import Chain, Chains
from ablations.question.grid import expand
from ablations.question.plan import Plan, Silent, make_plan
from ablations.question.settings import TREE, Settings

# The smallest trial that measures everything: its numbers mean nothing.
TINY = (
    "scale=smoke",
    "latent=pixel",
    "data.train=48",
    "data.validation=24",
    "data.heldout=8",
    "train.steps=2",
    "measure.samples=12",
    "measure.heldout=4",
    "measure.quality.metrics=fid,kid",
    "measure.quality.blocks=2",
)
DECIDE = {"metric": "fid", "better": "lower", "practical": "5%", "expect": {}}


def settings_from(*words: str) -> Settings:
    """Settings of a command line."""
    return TREE.build(words)


def with_grid(*words: str, **changes: Any) -> Settings:
    """Settings whose grid is changed where a command line cannot, and expects nothing."""
    settings = settings_from(*words)
    return replace(settings, grid=replace(settings.grid, **{"decide": DECIDE} | changes))


def plan_of(*words: str) -> Plan:
    """The plan of a command line."""
    return make_plan(settings_from(*words))


def chain_from(*words: str, seed: int = 0) -> Chain:
    """The chain of the trial that a command line describes apart from its grid."""
    settings = with_grid(*words, axes={}, points=[{"stage": settings_from(*words).stage}], baseline={})
    chains = Chains(Path(settings.runs_dir).absolute(), Silent(), settings.launcher.processes)
    return chains.of(expand(settings)[0].seeded(seed))


def write_rows(folder: Path, caption: str, count: int = 60) -> Path:
    """A parquet file of small pictures that all have one caption; returns its place."""
    folder.mkdir(parents=True, exist_ok=True)
    png = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(png, "png")
    rows = Dataset.from_dict({"image": [png.getvalue()] * count, "text": [caption] * count})
    rows.to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"
