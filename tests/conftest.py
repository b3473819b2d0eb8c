"""What holds in every process that runs tests."""

from __future__ import annotations

import os
import shutil
import sys

# One thread a process, as there is a process a core; before torch is imported, also in what the tests start.
for _name, _value in (
    ("OMP_NUM_THREADS", "1"),
    ("MKL_NUM_THREADS", "1"),
    ("OMP_WAIT_POLICY", "PASSIVE"),
    ("HF_HUB_OFFLINE", "1"),
):
    os.environ.setdefault(_name, _value)

# Tests are rewritten and start hundreds of processes: what is compiled is kept, also where the environment says otherwise.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest  # noqa: E402
import torch  # noqa: E402

# Tests fork, and train in the child. Autograd refuses that when it was first used after an exporter had been loaded,
# since it then starts threads; it is used here, before any test.
torch.zeros(1, requires_grad=True).sum().backward()

# Checkpoints and databases are synced to disk all the time; in memory that takes no time.
MEMORY, ROOM = "/dev/shm", 8e9
if os.path.isdir(MEMORY) and shutil.disk_usage(MEMORY).free > ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)

# Where tests answer at once, those marked "slow" or "long" apart.
QUICK = (
    *(
        f"tests/iris/{name}"
        for name in ("io", "stages", "test_init", "test_iris_settings", "test_names", "test_randomness")
    ),
    *(f"tests/eval/{name}" for name in ("metrics", "test_eval_settings", "test_targets")),
    *(f"tests/ablations/{name}" for name in ("question", "verbs")),
    "tests/test_layers.py",
)


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what ``-m quick`` runs; a module's tests run in one worker, which makes what its fixtures make once."""
    for item in items:
        place = item.path.relative_to(item.config.rootpath).as_posix()
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        if place.startswith(QUICK) and not any(item.get_closest_marker(name) for name in ("slow", "long")):
            item.add_marker(pytest.mark.quick)
