"""The harness with parts that come from elsewhere: a pretrained text encoder and latent, and somebody's own mixer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.xdist_group("parts")  # one worker: what the module's fixtures make is shared
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "iris"))

MIXER = """
from torch import nn

class Mean(nn.Module):
    def __init__(self, dim, width=None):
        super().__init__()
        self.value, self.out = nn.Linear(dim, width or dim), nn.Linear(width or dim, dim)

    def forward(self, x):
        return x + self.out(self.value(x).mean((1, 2), keepdim=True))
"""


def run(folder: Path, module: str, *words: str) -> subprocess.CompletedProcess[str]:
    """``python -m module`` in ``folder``, offline."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small CLIP, a small AutoencoderKL and a mixer's file."""
    from diffusers import AutoencoderKL
    from small_clip import save_clip

    folder = tmp_path_factory.mktemp("parts")
    save_clip(folder / "clip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoencoderKL(
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
        ).save_pretrained(folder / "vae")
    (folder / "my_module.py").write_text(MIXER)
    return folder


@pytest.fixture(scope="module")
def trials(place: Path) -> list[Path]:
    """The trials of a grid made of these parts."""
    done = run(
        place,
        "ablations.run",
        "grid=sharing",
        "scale=smoke",
        "model.mixer=my_module:Mean",
        "model.text=clip",
        "model.text_source=clip",
        "latent=pretrained",
        "latent.source=vae",
        "launcher.workers=1",
        "measure.samples=32",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted((place / "runs" / "trials").iterdir())


def test_all_of_it_trains_and_is_measured(place, trials):
    assert len(trials) == 2
    (speed,) = (place / "runs" / "speed").glob("*.json")
    for trial in trials:
        metrics = json.loads((trial / "result.json").read_text())["metrics"]
        assert metrics["fid"] > 0 and metrics["validation_loss"] > 0
        assert json.loads(speed.read_text())[trial.name]["latency_ms"] > 0
    stages = {folder.name.partition("-")[0] for folder in (place / "runs" / "stages").iterdir()}
    assert stages - {"prepare"} == {"data", "latent", "text", "reference"}


def test_a_trained_model_keeps_nothing_of_what_it_was_given(trials):
    """The text encoder and the autoencoder are named in config.json, and their weights are not in the trial's files."""
    saved = json.loads((trials[0] / "model" / "config.json").read_text())
    assert saved["text"]["name"] == "clip" and saved["text"]["source"].endswith("clip")
    from safetensors import safe_open

    with safe_open(trials[0] / "model" / "model.safetensors", "pt") as weights:
        assert not [name for name in weights.keys() if name.startswith("text.")]  # noqa: SIM118


def test_it_makes_images_from_the_command_line(place, trials):
    done = run(place, "iris", "a red circle", "--model", str(trials[0] / "model"), "--out", "made.png", "--steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (place / "made.png").stat().st_size > 100


def test_a_caption_that_is_no_class_is_told_before_training(place, trials):
    done = run(
        place,
        "ablations.run",
        "grid=sharing",
        "scale=smoke",
        "grid.axes={depth.share: [true]}",
        "model.text=labels",
        "launcher=inline",
    )
    assert done.returncode != 0
    assert "model.text" in done.stdout + done.stderr
    failed = [folder for folder in (place / "runs" / "trials").iterdir() if folder not in trials]
    assert failed and not any((folder / "metrics.jsonl").exists() for folder in failed)
