"""The report of a process of its own: the same files, its errors, and what stays out of the driver."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fake_outcome import build_outcome

from ablations.report.build import write_report
from ablations.report.process import ReportLost, write_report_apart

HEAVY = ("matplotlib", "jinja2", "scipy.stats", "transformers", "open_clip", "torch._dynamo", "triton")


def files(report: Path) -> dict[str, bytes]:
    """What a report consists of; of the verdict, all but when it was written."""
    found = {path.relative_to(report).as_posix(): path.read_bytes() for path in report.rglob("*") if path.is_file()}
    verdict = json.loads(found.pop("verdict.json"))
    assert verdict.pop("written")
    return found | {"verdict.json": json.dumps(verdict).encode()}


def test_it_writes_what_the_driver_would(tmp_path):
    outcome = build_outcome(tmp_path, steps=50)
    page = write_report_apart(outcome, tmp_path / "apart" / "report")
    other = write_report(outcome, tmp_path / "here" / "report")
    written = files(page.parent)
    assert written == files(other.parent) and len(written) > 5


def test_its_errors_are_the_drivers(tmp_path):
    outcome = build_outcome(tmp_path, steps=50)
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as error:
        write_report_apart(outcome, tmp_path / "file")
    assert error.value.errno and "report/build.py" in error.value.__notes__[0]
    nothing = replace(outcome, records=[record for record in outcome.records if not record.baseline])
    with pytest.raises(ValueError, match="has no baseline"):
        write_report_apart(nothing, tmp_path / "report")


def test_a_process_that_is_killed_is_told_of(tmp_path, monkeypatch):
    shot = tmp_path / "python"
    shot.write_text("#!/bin/sh\nkill -9 $$\n")
    shot.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(shot))
    with pytest.raises(ReportLost, match=r"ended with -9; the same command writes it anew"):
        write_report_apart(build_outcome(tmp_path, steps=50), tmp_path / "report")


@pytest.mark.slow
def test_what_analyses_draws_and_trains_stays_out_of_the_driver(tmp_path):
    code = f"""
import sys
from ablations.run import main
assert main(sys.argv[1:]) == 1      # nothing was trained
print("loaded", [name for name in {HEAVY} if name in sys.modules])
"""
    words = ["grid=mixers", "scale=smoke", "action=report"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "loaded []"
    assert (tmp_path / "reports" / "mixers" / "scale=smoke" / "index.html").exists()
