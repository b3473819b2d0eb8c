"""What a person sees while something is made: lines of progress, and grids of pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from iris.io.pictures import save_grid
from iris.io.progress import Progress, clock_text, short, waiting

ROW = {"step": 10, "steps": 40, "time": 1.0, "loss": 0.51234, "images_per_s": 100.0, "psnr": 21.04}


def progress(now: list[float], **how) -> tuple[Progress, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, width=120, **how)
    return Progress(console=console, every=5.0, clock=lambda: now[0]), file


def test_plain_lines_say_step_loss_pace_and_time_left():
    now = [0.0]
    said, file = progress(now)
    now[0] = 65.0
    said.training("text", ROW, batch=20)
    assert file.getvalue() == "[1:05] text 10/40 (25%), loss 0.5123, PSNR 21.0 dB, 100 images/s, 0:06 left\n"


def test_plain_lines_are_few_but_the_last_is_there():
    now = [0.0]
    said, file = progress(now)
    for step in range(1, 41):
        now[0] += 0.5
        said.training("text", ROW | {"step": step}, batch=20)
    lines = file.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["1/40", "11/40", "21/40", "31/40", "40/40"]
    assert "left" not in lines[-1]


def test_the_time_left_of_other_work_comes_from_its_pace():
    now = [0.0]
    said, file = progress(now)
    said.done("encoding", 10, 100)
    now[0] = 10.0
    said.done("encoding", 20, 100)
    said.done("counting", 7)
    assert file.getvalue().splitlines()[1:] == ["[0:10] encoding 20/100 (20%), 0:40 left", "[0:10] counting 7"]


def test_a_terminal_gets_one_line_that_goes_and_sentences_that_stay():
    now = [0.0]
    said, file = progress(now, force_terminal=True)
    with said:
        said.training("text", ROW, batch=20)
        said.say("done")
    shown = file.getvalue()
    assert "10/40" in shown and shown.rstrip().endswith("done") and "\x1b[" in shown


def test_only_the_first_process_speaks():
    file = io.StringIO()
    silent = Progress(quiet=True, console=Console(file=file))
    silent.say("hello")
    silent.training("text", ROW, batch=2)
    assert file.getvalue() == ""


def test_there_are_signs_of_life_while_other_processes_work(monkeypatch):
    monkeypatch.setattr("iris.io.progress.SECONDS", 0.01)
    beats = []

    class Heard:
        def done(self, work, count):
            beats.append(work)

    with waiting(Heard(), "measuring"):
        while not beats:
            pass
    assert set(beats) == {"measuring, seconds so far:"}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1h00"), (360_000, "4d")]
)
def test_times_are_short(seconds, text):
    assert clock_text(seconds) == text


def test_losses_are_short():
    values = (0.51234, 12.345, 123456.0, float("nan"))
    assert [short(value) for value in values] == ["0.5123", "12.3", "1e+05", "nan"]


def test_a_grid_of_pictures(tmp_path):
    images = np.stack([np.full((32, 32, 3), 40 * i, np.uint8) for i in range(5)])
    save_grid(tmp_path / "deep" / "grid.png", images, 3)
    sheet = np.asarray(Image.open(tmp_path / "deep" / "grid.png"))
    assert sheet.shape == (2 * 66 - 2, 3 * 66 - 2, 3)
    assert [int(sheet[10, 66 * k + 10, 0]) for k in range(3)] == [0, 40, 80]
    assert (sheet[66 + 10, 10, 0], sheet[66 + 10, 66 + 10, 0], sheet[66 + 10, 132 + 10, 0]) == (120, 160, 255)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["grid.png"]
