"""Settings of all tests of ``iris``."""

import pytest
import torch

from iris.errors import SettingError
from iris.nn.mixers import check_mixer

MIXER_TESTS = "test_conformance_mixers.py"


def pytest_addoption(parser):
    parser.addoption(
        "--mixer",
        action="append",
        default=[],
        metavar="MODULE:CLASS",
        help="run what every mixer must do, and nothing else, over this mixer (may be repeated)",
    )


def pytest_configure(config):
    for name in config.getoption("mixer", default=[]):
        try:
            check_mixer(name)
        except SettingError as error:
            raise pytest.UsageError(f"--mixer: {error}") from error


def pytest_ignore_collect(collection_path, config):
    """With --mixer, import no other test file: one that fails to would end the run."""
    other = collection_path.suffix == ".py" and collection_path.name != MIXER_TESTS
    return True if other and config.getoption("mixer", default=[]) else None


def pytest_collection_modifyitems(config, items):
    if config.getoption("mixer", default=[]):
        chosen = [item for item in items if item.path.name == MIXER_TESTS and "case" in item.fixturenames]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors are slower with threads, and sums do not depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
