"""The harness with parts that come from elsewhere: a pretrained text encoder and latent, and somebody's own mixer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from real_command import json_of, report_of, rows_of, succeeded, training_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("parts"),
]  # one worker: what the module's fixtures make is shared

MIXER = """
from torch import nn

class Mean(nn.Module):
    def __init__(self, dim, width=None):
        super().__init__()
        self.value, self.out = nn.Linear(dim, width or dim), nn.Linear(width or dim, dim)

    def forward(self, x):
        return x + self.out(self.value(x).mean((1, 2), keepdim=True))
"""


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
def rows(place: Path) -> list[dict[str, str]]:
    """The trials of a grid made of these parts, as its report has them."""
    said = succeeded(
        place,
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
    return rows_of(report_of(said, place))


@pytest.fixture(scope="module")
def model(place: Path, rows: list[dict[str, str]]) -> Path:
    """The saved model of the first trial."""
    return training_of(place / "runs" / "trials" / rows[0]["key"]) / "weights"


def test_all_of_it_trains_and_is_measured(place, rows):
    assert [row["state"] for row in rows] == ["done"] * 2
    for row in rows:
        assert float(row["fid"]) > 0 and float(row["validation_loss"]) > 0 and float(row["latency_ms"]) > 0
    made = [path.name.partition("-")[0] for path in (place / "runs" / "stages").iterdir()]
    # What is given is looked at once, for both trials: the latent's spread, the captions' embeddings.
    assert [made.count(kind) for kind in ("text", "latent", "captions")] == [2, 1, 1]


def test_a_trained_model_keeps_nothing_of_what_it_was_given(model):
    """The text encoder and the autoencoder are named in config.json, and their weights are not in the model's files."""
    from safetensors import safe_open

    saved = json_of(model / "config.json")
    assert saved["text"]["name"] == "clip" and saved["text"]["source"].endswith("clip")
    with safe_open(model / "model.safetensors", "pt") as weights:
        assert not [name for name in weights.keys() if name.startswith("text.")]  # noqa: SIM118


def test_it_makes_images_from_the_command_line(place, model):
    succeeded(place, "a red circle", "--model", str(model), "--out", "made.png", "--steps", "2", module="iris")
    assert (place / "made.png").stat().st_size > 100
