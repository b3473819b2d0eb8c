"""The notebook runs from its first to its last cell in a kernel of this interpreter, and what it saves can be used."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image

from iris import IrisPipeline
from iris.io.tensors import load_tensors
from iris.stages.settings import TREE
from iris.stages.student import students

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "iris_training.ipynb"
# Cells that must draw something.
FIGURES = (
    "reconstructions",
    "loss-curves",
    "samples-steps",
    "samples-iterations",
    "students",
    "gates-figure",
    "decay-maps",
    "spectra-figure",
    "recurrence",
)
SCALES = ("embedded", "gpu", "smoke")
LARGEST = 1_500_000  # bytes of a file that a person opens in a browser


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def cells(book: nbformat.NotebookNode) -> dict[str, nbformat.NotebookNode]:
    """The cells with code, by their ids."""
    return {cell.id: cell for cell in book.cells if cell.cell_type == "code"}


def pictures(cell: nbformat.NotebookNode) -> list[np.ndarray]:
    found = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in found]


def printed(cell: nbformat.NotebookNode) -> str:
    """What a cell wrote, and the texts that it displayed."""
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def kernel() -> AsyncKernelManager:
    """A kernel of the interpreter that runs the tests, whatever kernels this machine has installed."""
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    assert manager.kernel_spec.argv[0] == sys.executable
    return manager


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def executed(place: Path) -> dict[str, nbformat.NotebookNode]:
    """The cells of the notebook after a run at scale smoke, in a folder of its own; a cell that fails raises here."""
    book = read()
    for cell in cells(book).values():
        cell.outputs, cell.execution_count = [], None
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {
        "IRIS_NOTEBOOK_SCALE": "smoke",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": paths,
    }
    client = NotebookClient(book, timeout=None, km=kernel(), resources={"metadata": {"path": str(place)}})
    client.execute(env=environment)
    return cells(book)


@pytest.mark.long
def test_every_cell_runs_in_order(executed):
    assert [cell.execution_count for cell in executed.values()] == list(range(1, len(executed) + 1))
    assert not [output for cell in executed.values() for output in cell.outputs if output.output_type == "error"]


@pytest.mark.slow
def test_the_figures_are_there(executed):
    assert {name for name, cell in executed.items() if pictures(cell)} == set(FIGURES)
    for name in FIGURES:
        (picture,) = pictures(executed[name])
        assert picture.std() > 1, name


@pytest.mark.long
def test_a_stage_says_how_far_it_is_in_one_line(executed):
    for name, label in (("vae", "latent wavelet_vae"), ("flow", "text"), ("distill", "student consistency")):
        said, kind = printed(executed[name]), label.partition(" ")[0]
        work = f"train {label}"
        assert len(re.findall(rf"\] {work} \d+/12 ", said)) == 1 and f"] {work} 12/12 (100%), loss " in said
        assert len(re.findall(r" is made in runs/stages/", said)) == 1  # what it builds on is found
        assert re.search(rf"\] {label}: {kind}-\w+ is made in runs/stages/", said)


@pytest.mark.long
def test_the_stages_build_on_each_other_and_are_found_again(executed, place):
    results = {
        path.name.partition("-")[0]: json.loads((path / "result.json").read_text())
        for path in (place / "runs" / "stages").iterdir()
        if (path / "result.json").exists()
    }
    latent, text, student = (results[kind] for kind in ("latent", "text", "student"))
    assert text["built_on"]["latent"] == student["built_on"]["latent"] == latent["key"]
    assert student["built_on"]["start"] == text["key"]
    assert text["built_on"]["encoded"] == student["built_on"]["encoded"]


@pytest.mark.long
def test_what_it_saved_loads_and_makes_images(executed, place):
    stages, pipeline = place / "runs" / "stages", place / "runs" / "iris_pipeline"
    text, distilled = (next(stages.glob(f"{stage}-*")) / "weights" for stage in ("text", "student"))
    for name in ("model.safetensors", "latent.safetensors"):
        trained, saved = load_tensors(text / name)[0], load_tensors(pipeline / name)[0]
        assert trained.keys() == saved.keys() and all(torch.equal(trained[key], saved[key]) for key in trained)
    for folder in (pipeline, *students(distilled, (1, 2, 4)).values()):
        model = IrisPipeline.from_pretrained(folder)
        images = model.generate(["a large red circle", "a blue square"])
        assert images.shape == (2, 32, 32, 3) and images.float().std() > 1


def plan_of(scale: str, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What the notebook's switch chooses."""
    monkeypatch.setenv("IRIS_NOTEBOOK_SCALE", scale)
    names: dict = {}
    for cell in ("switch", "plan"):
        exec(cells(read())[cell].source, names)
    return names["plan"]


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_is_made_of_settings_that_there_are(scale, monkeypatch):
    plan = plan_of(scale, monkeypatch)
    chosen = TREE.build([*plan["settings"].split(), f"stage={plan['flow']}"])
    assert chosen.depth.training == "exits" and chosen.compute.device == ("cuda" if scale == "gpu" else "cpu")
    for stage in ("vae", plan["flow"]):
        # The curves have points between their ends, and the last one is that of the finished weights.
        steps = chosen.training(stage).steps
        assert steps % chosen.compute.validate_every == 0 and steps > chosen.compute.validate_every
    assert all(isinstance(prompt, str) for prompt in plan["prompts"])


def test_an_unknown_scale_is_told(monkeypatch):
    with pytest.raises(ValueError, match="SCALE='huge' is unknown; allowed: embedded, gpu, smoke"):
        plan_of("huge", monkeypatch)


def test_the_committed_outputs_are_a_whole_run_and_name_no_machine():
    found = cells(read())
    assert [cell.execution_count for cell in found.values()] == list(range(1, len(found) + 1))
    assert {name for name, cell in found.items() if pictures(cell)} == set(FIGURES)
    outputs = [output for cell in found.values() for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert "SCALE=embedded: " in printed(found["time"])
    for cell in found.values():
        assert not re.search(r"(^|[\s'\"=:(])/\w+/|[A-Z]:\\", printed(cell)), cell.id
    assert NOTEBOOK.stat().st_size < LARGEST
