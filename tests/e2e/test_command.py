"""The real command at smoke scale: what it leaves behind, what a second run reuses, and how bad input is told."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judge_files import inception_archive
from real_command import ROOT, command, json_of, made, report_of, rows_of, succeeded, training_of

pytestmark = pytest.mark.xdist_group("command")  # one worker: what the module's fixtures make is shared
ARMS = ["grfm", "attention", "fourier", "recurrence", "spatial"]
SMOKE = ("grid=mixers", "scale=smoke")
TWO = "grid.axes={model.mixer: [grfm, attention]}"
ATTRIBUTES = ("colour", "shape", "size", "position", "background", "all")
COSTS = ("latency_ms", "latency_q1_ms", "latency_q3_ms", "latency_ratio", "peak_memory_mb", "params_m", "gflops")
QUALITY = (
    "fid",
    "fid_se",
    "kid",
    "kid_se",
    "clip_score",
    "clip_score_se",
    "validation_loss",
    *(f"{prefix}accuracy_{name}" for prefix in ("", "heldout_") for name in ATTRIBUTES),
)


def curve_of(trial: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (training_of(trial) / "metrics.jsonl").read_text().splitlines()]


@dataclass(frozen=True)
class Ran:
    """The command's first run in a fresh folder."""

    folder: Path
    done: subprocess.CompletedProcess[str]

    @property
    def report(self) -> Path:
        return self.folder / "reports" / "mixers" / "scale=smoke"

    @property
    def rows(self) -> list[dict[str, str]]:
        return rows_of(self.report)

    @property
    def trials(self) -> dict[str, Path]:
        """Arm -> folder."""
        return {row["arm"]: self.folder / "runs" / "trials" / row["key"] for row in self.rows}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("command")
    done = command(folder, *SMOKE)
    assert done.returncode == 0, done.stdout + done.stderr
    return Ran(folder, done)


# -- the run --------------------------------------------------------------------------------------------------------


def test_the_output_says_what_is_asked_first_and_where_everything_is_last(ran):
    lines = ran.done.stdout.splitlines()
    assert "mixers" in lines[0] and "Does GRFM earn its three pathways?" in lines[0]
    first_trial = next(i for i, line in enumerate(lines) if ", seed 0:" in line)
    stage = next(i for i, line in enumerate(lines) if "latent wavelet_vae:" in line)
    assert 0 < stage < first_trial
    for arm in ARMS:
        assert any(f"{arm}, seed 0: done" in line for line in lines)
    assert any(line.startswith("report") and "index.html" in line for line in lines[-5:])
    assert any(line.startswith("MLflow") and "uv run mlflow ui" in line for line in lines[-5:])
    assert "Traceback" not in ran.done.stderr


def test_the_report_is_there(ran):
    for name in ("index.html", "report.md"):
        text = (ran.report / name).read_text()
        assert all(arm in text for arm in ARMS) and str(ran.folder) not in text
    figures = {path.name for path in (ran.report / "figures").glob("*.png")}
    assert len(figures) >= 4 and all((ran.report / "figures" / name).stat().st_size > 1000 for name in figures)
    assert any("latency" in name for name in figures) and any("params" in name for name in figures)
    page = (ran.report / "index.html").read_text()
    assert not re.findall(r"<(?:link|script|img)[^>]*(?:src|href)=\"(?!data:)", page)  # opens from disk, alone


def test_the_table_has_a_row_a_trial_and_every_number(ran):
    assert [row["arm"] for row in ran.rows] == ARMS
    for row in ran.rows:
        assert row["state"] == "done" and row["seed"] == "0" and row["model.mixer"] == row["arm"]
        assert row["baseline"] == str(row["arm"] == "grfm").lower()
        for name in (*QUALITY, *COSTS):
            assert math.isfinite(float(row[name])), name
        for name in (n for n in QUALITY if "accuracy_" in n):
            assert 0 <= float(row[name]) <= 1
        assert float(row["samples"]) == 96 and float(row["fid"]) > 0
        assert all(float(row[name]) > 0 for name in COSTS)
    assert float(ran.rows[0]["latency_ratio"]) == 1


def test_arms_are_matched_and_start_alike(ran):
    base = ran.rows[0]
    for row in ran.rows:
        assert abs(float(row["params_m"]) / float(base["params_m"]) - 1) <= 0.01
    first = {row["arm"]: curve_of(trial)[0]["loss"] for row, trial in zip(ran.rows, ran.trials.values(), strict=True)}
    # The output layer starts at zero: the first steps of all arms see the same error.
    assert all(loss == pytest.approx(first["grfm"], rel=1e-3) for loss in first.values())


def test_trials_leave_their_files(ran):
    assert {path.name for path in (ran.folder / "runs" / "trials").iterdir()} == {row["key"] for row in ran.rows}
    for arm, folder in ran.trials.items():
        result = json_of(folder / "result.json")
        assert result["key"] == folder.name and result["steps"] == 12
        assert result["seconds"].keys() == {"train", "images", "measures"}
        assert all(seconds > 0 for seconds in result["seconds"].values())
        assert {"torch", "threads", "cpu", "host"} <= result["environment"].keys()
        settings = json_of(folder / "settings.json")
        assert settings["model"]["mixer"] == arm and settings["seed"] == 0
        assert json_of(folder / "status.json")["state"] == "done"
        assert not (folder / "error.json").exists()
        steps = [row["step"] for row in curve_of(folder)]
        assert steps == sorted(set(steps)) and steps[-1] == 12
        assert all(math.isfinite(row["loss"]) and row["images_per_s"] > 0 for row in curve_of(folder))


def test_stages_that_trials_share_are_made_once(ran):
    """A training an arm; one latent, one of each split's latents, one set of real features for all."""
    kinds = [path.name.rpartition("-")[0] for path in (ran.folder / "runs" / "stages").iterdir()]
    counted = {
        kind: kinds.count(kind) for kind in ("data", "latent", "encoded", "reference", "text", "quality", "speed")
    }
    assert counted == {"data": 2, "latent": 1, "encoded": 2, "reference": 1, "text": 5, "quality": 5, "speed": 1}
    assert len({training_of(trial) for trial in ran.trials.values()}) == 5


def test_samples_of_all_trials_have_the_same_captions_and_real_pictures(ran):
    samples = {arm: np.load(folder / "samples.npz") for arm, folder in ran.trials.items()}
    first = samples["grfm"]
    assert first["images"].shape == first["real"].shape == (64, 32, 32, 3) and first["images"].dtype == np.uint8
    assert len(set(first["captions"])) > 32 and all(first["captions"])
    for arm in ARMS[1:]:
        assert (samples[arm]["captions"] == first["captions"]).all() and (samples[arm]["real"] == first["real"]).all()
        assert (samples[arm]["images"] != first["images"]).any()


def test_only_grfm_has_gates(ran):
    assert [arm for arm, folder in ran.trials.items() if (folder / "gates.json").exists()] == ["grfm"]
    layers = json_of(ran.trials["grfm"] / "gates.json")["layers"]
    assert len(layers) == 1 and [entry["iteration"] for entry in layers[0]["iterations"]] == [1, 2, 3, 4]
    assert all({"fourier", "recurrence", "spatial"} <= entry.keys() for entry in layers[0]["iterations"])


# -- MLflow ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tracked:
    """What MLflow's own client finds."""

    client: Any
    parent: Any
    children: dict[str, Any]


@pytest.fixture(scope="module")
def tracked(ran: Ran) -> Tracked:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{ran.folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("mixers").experiment_id], order_by=["start_time ASC"])
    parent = next(run for run in runs if run.data.tags["kind"] == "grid")
    children = {
        run.data.params["model.mixer"]: run
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    return Tracked(client, parent, children)


def test_one_parent_and_a_child_a_trial(ran, tracked):
    assert tracked.parent.info.status == "FINISHED" and set(tracked.children) == set(ARMS)
    assert tracked.parent.data.metrics["trials_done"] == 5 and tracked.parent.data.tags["verdict"]
    for arm, run in tracked.children.items():
        assert run.info.status == "FINISHED" and run.data.tags["key"] == ran.trials[arm].name
        assert run.data.params["train.steps"] == "12" and run.data.params["seed"] == "0"
        assert run.data.tags["judge_sha256"] and run.data.tags["data_fingerprint"]


def test_git_commits_are_tags(tracked):
    tags = {run.data.tags["git_commit"] for run in [tracked.parent, *tracked.children.values()]}
    assert len(tags) == 1
    assert re.fullmatch(r"[0-9a-f]{7,40}(\+changes)?" if (ROOT / ".git").exists() else ".+", tags.pop())


def test_curves_and_results_are_the_trials_own(ran, tracked):
    for row in ran.rows:
        run = tracked.children[row["arm"]]
        for name in ("loss", "lr"):
            history = tracked.client.get_metric_history(run.info.run_id, name)
            assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [
                (line["step"], line[name]) for line in curve_of(ran.trials[row["arm"]])
            ]
        for name in ("fid", "accuracy_colour", "latency_ms", "params_m"):
            assert run.data.metrics[name] == pytest.approx(float(row[name]), rel=1e-6)


def test_files_and_pictures_are_artifacts(tracked):
    for run in tracked.children.values():
        names = {item.path for item in tracked.client.list_artifacts(run.info.run_id)}
        assert {"settings.json", "result.json", "metrics.jsonl", "samples.png"} <= names


def test_the_report_is_an_artifact(tracked):
    report = {item.path for item in tracked.client.list_artifacts(tracked.parent.info.run_id, "report")}
    assert {"report/index.html", "report/report.md", "report/results.csv"} <= report


def test_the_data_and_the_judge_are_inputs(tracked):
    run = tracked.client.get_run(tracked.children["grfm"].info.run_id)
    contexts = {item.tags[0].value: item.dataset.name for item in run.inputs.dataset_inputs}
    assert contexts == {
        "train": "shapes/train",
        "validation": "shapes/validation",
        "heldout": "shapes/heldout",
        "judge": "shapes",
    }


# -- again ----------------------------------------------------------------------------------------------------------


def dry(folder: Path, *words: str) -> tuple[list[str], list[str]]:
    """States of trials and of stages, as a dry run tells them."""
    lines = succeeded(folder, *SMOKE, *words, "dry_run=true", "threads=1").splitlines()
    table = next(i for i, line in enumerate(lines) if line.startswith("stage "))
    states = re.compile(r" (new|to measure|done|there|to make)\s*$")
    return tuple(
        [found[1] for line in part if (found := states.search(line))] for part in (lines[:table], lines[table:])
    )


def test_a_dry_run_knows_what_is_there_and_makes_nothing(ran):
    before = sorted(ran.folder.rglob("*"))
    lines = succeeded(ran.folder, *SMOKE, "dry_run=true", "threads=1").splitlines()
    for row in ran.rows:
        line = next(line for line in lines if row["key"] in line)
        assert line.startswith(row["arm"]) and line.split()[-1] == "done" and f"{float(row['params_m']):.3f} M" in line
    shared = made(ran.folder, ("data-", "latent-", "encoded-", "reference-", "text-"))
    told = [line for line in lines if any(key in line for key in shared)]
    assert len(told) == len(shared) and all(line.split()[-1] == "there" for line in told)
    assert sorted(ran.folder.rglob("*")) == before


def test_a_second_run_trains_nothing_and_says_the_same(ran):
    first = ran.rows
    stamps = {path: path.stat().st_mtime_ns for path in (ran.folder / "runs").rglob("*") if path.is_file()}
    said = succeeded(ran.folder, *SMOKE)
    assert {path: path.stat().st_mtime_ns for path in (ran.folder / "runs").rglob("*") if path.is_file()} == stamps
    assert ran.rows == first
    assert sum("finished before, taken as it is" in line for line in said.splitlines()) == 5
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{ran.folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("mixers").experiment_id])
    assert sorted(run.data.tags["kind"] for run in runs) == ["grid", *["trial"] * 5]  # the same runs


FOLLOW_UPS = {
    "samples": ("measure.samples=64",),
    "sampling": ("sample.steps=1",),
    "judge": ("judge=inception", "judge.weights=inception.pt"),
}
# What each of them makes anew; nothing else, and nothing that is trained.
ANEW = {
    "samples": {"images", "features", "quality", "alignment", "skills"},
    "sampling": {"images", "features", "quality", "alignment", "skills"},
    "judge": {"features", "reference", "quality"},
}


@pytest.fixture(scope="module")
def followed(ran: Ran) -> Ran:
    """The folder with a judge's file in it."""
    inception_archive(ran.folder / "inception.pt")
    return ran


@pytest.mark.parametrize("change", FOLLOW_UPS)
def test_a_dry_run_says_that_another_measure_trains_nothing(followed, change):
    trials, stages = dry(followed.folder, *FOLLOW_UPS[change])
    assert trials == ["to measure"] * 5
    assert stages.count("there") >= 10 and stages.count("to make") == (change == "judge")  # the judge's own reference


@pytest.mark.long
@pytest.mark.parametrize("change", FOLLOW_UPS)
def test_another_measure_trains_nothing_and_gets_a_report_of_its_own(followed, change):
    folder, first, page = followed.folder, followed.rows, (followed.report / "index.html").read_bytes()
    trained, stages = made(folder), set(made(folder, ("",)))
    said = succeeded(folder, *SMOKE, *FOLLOW_UPS[change], TWO, "measure.latency.rounds=0")
    assert made(folder) == trained  # the same folders, finished when they were before
    anew = {key.rpartition("-")[0] for key in set(made(folder, ("",))) - stages}
    assert anew == ANEW[change]
    report = report_of(said, folder)
    rows = rows_of(report)
    assert [row["arm"] for row in rows] == ["grfm", "attention"] and all(float(row["fid"]) > 0 for row in rows)
    assert not {row["key"] for row in rows} & {row["key"] for row in first}
    assert report.parent == followed.report.parent and report != followed.report
    assert followed.rows == first and (followed.report / "index.html").read_bytes() == page
    assert "scale=smoke" in (report / "report.md").read_text()  # the report of the first run, beside it


@pytest.mark.long
def test_training_finds_what_a_grid_trained_and_the_other_way_round(ran):
    arm = json_of(ran.trials["attention"] / "settings.json")["model"]
    before = made(ran.folder)
    words = ("scale=smoke", "stage=text", "log=none")
    named = (f"model.mixer={arm['mixer']}", f"model.mixer_width={arm['mixer_width']}")
    said = succeeded(ran.folder, *words, *named, module="iris.training")
    assert f"text: {training_of(ran.trials['attention']).name} is finished, taken as it is" in said
    assert made(ran.folder) == before
    succeeded(ran.folder, *words, "train.steps=3", module="iris.training")
    (key,) = set(made(ran.folder)) - set(before)
    lines = succeeded(ran.folder, *SMOKE, "train.steps=3", TWO, "dry_run=true", "threads=1").splitlines()
    assert [line.split()[-1] for line in lines if key in line] == ["there"]
    assert [line.split()[-2:] for line in lines if line.startswith("grfm, seed 0")] == [["to", "measure"]]
    assert [line.split()[-1] for line in lines if line.startswith("attention, seed 0")] == ["new"]


# -- other pictures -------------------------------------------------------------------------------------------------


def parquet(folder: Path, corrupt: int = 0, captions: str | None = None, count: int = 24, name: str = "rows") -> Path:
    """A file of squares of as many colours, with captions and class numbers; some are no pictures."""
    from datasets import Dataset
    from PIL import Image

    cells: list[dict[str, Any]] = []
    for i in range(count):
        stream = io.BytesIO()
        Image.new("RGB", (32, 32), (255 * i // count, 255 - 255 * i // count, 40 * (i % 5))).save(stream, "PNG")
        cells.append({"bytes": b"this is no picture" if i < corrupt else stream.getvalue(), "path": None})
    texts = [f"a square, number {i}" if captions is None else captions for i in range(count)]
    folder.mkdir(exist_ok=True)
    Dataset.from_dict({"image": cells, "text": texts, "label": [i % 10 for i in range(count)]}).to_parquet(
        folder / f"{name}.parquet"
    )
    return folder / f"{name}.parquet"


def pictures(folder: Path) -> tuple[str, ...]:
    """A file of captioned pictures."""
    return "data=parquet", f"data.path={parquet(folder, count=96)}", "data.train=64", "data.validation=32"


def cifar10(folder: Path) -> tuple[str, ...]:
    """A folder with the files and columns of CIFAR-10."""
    for name, count in (("train", 64), ("test", 32)):
        parquet(folder / "cifar10", count=count, name=name)
    return "data=cifar10", f"data.path={folder / 'cifar10'}", "data.train=64", "data.validation=32"


@pytest.mark.long
@pytest.mark.parametrize("files", [pictures, cifar10])
def test_a_grid_on_pictures_of_ones_own(files, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf-cache"))
    words = ("measure.samples=24", "measure.latency.rounds=0", "vae.steps=4", "train.steps=4", TWO)
    said = succeeded(tmp_path, *SMOKE, *files(tmp_path), *words)
    report = report_of(said, tmp_path)
    rows = rows_of(report)
    assert [row["state"] for row in rows] == ["done"] * 2
    assert all(float(row["fid"]) > 0 and float(row["samples"]) == 24 and row["clip_score"] == "" for row in rows)
    page = (report / "report.md").read_text()
    assert "No alignment: judge shapes reads captions of shapes" in page and "trends only" in page
    samples = np.load(tmp_path / "runs" / "trials" / rows[0]["key"] / "samples.npz")
    assert len(samples["real"]) == len(samples["images"]) == 24 and samples["real"].std() > 1


# -- trials that fail -----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_loss_that_is_not_finite_is_reported(ran, tmp_path):
    shutil.copytree(ran.folder / "runs" / "stages", tmp_path / "runs" / "stages")
    done = command(tmp_path, "grid=loss_weight", "scale=smoke", "train.learning_rate=1e30", "train.optimiser=adamw")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    report = report_of(done.stdout, tmp_path)
    assert report.parent == tmp_path / "reports" / "loss_weight"
    rows = rows_of(report)
    assert [row["state"] for row in rows] == ["failed"] * 3 and all(row["fid"] == "" for row in rows)
    page = (report / "report.md").read_text()
    assert "loss became not a number" in page and "train.learning_rate" in page
    logs = re.findall(r"runs/logs/\S+?\.(?:log|err)", page)
    assert logs and all((tmp_path / log).is_file() for log in logs)
    for row in rows:
        error = json_of(tmp_path / "runs" / "trials" / row["key"] / "error.json")
        assert error["cause"] == "nan" and "learning_rate=1e+30" in error["message"]
    assert "nan" in done.stdout and any(log in done.stdout for log in logs)


# -- input that cannot be used --------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and an environment that ``main`` may change."""
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def refused(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """What ``main`` answers to a command line that it cannot use."""
    from ablations.run import main

    assert main(list(overrides)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["grid=mixer"], ["grid='mixer'", "did you mean mixers?", "pathways"]),
        (
            ["grid=depth", "model.mixer=grmf"],
            ["model.mixer='grmf'", "grfm, attention, linear_attention", "my_module:MyMixer"],
        ),
        (["grid=mixers", "train.stepz=5"], ["train.stepz", "did you mean train.steps?"]),
        (["grid=mixers", "train.steps=-5"], ["train.steps=-5", "at least 1"]),
        (["grid=mixers", "seeds=[]"], ["seeds=[]", "[0,1,2]"]),
        (["grid=mixers", "data=parquet"], ["data.path"]),
        (["grid=mixers", "data=folder", "data.path=no/such/folder"], ["data.path", "no/such/folder"]),
        (["--verbose"], ["--verbose", "--help", "--cfg job"]),
        (["--cfg", "hydra"], ["--cfg hydra", "job"]),
    ],
)
def test_bad_input_is_told_before_anything_is_made(overrides, words, here, capsys):
    message = refused(capsys, *overrides)
    assert all(word in message for word in words), message
    assert list(here.iterdir()) == []


FILES = ("grid=mixers", "scale=smoke", "data=parquet", "data.validation=4", "threads=1")


def test_captions_that_are_all_empty(here, capsys, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(here / "hf-cache"))
    monkeypatch.setattr("pdb.post_mortem", lambda *a: pytest.fail("opened a debugger over bad data"))
    path = parquet(here, captions=" ")
    capsys.readouterr()  # the progress bar of writing the file
    message = refused(capsys, *FILES, f"data.path={path}", "launcher=inline")
    assert "data.text_column" in message and "empty" in message
    assert not (here / "runs" / "trials").exists() and not (here / "reports").exists()


def test_pictures_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf-cache"))
    done = command(tmp_path, *FILES, f"data.path={parquet(tmp_path, corrupt=6)}")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "Traceback" not in done.stdout
    message = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "data.max_bad allows 1.00%" in message and re.search(r"row \d+ \(unreadable", message)
    assert not list((tmp_path / "runs" / "trials").glob("*/result.json")) and not (tmp_path / "reports").exists()


# -- words ----------------------------------------------------------------------------------------------------------


def test_help_lists_grids_groups_and_examples(here, capsys):
    from ablations.run import main

    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("grid=mixers", "pathways", "shapes2", "wavelet_vae", "slurm", "smoke", "dry_run=true", "Exit codes"):
        assert word in shown


def test_the_composed_configuration_is_shown(here, capsys):
    import yaml

    from ablations.run import main

    assert main(["grid=mixers", "--cfg", "job", "train.steps=77"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["train"]["steps"] == 77 and shown["grid"]["name"] == "mixers"
    assert list(here.iterdir()) == []
