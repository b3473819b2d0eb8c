"""The report of made-up grids: files, words, columns, and that nothing is fetched from anywhere."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fake_outcome import build_outcome

from ablations.answer.verdict import analyse_outcome
from ablations.report import figures, palette
from ablations.report.along import lines_along, number_axis
from ablations.report.build import write_report
from ablations.report.charts import themed_svg
from ablations.report.figures import read_curve, smooth
from ablations.report.measures import COLUMNS, duration, error_number, number, signed
from ablations.report.palette import arm_styles


class Page(HTMLParser):
    """Visible text, and every attribute that makes a browser load something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self._hidden = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag == "style"
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "srcset", "data", "poster") or (name == "href" and tag in ("link", "use", "image")):
                self.loads.append(value or "")
            elif name == "href":
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag == "style"

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def seeds_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    outcome = build_outcome(folder, (0, 1, 2), failed={"spatial": "nan"}, missing=("clip_score",), steps=300)
    return write_report(outcome, folder / "report").parent


@pytest.fixture(scope="module")
def one_seed_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    return write_report(build_outcome(folder, steps=300), folder / "report").parent


def test_page_stands_alone(seeds_report: Path) -> None:
    html = (seeds_report / "index.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.loads and all(value.startswith(("data:", "#")) for value in page.loads)
    assert not re.search(r"https?:|@import|<script|url\((?!#)", html)
    assert len(page.ids) == len(set(page.ids))
    assert {f"#{i}" for i in page.ids} >= {v for v in page.loads if v.startswith("#")}
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(page.ids)
    assert all((seeds_report / link).exists() for link in page.links)
    assert str(Path.cwd()) not in html and str(seeds_report) not in html


def test_a_report_says_when_its_question_was_registered_and_what_departed(tmp_path):
    outcome = build_outcome(tmp_path, steps=50)
    assert "Exploratory: the question was not registered" in write_report(outcome, tmp_path / "none").read_text()
    known = {
        "question": {"seeds": [0, 1, 2]},
        "sha256": "ab" * 32,
        "when": "2026-12-01T10:00:00+00:00",
        "finished": 0,
        "trials": 5,
        "earlier": 2,
        "now": ["arms left out: <spatial>"],
    }
    departure = {"what": "arms left out: <spatial>", "reason": "it took too long", "when": "2026-12-02T10:00:00+00:00"}
    for finished, words in (
        (0, "Registered 2026-12-01T10:00, sha256 abababababababab, before"),
        (3, "Exploratory: 3 of 5 trials"),
    ):
        given = replace(outcome, registration=known | {"finished": finished, "departures": [departure]})
        page = write_report(given, tmp_path / str(finished))
        for text in (Page(page.read_text()).text, page.with_name("report.md").read_text()):
            assert words in text and "registered 2 times with other settings" in text
            assert "arms left out: <spatial> (2026-12-02): it took too long" in text
        assert json.loads(page.with_name("verdict.json").read_text())["departures"] == [departure["what"]]


def test_verdict_json_says_what_the_page_does(seeds_report: Path) -> None:
    found = json.loads((seeds_report / "verdict.json").read_text())
    text = Page((seeds_report / "index.html").read_text(encoding="utf-8")).text
    assert all(found[name] in text for name in ("verdict", "sentence", "sureness", "reading", "claim", "question"))
    arms = found["arms"]
    assert arms["grfm"]["verdict"] == "baseline" and "difference" not in arms["grfm"]
    worse = arms["fourier"]
    assert worse["verdict"] in text and worse["low"] <= worse["mean"] <= worse["high"] and worse["seeds"] == 3
    assert worse["difference"]["low"] <= worse["difference"]["mean"] <= worse["difference"]["high"]


def test_page_says_what_was_found(seeds_report: Path) -> None:
    text = Page((seeds_report / "index.html").read_text(encoding="utf-8")).text
    assert text.index("Does GRFM earn") < text.index("3 seeds an arm") < text.index("vs grfm")
    for words in (
        "worse",
        "This design decides gaps of",
        "held out",
        "loss became not a number",
        "spatial, seeds 0, 1, 2",
        "iris.errors.TrainingError: loss is not finite at step 240",
        "9f2c" * 16,
        "3f9a1c2d8b7e",
        "300 steps",
        "pooled over all arms",
        "another process used 12%",
        "python -m ablations.run grid=mixers",
    ):
        assert words in text, words
    assert "not enough seeds" not in text


def test_one_seed_is_said_openly(one_seed_report: Path) -> None:
    html = (one_seed_report / "index.html").read_text(encoding="utf-8")
    text = Page(html).text
    assert text.count("not enough seeds") == 5  # the grid's verdict and four arms
    assert "no estimate of how far retraining" in text and "seeds=[0,1,2]" in text and "sampling-only" in text
    assert 'class="better"' not in html and 'class="worse"' not in html and 'class="mark' not in html
    assert "**Not enough seeds.**" in (one_seed_report / "report.md").read_text(encoding="utf-8")


def test_missing_is_a_dash_and_never_zero(seeds_report: Path) -> None:
    markdown = (seeds_report / "report.md").read_text(encoding="utf-8")
    header, _, *lines = [line for line in markdown.splitlines() if line.startswith("|")]
    column = [cell.strip() for cell in header.split("|")].index("CLIP score ↑")
    clip = {line.split("|")[1].strip(): line.split("|")[column].strip() for line in lines[:5]}
    assert clip["**grfm**"].startswith("3") and clip["attention"] == "–" and clip["spatial"] == "–"
    rows = {(row["arm"], row["seed"]): row for row in rows_of(seeds_report)}
    assert rows["attention", "0"]["clip_score"] == "" and rows["spatial", "1"]["fid"] == ""


def test_csv_has_a_row_a_trial(seeds_report: Path) -> None:
    rows = rows_of(seeds_report)
    assert list(rows[0])[:6] == ["key", "arm", "seed", "baseline", "state", "model.mixer"]
    assert list(rows[0])[6 : 6 + len(COLUMNS)] == list(COLUMNS)
    assert len(rows) == 15 and [row["state"] for row in rows].count("failed") == 3
    assert rows[0]["baseline"] == "true" and float(rows[0]["fid"]) > 0


def test_markdown_links_resolve(seeds_report: Path) -> None:
    markdown = (seeds_report / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", markdown)
    assert len([link for link in links if link.endswith(".png")]) == 7  # four charts, three seeds of samples
    assert all((seeds_report / link).is_file() for link in links)
    widths = [line.count("|") for line in markdown.split("## Phone")[0].splitlines() if line.startswith("|")]
    assert len(widths) >= 7 and len(set(widths)) == 1


def test_grid_of_two_axes(tmp_path: Path) -> None:
    axes = {"model.mixer": ["grfm", "attention", "fourier"], "model.iterations": [2, 4, 8]}
    outcome = build_outcome(tmp_path, (0, 1), axes=axes, steps=100)
    styles = arm_styles(outcome)
    assert styles["mixer=fourier iterations=8"].hue == styles["mixer=fourier iterations=2"].hue
    assert len({(s.hue, s.marker) for s in styles.values()}) == 9
    folder = write_report(outcome, tmp_path / "report").parent
    assert rows_of(folder)[-1]["model.iterations"] == "8"
    assert "mixer=grfm iterations=8" in Page((folder / "index.html").read_text(encoding="utf-8")).text


def test_many_arms_one_of_them_out_of_memory(tmp_path: Path) -> None:
    outcome = build_outcome(tmp_path, axes={"model.dim": list(range(64, 416, 16))}, failed={"96": "oom"}, steps=50)
    assert len({(s.hue, s.marker) for s in arm_styles(outcome).values()}) == 22
    text = Page((write_report(outcome, tmp_path / "report")).read_text(encoding="utf-8")).text
    assert "out of memory" in text and "Numbers are rows of the key table" in text


def test_of_very_many_arms_the_best_are_drawn_and_all_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (palette, figures):
        monkeypatch.setattr(module, "DRAWN", 4)
    monkeypatch.setattr(figures, "PANELS", 1)
    outcome = build_outcome(
        tmp_path, (0, 1, 2, 3), axes={"model.mixer": ["grfm"], "model.iterations": list(range(1, 8))}, steps=50
    )
    drawn = palette.drawn_arms(outcome, analyse_outcome(outcome))
    assert drawn == [f"mixer=grfm iterations={n}" for n in (1, 5, 6, 7)]  # made-up FID falls with the iterations
    folder = write_report(outcome, tmp_path / "report").parent
    page, markdown = (
        (folder / "index.html").read_text(encoding="utf-8"),
        (folder / "report.md").read_text(encoding="utf-8"),
    )
    assert "Of 7 arms the baseline and the best 3 in FID are drawn." in Page(page).text
    assert (
        "The baseline and the best 3 are numbered." in markdown
        and "One trial an arm, 1 of 16 that have gates." in markdown
    )
    assert len(list((folder / "figures").glob("samples_seed*.png"))) == 3 and len(rows_of(folder)) == 28


def test_one_trial_and_a_failed_baseline(tmp_path: Path) -> None:
    single = write_report(build_outcome(tmp_path / "a", axes={"model.mixer": ["grfm"]}, steps=50), tmp_path / "single")
    assert "nothing to compare" in single.read_text(encoding="utf-8")
    lost = build_outcome(
        tmp_path / "b", axes={"model.mixer": ["grfm", "attention"]}, failed={"grfm": "timeout"}, steps=50
    )
    text = Page(write_report(lost, tmp_path / "lost").read_text(encoding="utf-8")).text
    assert "not comparable" in text and "ran out of time" in text
    every = build_outcome(tmp_path / "c", axes={"model.mixer": ["grfm"]}, failed={"grfm": "killed"}, steps=50)
    assert "killed from outside" in write_report(every, tmp_path / "every").read_text(encoding="utf-8")


def test_rewriting_leaves_nothing_old(tmp_path: Path) -> None:
    write_report(build_outcome(tmp_path / "a", (0, 1), steps=50), tmp_path / "report")
    assert (tmp_path / "report" / "figures" / "samples_seed1.png").exists()
    write_report(build_outcome(tmp_path / "b", steps=50), tmp_path / "report")
    assert not (tmp_path / "report" / "figures" / "samples_seed1.png").exists()


def test_same_outcome_same_page(tmp_path: Path) -> None:
    outcome = build_outcome(tmp_path, steps=50)
    pages = [write_report(outcome, tmp_path / name / "report").read_bytes() for name in ("a", "b")]
    assert pages[0] == pages[1]


def test_text_of_settings_cannot_break_the_page(tmp_path: Path) -> None:
    outcome = build_outcome(tmp_path, axes={"model.mixer": ["grfm", "<b>|x"]}, steps=50)
    folder = write_report(outcome, tmp_path / "report").parent
    assert "<b>|x" not in (folder / "index.html").read_text(encoding="utf-8")
    assert "<b>\\|x" in (folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (41.234, "41.2"),
        (0.91342, "0.913"),
        (1234.0, "1,230"),
        (999.6, "1,000"),
        (9.996, "10.0"),
        (0.0, "0.00"),
        (None, "–"),
        (float("nan"), "–"),
        (-3.14159, "−3.14"),
        (0.012345, "0.0123"),
    ],
)
def test_three_significant_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_errors_differences_and_times() -> None:
    assert error_number(0.93, 41.2) == "0.9" and error_number(0.004, 41.2) == "0.004" and error_number(None, 1.0) == ""
    assert (signed(0.0463, True), signed(-0.31, True), signed(0.0, True), signed(-0.0123, False)) == (
        "+4.6%",
        "−31%",
        "0%",
        "−0.012",
    )
    assert (duration(48), duration(1043), duration(12000), duration(None)) == ("48 s", "17 min", "3 h 20 min", "–")


def test_curves_skip_what_a_kill_left(tmp_path: Path) -> None:
    record = build_outcome(tmp_path, axes={"model.mixer": ["grfm"]}, steps=50).records[0]
    record.curve.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 1.0}\n{"ste')
    steps, values = read_curve(record)
    assert steps.tolist() == [1, 3] and values.tolist() == [2.0, 1.0]
    assert np.allclose(smooth(np.full(50, 3.0), 10), 3.0)


def test_svg_takes_the_colours_of_the_page() -> None:
    svg = themed_svg(
        '<?xml version="1.0"?>\n<svg width="3pt" height="2pt" viewBox="0 0 3 2" xmlns="http://www.w3.org/2000/svg">'
        '<g id="axes_1"><path style="stroke: #0072b2"/></g></svg>',
        "a title",
    )
    assert "http" not in svg and "axes_1" not in svg and "var(--hue-1)" in svg and "width=" not in svg


def test_quality_along_an_axis_of_numbers_is_drawn(tmp_path: Path) -> None:
    axes = {"model.mixer": ["grfm", "attention"], "sample.iterations": [1, 4, 16]}
    outcome = build_outcome(tmp_path / "runs", (0, 1), axes=axes, steps=50)
    for record in outcome.records:
        flat = record.values["model.mixer"] == "attention"
        record.metrics["fid"] = 20.0 if flat else 10.0 * record.values["sample.iterations"] + record.seed
    assert number_axis(outcome) == "sample.iterations"
    assert lines_along(outcome, "fid", "sample.iterations") == {
        "mixer=grfm": {1.0: 10.5, 4.0: 40.5, 16.0: 160.5},
        "mixer=attention": {1.0: 20.0, 4.0: 20.0, 16.0: 20.0},
    }
    index = write_report(outcome, tmp_path / "report")
    assert "FID along sample.iterations" in index.read_text(encoding="utf-8")
    assert (tmp_path / "report/figures/along.png").exists()
    table = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert "Best: 10.5 at sample.iterations 1 (mixer=grfm). Mean over seeds." in table


@pytest.mark.parametrize("values", [["grfm", "attention", "fourier"], [1, 2], [True, False, 1]])
def test_names_and_two_numbers_are_no_line(tmp_path: Path, values: list) -> None:
    assert number_axis(build_outcome(tmp_path, axes={"an.axis": values}, steps=50)) is None
