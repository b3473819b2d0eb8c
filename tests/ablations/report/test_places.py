"""Where reports lie: a folder a grid, one below it for each question of its own, and how they find one another."""

import json

import pytest
from fake_outcome import build_outcome

from ablations.report.build import write_report
from ablations.report.places import LONGEST, neighbours, report_folder


def place(tmp_path, *words):
    return report_folder(tmp_path, "mixers", ["grid=mixers", *words]).relative_to(tmp_path).as_posix()


@pytest.mark.parametrize(
    "word",
    ["seeds=[0,1,2]", "launcher=slurm", "launcher.workers=4", "threads=1", "runs_dir=/elsewhere", "action=report"],
)
def test_how_a_grid_is_run_is_no_question_of_its_own(word, tmp_path):
    assert place(tmp_path, word) == "mixers"


def test_settings_of_its_own_name_a_folder_in_any_order(tmp_path):
    assert place(tmp_path, "train.steps=9", "data=shapes2") == "mixers/data=shapes2_train.steps=9"
    assert place(tmp_path, "data=shapes2", "seeds=[1]", "train.steps=9") == "mixers/data=shapes2_train.steps=9"


def test_a_name_that_is_cut_short_still_names_one_question(tmp_path):
    long = [f"grid.axes={{model.dim: {list(range(64, 64 * count, 64))}}}" for count in (30, 31)]
    names = [place(tmp_path, word).removeprefix("mixers/") for word in long]
    assert len(set(names)) == 2 and all(len(name) <= LONGEST + 7 and "/" not in name for name in names)


def test_files_of_one_name_are_two_questions(tmp_path):
    places = [place(tmp_path, "data=parquet", f"data.path=/{folder}/rows.parquet") for folder in ("one", "two")]
    assert places[0] != places[1]
    assert all(one.startswith("mixers/data.path=rows.parquet_data=parquet") for one in places)


def test_each_report_lists_the_others_and_none_takes_anothers_place(tmp_path):
    outcome = build_outcome(tmp_path / "runs", axes={"model.mixer": ["grfm", "attention"]}, steps=50)
    whole, few, other = (
        report_folder(tmp_path / "reports", "mixers", words) for words in ([], ["train.steps=9"], ["data=shapes2"])
    )
    for folder in (whole, few, other):
        write_report(outcome, folder)
    before = (whole / "results.csv").read_bytes()
    assert [(one.place, one.settings) for one in neighbours(whole, "mixers")] == [
        ("data=shapes2", "data=shapes2"),
        ("train.steps=9", "train.steps=9"),
    ]
    assert {(one.place, one.settings) for one in neighbours(few, "mixers")} == {
        ("..", ""),
        ("../data=shapes2", "data=shapes2"),
    }
    page = (other / "index.html").read_text(encoding="utf-8")
    assert 'href="../index.html"' in page and 'href="../train.steps=9/index.html"' in page
    assert (whole / "results.csv").read_bytes() == before
    assert all(
        one.verdict == json.loads((whole / "verdict.json").read_text())["verdict"] for one in neighbours(few, "mixers")
    )
