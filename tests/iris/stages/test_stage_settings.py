"""From a command line to a stage: what a mistake is answered, what makes a key, which stages are on the way."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from said import Said

from iris.errors import SettingError
from iris.stages import Context, Stage, stage_of
from iris.stages.processes import Processes
from iris.stages.settings import STAGES, TREE
from iris.training import __main__ as command
from iris.training.__main__ import main
from iris.training.safety import DiskFull, LostWorker, NonFiniteLoss, OutOfMemory, ShareError

FILES = ("data.path=rows.parquet", "data.size=32")
STREAM = ("data=tar", "data.path=taken", "data.size=32", "data.live=true")


def stage(folder: Path, *words: str) -> Stage:
    """The stage of a command line, not made."""
    return stage_of(TREE.build([*words, "scale=smoke"]), Context(folder / "runs", Said()))


def key(folder: Path, *words: str) -> str:
    return stage(folder, *words).key


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["stage is missing", *STAGES]),
        (["stage=txt"], ["stage='txt' is unknown", "did you mean text?"]),
        (["stage=text", "train.stepz=5"], ["train.stepz is not a setting", "did you mean train.steps?"]),
        (["stage=text", "train.steps=-5"], ["train.steps=-5", "at least 1"]),
        (["stage=text", "train.steps=1,2"], ["train.steps='1,2'", "must be int"]),
        (["stage=text", "compute.precision=int8"], ["compute.precision='int8'", "no, bf16, fp16"]),
        (["stage=text", "train.batch=30", "compute.accumulate=4"], ["train.batch=30", "multiple of 4"]),
        (["stage=vae", "vae.batch=30", "compute.accumulate=4"], ["vae.batch=30", "multiple of 4"]),
        (["stage=class", "pretrain.time_scale=9"], ["pretrain.time_scale=9.0", "at most 1.75"]),
        (["stage=text", "model.dim=30"], ["model.dim=30", "multiple of 4 * model.heads"]),
        (["stage=text", "model.mixer=grmf"], ["model.mixer='grmf'", "grfm, attention"]),
        (["stage=vae", "latent.width=20"], ["latent.width=20", "multiple of 8"]),
        (["stage=vae", "latent.levels=6"], ["data.size=32: image size 32x32", "multiple of", "64"]),
        (["stage=text", "latent.levels=6"], ["data.size=32: image size 32x32", "multiple of", "64"]),
        (["stage=vae", "adversarial.weight=1", "adversarial.layers=5"], ["adversarial.layers=5", "at most"]),
        (["stage=vae", "reconstruction.bands=1,2"], ["reconstruction.bands", "four weights"]),
        (["stage=vae", "compute.gradient_checkpointing=true"], ["compute.gradient_checkpointing=true", "false"]),
        (["stage=vae", "start=text"], ["start=text", "stage=vae builds on nothing"]),
        (["stage=vae", "latent.weights=x"], ["latent.weights=x", "stage=vae builds on nothing"]),
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
        (["stage=aesthetic", "start=vae"], ["start=vae cannot be used with stage=aesthetic", "text, class, a key"]),
        (["stage=class", "start=text"], ["start=text cannot be used with stage=class", "null"]),
        (["stage=distill", "start=class,aesthetic"], ["data.min_score is missing"]),
        (["stage=distill", "start=aesthetic,text"], ["start=aesthetic cannot be used with stage=text", "null, class"]),
        (["stage=text", "start=nothing/there"], ["start='nothing/there'", "neither a finished stage", "nor a folder"]),
        (["stage=text", "start=class,3"], ["start=class,3 cannot be used with stage=text", "null, class, a key"]),
        (["stage=text", "latent.weights=."], ["latent.weights=.", "config.json is missing"]),
        (["stage=text", "start=taken", "latent.weights=."], ["latent.weights=.", "start=taken bring their own latent"]),
        (["stage=distill", "student.steps=3", "student.method=shortcut"], ["student.steps=3", "powers of two"]),
        (["stage=distill", "student.steps=0"], ["student.steps", "numbers from 1"]),
        (["stage=distill", "student.method=magic"], ["student.method='magic'", "consistency, shortcut"]),
        (["stage=text", "sample.sampler=ddim"], ["sample.sampler='ddim'", "euler, heun"]),
        (["stage=text", "sample.height=32"], ["sample.height means nothing for kind=iris", "sample.steps"]),
        (["stage=text", "log=paper"], ["log='paper'", "mlflow, none"]),
        (["stage=text", "out=taken"], ["out=taken", "other files"]),
        (["stage=text", "--cfg", "jobs"], ["--cfg jobs", "only 'job'"]),
        (["--help", "trian"], ["--help trian: no such group", "did you mean train?"]),
        (["--verbose"], ["--verbose", "--cfg job"]),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_is_made(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    for name in ("thesis.tex", "0.tar"):
        (tmp_path / "taken" / name).touch()
    assert main([*([] if words[:1] in (["--help"], ["--verbose"]) else ["scale=smoke", "log=none"]), *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and "Traceback" not in said.err
    assert all(word in said.err for word in expected), said.err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_the_weights_of_a_latent_are_no_start(tmp_path):
    (tmp_path / "latent").mkdir()
    (tmp_path / "latent" / "config.json").write_text('{"name": "haar"}')
    with pytest.raises(SettingError, match=r"start=.*latent: config\.json is none of a model with a generator"):
        stage(tmp_path, "stage=text", f"start={tmp_path / 'latent'}")


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
        "compute.checkpoint_seconds=1",
        "compute.accumulate=2",
        "compute.device=auto",
        "compute.log_every=3",
        "preview.count=9",
        "sample.steps=9",
        "data.validation=7",
        "out=x",
        "log=none",
        "threads=1",
        "student.grid=32",
        "pretrain.steps=7",
        "distill.steps=7",
    )
    others = [
        "train.steps=13",
        "seed=1",
        "model.iterations=3",
        "data.train=65",
        "data.seed=1",
        "latent.channels=4",
        "compute.precision=bf16",
        "latent.store=float16",
        "depth.norm=sandwich",
        "fourier.form=dct",
        "latent=haar",
        "vae.steps=7",
        "vae.seed=1",
        "start=class",
    ]
    keys = {key(tmp_path, "stage=text", other) for other in others}
    assert len(keys) == len(others) and text not in keys
    assert text == key(tmp_path, "stage=text", "attention.position=none")  # which a GRFM does not read
    assert text == key(tmp_path, "stage=text", "model.text_source=x", "latent.patch=2")  # nor words, nor this latent
    haar = key(tmp_path, "stage=text", "latent=haar")
    assert haar == key(tmp_path, "stage=text", "latent=haar", "vae.steps=7", "latent.channels=4")  # nothing to train


def test_keys_of_live_data_know_what_their_order_depends_on(tmp_path, monkeypatch):
    (tmp_path / "0.tar").touch()
    stored = ["stage=text", "data=tar", f"data.path={tmp_path}", "data.size=32", "data.train=9"]
    assert key(tmp_path, *stored) == key(tmp_path, *stored, "data.workers=2")
    words = [*stored, "data.live=true"]
    same = [["data.workers=1"], ["latent.store=float16"], ["data.max_bad=0.1"]]
    assert {key(tmp_path, *words, *more) for more in same} == {key(tmp_path, *words)}
    others = ["data.workers=2", "data.buffer=7", "data.crop=random", "data.size=64", "seed=1", "data.live=false"]
    keys = {key(tmp_path, *words), *(key(tmp_path, *words, other) for other in others)}
    assert len(keys) == len(others) + 1
    # What stage=vae stores is no matter of the text stage itself, nor is how that one reads one of the vae's.
    assert stage(tmp_path, *words).facts() == stage(tmp_path, *words, "data.train=8").facts()
    latents = [
        stage(tmp_path, *some).needs["latent"] for some in (stored, [*words, "data.workers=2", "data.crop=random"])
    ]
    assert latents[0].key == latents[1].key
    before = stage(tmp_path, *words).facts()
    monkeypatch.setattr(Processes, "count", 2)
    assert stage(tmp_path, *words).facts() != before


AESTHETIC = ("data.score_column=size", "data.min_score=1")


def test_a_stage_on_the_way_is_the_one_that_its_own_command_makes(tmp_path):
    shared = "data.train=65", "latent.channels=4"
    vae = key(tmp_path, "stage=vae", *shared)
    for words in (["stage=text"], ["stage=class", "pretrain.steps=5"], ["stage=distill", *AESTHETIC]):
        assert stage(tmp_path, *words, *shared).needs["latent"].key == vae
    text, classes = key(tmp_path, "stage=text"), key(tmp_path, "stage=class")
    for start, words in (
        (text, ["stage=distill", "distill.steps=5", "student.grid=4"]),
        (text, ["stage=distill", "start=text"]),
        (text, ["stage=aesthetic", *AESTHETIC]),
        (classes, ["stage=text", "start=class", "train.steps=5"]),
        (classes, ["stage=distill", "start=class"]),
        (key(tmp_path, "stage=text", "start=class"), ["stage=distill", "start=class,text"]),
        (key(tmp_path, "stage=aesthetic", *AESTHETIC), ["stage=distill", "start=aesthetic", *AESTHETIC]),
        (
            key(tmp_path, "stage=aesthetic", "start=class,text", *AESTHETIC),
            ["stage=distill", "start=class,text,aesthetic", *AESTHETIC],
        ),
    ):
        assert stage(tmp_path, *words).needs["start"].key == start, words


def test_the_chain_of_a_student(tmp_path):
    """What each stage builds on and looks at, each once, before it."""
    student = stage(tmp_path, "stage=distill", "start=class,text")
    kinds = [one.kind for one in student.chain()]
    assert kinds == ["data", "data", "latent", *["encoded"] * 2, "class", *["encoded"] * 2, "text", "student"]
    before: set[str] = set()
    for one in student.chain():
        assert {work.key for work in (*one.needs.values(), *one.uses.values())} <= before
        before.add(one.key)


def test_an_absent_device_is_told_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["stage=text", "scale=smoke", "log=none", "compute.device=xpu"]) == 2
    assert "compute.device=xpu is not there" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_help_and_the_composed_configuration(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    words = ("stage=vae", "student.steps=1,2,4", "wavelet_vae", "cifar10", "smoke", "start=class")
    assert all(word in shown for word in words)
    assert main(["--help", "student"]) == 0 and "student.method=consistency" in capsys.readouterr().out
    for words in (["--cfg", "job"], ["--cfg=job"], ["-c", "job"]):
        assert main(["stage=distill", "student.steps=1,2", *words]) == 0
        shown = capsys.readouterr().out
        assert "stage: distill" in shown and "steps: [1, 2]" in shown


def test_the_error_type_is_the_one_that_callers_catch():
    with pytest.raises(SettingError, match="stage is missing"):
        command.run(["train.steps=3"])
