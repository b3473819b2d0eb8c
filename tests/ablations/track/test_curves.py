"""Points of a metrics.jsonl: each once, whatever happens to the file."""

from __future__ import annotations

from tracked_grid import row_of, write_metrics

from ablations.track.curves import CurveFile


def steps(curve: CurveFile) -> list[int]:
    return [point.step for point in curve.read() if point.name == "loss"]


def test_rows_are_read_from_where_reading_stopped(tmp_path):
    curve = CurveFile(tmp_path / "metrics.jsonl")
    assert curve.read() == []
    write_metrics(tmp_path, range(1, 3), tail='{"step": 3, "time": 1')
    assert steps(curve) == [1, 2]
    with curve.file.open("a") as stream:
        stream.write('03, "loss": 1}\nnoise\n{"step": 2, "time": 1}\n[3]\n{"step": 4, "time": 104, "loss": 1}\n')
    assert steps(curve) == [3, 4] and steps(curve) == [] and curve.step == 4
    # Replaced by something shorter, and by something longer with the same steps.
    for rows, begun in ((range(1, 2), 100.0), (range(1, 9), 777.0)):
        write_metrics(tmp_path, rows, begun)
        assert steps(curve) == list(rows)


def test_points_of_a_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 4, "steps": 9, "time": 2.5, "loss": 0.5, "gap (%)": 1, "note": "x", "on": true}\n'
    )
    curve = CurveFile(tmp_path / "metrics.jsonl", "vae/")
    assert curve.read() == [("vae/loss", 0.5, 2500, 4), ("vae/gap ___", 1.0, 2500, 4)]
    assert curve.names == {"vae/loss", "vae/gap ___"}


def test_a_value_that_is_no_number_is_a_point(tmp_path):
    row = row_of(1) | {"validation": float("nan")}
    (tmp_path / "metrics.jsonl").write_text(str(row).replace("'", '"').replace("nan", "NaN") + "\n")
    (value,) = [point.value for point in CurveFile(tmp_path / "metrics.jsonl").read() if point.name == "validation"]
    assert value != value
