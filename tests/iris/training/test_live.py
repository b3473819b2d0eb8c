"""Training on examples as they come: whose rows, at which address, and where they go on."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_clip import save_clip
from small_models import CAPTIONS, CHANNELS, small_model

from iris.data import open_source
from iris.io.tensors import load_tensors
from iris.latents import build_latent
from iris.pipeline import IrisPipeline
from iris.text import CLIPText
from iris.training import live
from iris.training.__main__ import main
from iris.training.checkpoint import CHECKPOINT
from iris.training.live import LiveBatches, LiveFlowTask, Positions
from iris.training.loop import Share
from iris.training.safety import ShareError, non_finite

SMALL = (
    "scale=smoke",
    "log=none",
    "data.train=48",
    "data.validation=16",
    "latent=haar",
    "model.dim=16",
    "model.heads=2",
    "pretrain.steps=4",
    "train.steps=4",
    "compute.validate_every=0",
    "data.live=true",
)


def write_shards(folder: Path, shards: int = 3, rows: int = 11) -> str:
    """Pictures of one colour each, captioned from ``CAPTIONS``, with a class number from 0 to 2."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for row in range(rows):
                number, stream = shard * rows + row, io.BytesIO()
                Image.new("RGB", (48, 32), (4 * number, 99, 200 - 4 * number)).save(stream, "PNG")
                members = {
                    "png": stream.getvalue(),
                    "txt": CAPTIONS[number % 4].encode(),
                    "json": json.dumps({"class": number % 3}).encode(),
                }
                for ending, data in members.items():
                    info = tarfile.TarInfo(f"{row:03d}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return str(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"))


def batches(shards: str, folder: Path, rank: int = 0, world: int = 1, workers: int = 0, batch: int = 6, **how):
    source = open_source("tar", path=shards, **{"size": 8, "buffer": 4} | how)
    return LiveBatches(source, batch, 1, rank, world, workers, folder)


def keys(rows: LiveBatches, steps: range) -> list[list[str]]:
    return [rows.of(step).keys for step in steps]


def task(shards: str, folder: Path, rank: int = 0, world: int = 1) -> LiveFlowTask:
    """Of which the latents are the pictures themselves."""
    module, rows = small_model(awake=True), batches(shards, folder, rank, world, batch=8)
    rows.go_on_at(0)
    encode = module.text.tokenise
    return LiveFlowTask(
        module,
        torch.zeros(4, CHANNELS, 8, 8),
        encode(CAPTIONS),
        encode([""])[0],
        8,
        0,
        0.3,
        "none",
        live=rows,
        latent=build_latent("pixel", patch=1),
        texts=lambda batch: batch.captions,
    )


# -- rows and positions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_share_an_epoch(workers, tmp_path):
    """Disjoint, and together all of it."""
    seen, path = [], write_shards(tmp_path / "even", 4, 4)
    for rank in range(2):
        rows = batches(path, tmp_path, rank, 2, workers, batch=4)
        rows.go_on_at(0)
        seen.append([key for batch in keys(rows, range(4)) for key in batch])
        rows.close()
    assert len(set(seen[0])) == len(set(seen[1])) == 8 and len({*seen[0], *seen[1]}) == 16


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("lost", [0, 3])
def test_rows_go_on_where_a_step_left_them(workers, lost, shards, tmp_path):
    """``lost`` lines of the last ones, with a half-written one behind: their rows are read again."""
    whole = batches(shards, tmp_path / "whole", workers=workers)
    (tmp_path / "whole").mkdir()
    whole.go_on_at(0)
    expected = keys(whole, range(12))
    cut = batches(shards, tmp_path, workers=workers)
    cut.go_on_at(0)
    keys(cut, range(9))
    cut.close()
    file = tmp_path / "positions-0.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 10))
    file.write_text("".join(lines[: 9 - lost]) + '{"step": 3')
    again = batches(shards, tmp_path, workers=workers)
    again.go_on_at(8)  # the checkpoint is older than what was read
    assert keys(again, range(8, 12)) == expected[8:]
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == list(range(1, 13))


def test_only_positions_that_may_be_needed_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "KEPT", 4)
    positions = Positions(tmp_path / "p")
    assert positions.up_to(0) == (0, None)
    for step in range(1, 14):
        positions.add(step, {"taken": step})
    assert [json.loads(line)["step"] for line in (tmp_path / "p").read_text().splitlines()] == [4, 8, 9, 10, 11, 12, 13]
    assert Positions(tmp_path / "p").up_to(11) == (11, {"taken": 11})
    assert Positions(tmp_path / "p").up_to(6) == (4, {"taken": 4})
    with pytest.raises(
        ShareError, match=f"{tmp_path}/p does not say where the data go on after step 3.*delete {tmp_path} "
    ):
        Positions(tmp_path / "p").up_to(3)
    assert Positions(tmp_path / "p").up_to(0) == (0, None) and not (tmp_path / "p").read_text()


# -- the loss -------------------------------------------------------------------------------------------------------


def test_parts_of_a_process_are_rows_of_that_process(shards, tmp_path):
    """With what was drawn for them, however many parts there are."""

    def loss(rank: int, count: int, step: int = 0) -> float:
        own = task(shards, tmp_path, rank, 2)
        return np.mean([own.loss(step, Share(rank * count + k, 2 * count))[0].item() for k in range(count)])

    for rank in range(2):
        assert loss(rank, 1) == pytest.approx(loss(rank, 2), rel=1e-5) == pytest.approx(loss(rank, 4), rel=1e-5)
    assert loss(0, 1) != pytest.approx(loss(1, 1), rel=1e-5)
    alone = task(shards, tmp_path)
    whole = alone.loss(0)[0].item()
    assert np.mean([task(shards, tmp_path).loss(0, Share(k, 2))[0].item() for k in range(2)]) == pytest.approx(
        whole, rel=1e-5
    )


def test_a_message_names_the_rows_by_their_keys(shards, tmp_path):
    own = task(shards, tmp_path, 1, 2)
    own.loss(0, Share(1, 2))
    first, second = own.live.of(0).keys[:2]
    told = str(non_finite(1, float("nan"), 1.0, own.describe(0), {}))
    assert f"Rows of the batch: 1 ({first}), 3 ({second}), " in told and ".tar/" in first


def test_what_a_share_holds_is_an_error_of_its_process(tmp_path):
    rows = batches(write_shards(tmp_path / "few", 1, 1), tmp_path, 1, 2)
    rows.go_on_at(0)
    with pytest.raises(ShareError, match="share 1 of 2 has no usable row"):
        rows.of(0)


# -- the stages -----------------------------------------------------------------------------------------------------


def run(folder: Path, *words: str) -> Path:
    """The folder of the stage that a command makes."""
    assert main([*SMALL, *words, f"out={folder / 'model'}"]) == 0
    name = next(word.partition("=")[2] for word in words if word.startswith("stage="))
    return next(folder.glob(f"runs/stages/{name}-*"))


def test_clip_runs_on_the_captions_of_each_batch(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_clip(tmp_path / "clip")
    folder = run(
        tmp_path,
        "stage=text",
        "data=tar",
        f"data.path={shards}",
        "data.size=32",
        "data.crop=random",
        "model.text=clip",
        "model.text_source=clip",
    )
    assert "embedding captions" not in capsys.readouterr().out and not list(tmp_path.glob("runs/stages/captions-*"))
    assert isinstance(IrisPipeline.from_pretrained("model").model.text, CLIPText)
    names = list(load_tensors(folder / CHECKPOINT)[0])
    assert names and not any(name.startswith("model.text.") for name in names)


def test_classes_of_a_stream_are_those_that_are_named(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(
        tmp_path,
        "stage=class",
        "data=tar",
        f"data.path={shards}",
        "data.size=32",
        "data.label_column=class",
        "data.labels=cat,dog,eel,fox",
    )
    assert IrisPipeline.from_pretrained("model").model.text.classes == ["cat", "dog", "eel", "fox"]


def test_classes_and_words_of_a_table_are_known(tmp_path, monkeypatch):
    """A drawn world, whose held-out rows are looked at as ever."""
    monkeypatch.chdir(tmp_path)
    run(tmp_path, "stage=class", "data.workers=1")
    assert set(IrisPipeline.from_pretrained("model").model.text.classes) <= {
        "circle",
        "square",
        "triangle",
        "cross",
        "ring",
    }
    (held,) = tmp_path.glob("runs/stages/encoded-*/*/rows.jsonl")  # of the rows to train on nothing is encoded
    assert len(held.read_text().splitlines()) == 16
