"""data.live: a stage on tar shards as they come, killed in the middle of an epoch, by one process and by two."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import tarfile
from pathlib import Path

import pytest
import torch
from forked import ranks, together
from PIL import Image
from test_stages import SMALL, check_images, folder_of, logged, made, train

from iris.io.tensors import load_tensors
from iris.training.__main__ import main
from iris.training.live import LiveBatches

SHARDS, ROWS, STEPS = 5, 11, 12  # 16 rows a step: an epoch ends in the middle of every fourth


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a live text stage; its latent is there already."""
    folder = tmp_path_factory.mktemp("live")
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for row in range(ROWS):
                number, stream = shard * ROWS + row, io.BytesIO()
                Image.new("RGB", (40, 32), (4 * number, 99, 250 - 4 * number)).save(stream, "PNG")
                caption = f"a {('red', 'green', 'blue')[number % 3]} picture".encode()
                for ending, data in (("png", stream.getvalue()), ("txt", caption)):
                    info = tarfile.TarInfo(f"{row:03d}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    data = ["data=tar", f"data.path={folder}", "data.size=32", "data.buffer=7", "data.crop=random", "data.live=true"]
    with contextlib.chdir(folder):
        assert made(train("stage=text", *data, "train.steps=1", "out=first")) == ["latent", "text"]
        (latent,) = Path("runs/stages").glob("latent-*")
    return ["stage=text", *data, f"latent.weights={folder / latent / 'weights'}"]


def kill_at(step: int) -> None:
    """kill -9 of this process when it has taken the rows of ``step``."""
    of = LiveBatches.of

    def watched(self, wanted):
        batch = of(self, wanted)
        if wanted == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch

    LiveBatches.of = watched


def run_together(words: list[str], world: int, killed: tuple[int, int] | None = None) -> list[int]:
    """The command in so many processes, of which one is killed at a step; their exit codes."""

    def work(rank: int) -> int:
        if killed is not None and killed[0] == rank:
            kill_at(killed[1])
        return main([*SMALL, *words])

    return together(work, [{}] if world == 1 else ranks(world))


def check_same(folder: Path, other: Path, told: str) -> None:
    """Weights and curves, bit by bit."""
    for name in ("model.safetensors", "latent.safetensors"):
        tensors, others = (load_tensors(place / "weights" / name)[0] for place in (folder, other))
        assert tensors.keys() == others.keys() and tensors, told
        assert all(torch.equal(tensors[key], others[key]) for key in tensors), told
    for name in ("step", "loss", "grad_norm", "validation"):
        assert [row.get(name) for row in logged(folder)] == [row.get(name) for row in logged(other)], told


def test_text_is_trained_on_shards_as_they_come(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = train(*words, "out=model")
    assert made(lines) == ["text"]
    check_images(tmp_path / "model", ["a red picture"])
    folder = folder_of(lines)
    rows = logged(folder)
    assert rows[-1]["loss"] < rows[0]["loss"] and [row["step"] for row in rows if "validation" in row] == [6, 12]
    (held,) = Path("runs/stages").glob("encoded-*/*/rows.jsonl")  # the first rows, to look at; of the others nothing
    assert len(held.read_text().splitlines()) == SHARDS * ROWS < 512
    assert made(train(*words)) == [] and made(train(*words, "data.buffer=8")) == ["text"]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0)])
def test_a_kill_in_the_middle_of_an_epoch_changes_nothing(world, workers, words, tmp_path, monkeypatch):
    """Of any of the processes, at any step."""
    words = [*words, f"data.workers={workers}"]
    killed, step = random.Random().randrange(world), random.Random().randint(2, STEPS - 1)
    told = f"process {killed} killed in step {step}"
    print(told)
    folders = []
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "cut":
            codes = run_together(words, world, (killed, step))
            assert codes[killed] == -signal.SIGKILL and codes.count(-signal.SIGKILL) == 1, told
        assert run_together(words, world) == [0] * world, told
        folders += Path.cwd().glob("runs/stages/text-*")
    whole, cut = folders
    assert whole.name == cut.name
    check_same(cut, whole, told)
    assert len(list(cut.glob("positions-*.jsonl"))) == world
