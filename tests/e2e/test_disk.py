"""A disk that is full or only read: a clear error, nothing lost, and the same command goes on when there is room."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from real_command import command

from ablations.launch.job import no_room
from ablations.question.settings import TREE
from ablations.run import main
from ablations.session.grid_record import Entry, GridRecord, record_path
from iris.training.__main__ import main as train

GRID = ("grid=mixers", "scale=smoke", "threads=1")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a disk of its own with these options of mount, at tmp/runs."""
    place = tmp_path / "runs"

    def mount(options: str) -> Path:
        place.mkdir(exist_ok=True)
        if (
            os.geteuid()
            or subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=False, capture_output=True
            ).returncode
        ):
            pytest.skip("mounting a disk needs root and the right to mount")
        return place

    yield mount
    subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)


def fill(place: Path, free: int) -> Path:
    """A file that leaves ``free`` bytes on the disk."""
    filler = place / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(place).free - free))
    return filler


def test_room_is_told_before_a_folder_is_made(disk, tmp_path):
    assert no_room(tmp_path / "new" / "runs") == "" and not (tmp_path / "new").exists()
    place = disk("size=1m")
    fill(place, 4096)
    assert no_room(place / "new") == f"{place / 'new'} cannot be written: No space left on device"
    assert [path.name for path in place.iterdir()] == ["filler"]


def test_a_runs_folder_that_is_only_read(disk, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place = disk("size=1m")
    trials = [Entry("aaaa", "grfm, seed 0", "trials/aaaa", "grfm")]
    record = GridRecord("mixers", "Which?", "", "local", 1, trials, [], [1, "core"])
    record.save(record_path(TREE.build([*GRID, f"runs_dir={place}"])))
    (place / "trials" / "aaaa").mkdir(parents=True)
    (place / "trials" / "aaaa" / "claim").touch()
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    assert main([*GRID, f"runs_dir={place}"]) == 2
    told = capsys.readouterr().err
    assert told == f"error: runs_dir: {place} cannot be written: Read-only file system\n"
    assert not (tmp_path / "reports").exists() and not (tmp_path / "mlflow.db").exists()
    assert main([*GRID, f"runs_dir={place}", "action=status"]) == 0  # looking still works
    assert "1 trials: 1 waiting" in capsys.readouterr().out


def test_a_training_command_says_in_one_line_where_a_full_disk_stopped_it(disk, tmp_path, monkeypatch, capsys):
    """While pictures are stored, latents are encoded and weights are published; each time the same command goes on.

    What it ends with is what it would have been.
    """
    monkeypatch.chdir(tmp_path)
    place = disk("size=64m")
    small = (
        "scale=smoke",
        "log=none",
        "threads=1",
        "data.train=128",
        "data.validation=0",
        "model.dim=16",
        "model.heads=2",
        "model.text_width=16",
        "latent.width=8",
    )
    assert train([*small, "stage=text", "out=whole", "runs_dir=elsewhere"]) == 0, capsys.readouterr().err
    small += (f"runs_dir={place}",)
    # Less than what comes next needs: pictures 393 kB, latents 131 kB, weights.
    for words, where in (
        (("stage=vae",), "stages/data-"),
        (("stage=text",), "stages/encoded-"),
        (("stage=text", f"out={place}/model"), ".model.new/model.safetensors"),
    ):
        filler = fill(place, 65_536)
        assert train([*small, *words]) == 1
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and told.startswith(f"error: no space left to write to {place}/{where}"), told
        assert told.endswith("; free some space and run the same command again\n")
        filler.unlink()
        assert train([*small, *words]) == 0, capsys.readouterr().err
        capsys.readouterr()
    assert sorted(path.name for path in place.glob("*model*")) == ["model"]
    for file in (tmp_path / "whole").iterdir():
        assert (place / "model" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
def test_a_grid_whose_disk_fills_up_says_so_and_goes_on_when_there_is_room(disk, tmp_path):
    place = disk("size=48m")
    one = (
        *GRID,
        "grid.axes={model.mixer: [grfm]}",
        "compute.checkpoint_seconds=0",
        "track.models_mb=0",
        "measure.latency.rounds=0",
    )
    filler = fill(place, 6_500_000)  # shared work needs 5 MB
    said = command(tmp_path, *one)
    assert said.returncode == 1 and "Traceback" not in said.stderr
    assert ": disk: " in said.stdout and "no space left" in said.stdout.lower()
    (report,) = tmp_path.glob("reports/mixers/*/report.md")
    assert "no room on the disk" in report.read_text()
    filler.unlink()
    said = command(tmp_path, *one)
    assert said.returncode == 0, said.stdout + said.stderr
    (folder,), (text,) = (place / "trials").glob("*"), (place / "stages").glob("text-*")
    steps = [json.loads(line)["step"] for line in (text / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 12 and not (folder / "error.json").exists()
    assert "Speed and memory were not measured: measure.latency.rounds is 0." in " ".join(said.stdout.split())
