"""What several end-to-end tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # in a script's background job; commands started here would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def importable() -> Iterator[None]:
    """Workers find the jobs of ``small_grid``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, Path(__file__).parent))))
        yield
