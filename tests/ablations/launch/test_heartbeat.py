"""Who is alive: a heart that beats while a job computes, and how long it has been silent."""

from __future__ import annotations

import os
import time

from ablations.launch.heartbeat import Listener, heartbeat
from ablations.launch.trial_state import state_of


def test_a_heart_beats_while_something_is_computed(tmp_path):
    listener = Listener()
    assert listener.silence(tmp_path) is None
    with heartbeat(tmp_path, every=0.02):
        beats = set()
        deadline = time.monotonic() + 10
        while len(beats) < 3 and time.monotonic() < deadline:
            beats.add((tmp_path / "alive").read_text() if (tmp_path / "alive").exists() else "")
            time.sleep(0.01)
        assert len(beats) >= 3 and state_of(tmp_path).state == "running"
    assert listener.silence(tmp_path) is None and state_of(tmp_path).state == "waiting"


def test_silence_is_told_by_the_listeners_own_clock(tmp_path):
    now = [100.0]
    listener = Listener(lambda: now[0])
    (tmp_path / "alive").write_text("node1 7 1\n")
    os.utime(tmp_path / "alive", (0, 0))  # the node's clock is decades behind
    assert listener.silence(tmp_path) == 0
    now[0] = 160.0
    assert listener.silence(tmp_path) == 60
    (tmp_path / "alive").write_text("node1 7 2\n")
    assert listener.silence(tmp_path) == 0
