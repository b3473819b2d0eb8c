"""A driver of its own: ``python track_grid.py GRID URI ROOT KEYS GO`` tells MLflow of a grid's trials once the file GO
is there. It prints what MLflow does not have."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tracked_grid import make_outcome, make_record

from ablations.track.tracking import Tracker


def main(grid: str, uri: str, root: str, keys: str, go: str) -> None:
    place = Path(root)
    records = [make_record(place / "runs", key, "grfm") for key in keys.split(",")]
    while not Path(go).exists():
        time.sleep(0.01)
    tracker = Tracker(grid, uri or None, place, place / "runs")
    tracker.start(make_outcome([], name=grid), records, [0], {})
    for record in records:
        tracker.trial_started(record.key)
        tracker.trial_finished(record)
    print(tracker.finish(make_outcome(records, name=grid), None))


if __name__ == "__main__":
    main(*sys.argv[1:])
