"""From a command line to a stage's checked settings: what composes, what a mistake is answered, what makes a key."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from rich.console import Console

from iris.data.settings import KINDS, READY
from iris.errors import SettingError
from iris.io.progress import Progress
from iris.stages import KINDS as STAGE_KINDS
from iris.stages import stage_of
from iris.stages.base import Desk, Stage
from iris.stages.processes import Processes
from iris.stages.settings import COMPOSER, GROUPS, STAGES, Settings, listed, settings_of, words_for
from iris.training import __main__ as command
from iris.training.__main__ import main
from iris.training.safety import DiskFull, LostWorker, NonFiniteLoss, OutOfMemory, ShareError

FILES = ("data.path=rows.parquet", "data.size=32")
STREAM = ("data=tar", "data.path=taken", "data.size=32", "data.live=true")


def stage(folder: Path, *words: str) -> Stage:
    """The stage of a command line, not made."""
    console = Console(file=open(folder / "said", "w"))
    desk = Desk(folder / "runs", Progress(console=console), Processes("cpu"), "none")
    return stage_of([*words, "scale=smoke"], desk)


def key(folder: Path, *words: str) -> str:
    return stage(folder, *words).key


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_of_every_group_composes(group):
    assert COMPOSER.options(group)
    for option in COMPOSER.options(group):
        words = [f"{group}={option}"] if group == "stage" else ["stage=text", f"{group}={option}"]
        assert isinstance(settings_of(words), Settings)


def test_there_is_a_file_for_every_stage_and_kind_of_data():
    assert set(COMPOSER.options("stage")) == set(STAGES) == set(STAGE_KINDS)
    assert set(COMPOSER.options("data")) == {*KINDS, *READY}
    assert all(settings_of([f"stage={name}"]).stage == name for name in STAGES)
    assert all(settings_of(["stage=vae", f"data={name}"]).data.name == name for name in COMPOSER.options("data"))


def test_the_scale_beats_the_stage_and_the_command_line_beats_both():
    assert settings_of(["stage=vae"]).train.optimiser == "adamw"
    assert settings_of(["stage=text"]).train.optimiser == "muon"
    assert settings_of(["stage=vae", "scale=smoke"]).train.steps == 12
    assert settings_of(["train.steps=7", "stage=vae", "scale=smoke"]).train.steps == 7


@pytest.mark.parametrize(
    ("word", "steps"),
    [
        ("student.steps=1,2,4", (1, 2, 4)),
        ("student.steps=4", (4,)),
        ("student.steps=[2,1]", (2, 1)),
        ("student.steps='1,2'", (1, 2)),
    ],
)
def test_students_steps_as_they_are_typed(word, steps):
    assert settings_of(["stage=distill", word]).student.steps == steps


def test_only_bare_lists_are_read_as_lists():
    assert listed("a.b=1,2") == "a.b=[1,2]"
    for word in ("a=1", "a=[1,2]", "a='x,y'", "model.mixer=grfm[fourier,recurrence]", "a,b"):
        assert listed(word) == word


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["stage is missing", *STAGES]),
        (["stage=txt"], ["stage='txt' is unknown", "did you mean text?"]),
        (["stage=text", "train.stepz=5"], ["train.stepz is not a setting", "did you mean train.steps?"]),
        (["stage=text", "train.steps=-5"], ["train.steps=-5", "at least 1"]),
        (["stage=text", "train.steps=1,2"], ["train.steps=[1, 2]", "must be int"]),
        (["stage=text", "train.precision=int8"], ["train.precision='int8'", "no, bf16, fp16"]),
        (["stage=text", "train.batch=30", "train.accumulate=4"], ["train.batch=30", "multiple of 4"]),
        (["stage=vae", "train.batch=30", "train.accumulate=4"], ["train.batch=30", "multiple of 4"]),
        (["stage=text", "model.dim=30"], ["model.dim=30", "multiple of 4 * model.heads"]),
        (["stage=text", "model.mixer=grmf"], ["model.mixer='grmf'", "grfm, attention"]),
        (["stage=vae", "latent.width=20"], ["latent.width=20", "multiple of 8"]),
        (["stage=vae", "latent.levels=6"], ["image size 32x32", "multiple of", "64"]),
        (["stage=text", "latent.levels=6"], ["image size 32x32", "multiple of", "64"]),
        (["stage=vae", "adversarial.weight=1", "adversarial.layers=5"], ["adversarial.layers=5", "at most"]),
        (["stage=vae", "reconstruction.bands=1,2"], ["reconstruction.bands", "four weights"]),
        (["stage=vae", "train.gradient_checkpointing=true"], ["train.gradient_checkpointing=true", "false"]),
        (["stage=vae", "from=text"], ["from=text", "stage=vae builds on nothing"]),
        (["stage=vae", "data=parquet", "data.size=32"], ["data.path is needed"]),
        (["stage=vae", "data=parquet", *FILES], ["data.path does not exist", "rows.parquet"]),
        (["stage=vae", "data.crop=random"], ["data.crop=random", "allowed: centre"]),
        (["stage=text", "data.crop=random"], ["data.crop=random", "allowed: centre, or data.live=true"]),
        (["stage=text", "data.live=yes"], ["data.live='yes'", "must be bool"]),
        (["stage=text", "data.workers=-1"], ["data.workers=-1", "at least 0"]),
        (["stage=vae", "data.live=true"], ["data.live=true: stage=vae", "allowed: false"]),
        (["stage=distill", "data.live=true"], ["data.live=true: stage=distill", "allowed: false"]),
        (["stage=class", *STREAM], ["data.labels is missing", "data.live=true", "data.live=false"]),
        (["stage=text", "model.text=labels", *STREAM], ["data.labels is missing", "data.live=true"]),
        (["stage=vae", "data.min_score=3"], ["data.min_score needs data.score_column"]),
        (["stage=aesthetic"], ["data.min_score is missing", "data.score_column"]),
        (["stage=aesthetic", "from=null"], ["from=null cannot be used with stage=aesthetic", "text, class"]),
        (["stage=class", "from=text"], ["from=text cannot be used with stage=class", "null"]),
        (["stage=text", "from=nothing/there"], ["from='nothing/there'", "neither a finished stage", "nor a folder"]),
        (["stage=text", "from=3"], ["from=3", "must be str or null"]),
        (["stage=text", "vae=."], ["vae=.", "config.json is missing"]),
        (["stage=distill", "student.steps=3", "student.method=shortcut"], ["student.steps=3", "powers of two"]),
        (["stage=distill", "student.steps=0"], ["student.steps", "numbers from 1"]),
        (["stage=distill", "student.method=magic"], ["student.method='magic'", "consistency, shortcut"]),
        (["stage=text", "sample.sampler=ddim"], ["sample.sampler='ddim'", "euler, heun"]),
        (["stage=text", "log=paper"], ["log='paper'", "mlflow, none"]),
        (["stage=text", "out=taken"], ["out=taken", "other files"]),
        (["--verbose"], ["--verbose", "--cfg job"]),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_is_made(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    for name in ("thesis.tex", "0.tar"):
        (tmp_path / "taken" / name).touch()
    assert main([*([] if "--verbose" in words else ["scale=smoke", "log=none"]), *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and "Traceback" not in said.err
    assert all(word in said.err for word in expected), said.err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


FULL_DISK = OSError(errno.ENOSPC, "No space left on device", "runs/pixels.bin")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (
            OutOfMemory("out of memory in step 3"),
            1,
            {"0": "error: out of memory in step 3", "1": "error (process 1): out of memory in step 3"},
        ),
        (LostWorker("gone"), 1, {"0": "error: gone", "1": "error (process 1): gone"}),
        (DiskFull(errno.ENOSPC, "no space"), 1, {"0": "error: no space", "1": "error (process 1): no space"}),
        (
            FULL_DISK,
            1,
            {
                rank: f"error{process}: no space left to write to runs/pixels.bin; free some space and run the "
                "same command again"
                for rank, process in (("0", ""), ("1", " (process 1)"))
            },
        ),
        (NonFiniteLoss("step 3"), 1, {"0": "error: step 3", "1": ""}),
        (SettingError("train.x=1"), 2, {"0": "error: train.x=1", "1": ""}),
        (ShareError("no row"), 2, {"0": "error: no row", "1": "error (process 1): no row"}),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_error_is_told_by_the_first_process_or_by_the_one_that_has_it(error, code, told, rank, monkeypatch, capsys):
    def failing(words):
        raise error

    monkeypatch.setattr(command, "run", failing)
    monkeypatch.setenv("RANK", rank)
    assert main(["stage=vae"]) == code
    assert capsys.readouterr().err.strip() == told[rank]


def test_another_error_of_the_disk_is_not_hidden(monkeypatch):
    monkeypatch.setattr(command, "run", lambda words: open("/nowhere/at/all"))
    with pytest.raises(FileNotFoundError):
        main(["stage=vae"])


def test_keys_know_what_determines_weights_and_nothing_else(tmp_path):
    text = key(tmp_path, "stage=text")
    assert text == key(
        tmp_path,
        "stage=text",
        "train.checkpoint_seconds=1",
        "train.accumulate=2",
        "sample.count=9",
        "train.log_every=3",
        "out=x",
        "log=none",
        "student.grid=32",
    )
    others = [
        "train.steps=13",
        "seed=1",
        "model.iterations=3",
        "data.train=65",
        "data.seed=1",
        "latent.channels=4",
        "train.precision=bf16",
        "latent.store=float32",
        "depth.norm=sandwich",
        "fourier.form=dct",
        "latent=haar",
    ]
    keys = {key(tmp_path, "stage=text", other) for other in others}
    assert len(keys) == len(others) and text not in keys
    assert text == key(tmp_path, "stage=text", "attention.position=none")  # which a GRFM does not read


def test_keys_of_live_data_know_what_their_order_depends_on(tmp_path, monkeypatch):
    (tmp_path / "0.tar").touch()
    stored = ["stage=text", "data=tar", f"data.path={tmp_path}", "data.size=32", "data.train=9"]
    assert key(tmp_path, *stored) == key(tmp_path, *stored, "data.workers=2")
    words = [*stored, "data.live=true"]
    same = [["data.workers=1"], ["latent.store=float32"], ["data.max_bad=0.1"]]
    assert {key(tmp_path, *words, *more) for more in same} == {key(tmp_path, *words)}
    others = ["data.workers=2", "data.buffer=7", "data.crop=random", "data.size=64", "seed=1", "data.live=false"]
    keys = {key(tmp_path, *words), *(key(tmp_path, *words, other) for other in others)}
    assert len(keys) == len(others) + 1
    # What stage=vae stores is no matter of the text stage itself, nor is how that one reads one of the vae's.
    assert stage(tmp_path, *words).facts() == stage(tmp_path, *words, "data.train=8").facts()
    vae = [
        stage(tmp_path, *some).earlier["vae"].key for some in (stored, [*words, "data.workers=2", "data.crop=random"])
    ]
    assert vae[0] == vae[1]
    before = stage(tmp_path, *words).facts()
    monkeypatch.setattr(Processes, "count", 2)
    assert stage(tmp_path, *words).facts() != before


def test_a_stage_on_the_way_is_the_one_that_its_own_command_makes(tmp_path):
    vae = key(tmp_path, "stage=vae", "data.train=65", "latent.channels=4")
    for words in (["stage=text"], ["stage=class", "train.steps=5"]):
        assert stage(tmp_path, *words, "data.train=65", "latent.channels=4").earlier["vae"].key == vae
    text = key(tmp_path, "stage=text")
    for words in (
        ["stage=distill", "train.steps=5", "student.grid=4"],
        ["stage=aesthetic", "data.score_column=size", "data.min_score=1"],
    ):
        assert stage(tmp_path, *words).earlier["start"].key == text
    aesthetic = ["data.score_column=size", "data.min_score=1"]
    student = stage(tmp_path, "stage=distill", "from=aesthetic", *aesthetic)
    assert student.earlier["start"].key == key(tmp_path, "stage=aesthetic", *aesthetic)


def test_words_of_a_stage_on_the_way():
    words = [
        "stage=aesthetic",
        "data=shapes",
        "train.steps=3",
        "train.device=cuda",
        "from=text",
        "vae=x",
        "out=o",
        "data.score_column=size",
        "data.min_score=1",
        "latent.width=32",
    ]
    assert words_for("text", words) == ["stage=text", "data=shapes", "train.device=cuda", "vae=x", "latent.width=32"]
    assert words_for("vae", words) == ["stage=vae", "data=shapes", "train.device=cuda", "latent.width=32"]


def test_an_absent_device_is_told_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["stage=text", "scale=smoke", "log=none", "train.device=xpu"]) == 2
    assert "train.device=xpu is not there" in capsys.readouterr().err


def test_help_and_the_composed_configuration(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    words = ("stage=vae", "student.steps=1,2,4", "wavelet_vae", "cifar10", "smoke", "from=class")
    assert all(word in shown for word in words)
    assert main(["stage=distill", "student.steps=1,2", "--cfg", "job"]) == 0
    assert "stage: distill" in capsys.readouterr().out


def test_the_error_type_is_the_one_that_callers_catch():
    with pytest.raises(SettingError, match="stage is missing"):
        settings_of(["train.steps=3"])
