"""Mixers that live outside the package: model.mixer=my_module:MyMixer, and pytest --mixer for them."""

import textwrap

import pytest
import torch

from iris.errors import SettingError
from iris.nn.mixers import MIXERS, MixerOptions, build_mixer, check_mixer, is_resizable, option_groups
from iris.randomness import initialise

MODULE = """
    import torch
    from torch import nn
    from iris.nn.mixers.spatial import SpatialOptions

    class Mean(nn.Module):
        def __init__(self, dim, width=None, heads=4):
            super().__init__()
            self.width, self.heads = width, heads
            self.value, self.out = nn.Linear(dim, width or dim), nn.Linear(width or dim, dim)

        def forward(self, x):
            return self.out(self.value(x).mean((1, 2), keepdim=True)).expand(x.shape)

    class Bare(nn.Module):
        resizable = False

        def __init__(self, dim):
            super().__init__()

    class Decayed(Mean):
        def __init__(self, dim, spatial=SpatialOptions()):
            super().__init__(dim)
            self.form = spatial.form

    class Leaking(Mean):
        def forward(self, x):
            return super().forward(x) + x.mean(0, keepdim=True)

    class Needy(nn.Module):
        def __init__(self, dim, kernel):
            super().__init__()

    class Sizeless(nn.Module):
        def __init__(self, width=None):
            super().__init__()

    class Plain:
        def __init__(self, dim):
            pass

    def function(dim):
        return nn.Identity()
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The module's name; unique, since an imported module stays."""
    name = f"outside_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_outside_mixer_is_built_like_a_registered_one(mine):
    x = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    mixer = initialise(build_mixer(f"{mine}:Mean", 16, width=24, heads=3), 0)
    assert type(mixer).__module__ == mine and (mixer.width, mixer.heads) == (24, 3)
    assert mixer(x).shape == x.shape
    assert is_resizable(f"{mine}:Mean") and option_groups(f"{mine}:Mean") == ()
    check_mixer(f"{mine}:Mean")


def test_outside_mixer_gets_only_what_its_constructor_names(mine):
    build_mixer(f"{mine}:Bare", 16, width=24, heads=3)
    assert not is_resizable(f"{mine}:Bare")
    options = MixerOptions.from_dict({"spatial": {"form": "dense"}})
    assert build_mixer(f"{mine}:Decayed", 16, options=options).form == "dense"
    assert option_groups(f"{mine}:Decayed") == ("spatial",)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("Missing", "cannot be imported.*Missing"),
        ("Plain", "torch.nn.Module"),
        ("function", "torch.nn.Module"),
        ("MODULE", "cannot be imported.*MODULE"),
        ("Needy", "no other argument.*dim, kernel"),
        ("Sizeless", "must take dim.*width"),
    ],
)
def test_unusable_class_is_refused(mine, attribute, message):
    name = f"{mine}:{attribute}"
    for refuse in (check_mixer, lambda n: build_mixer(n, 16)):
        with pytest.raises(SettingError, match=f"model.mixer='{name}'.*{message}"):
            refuse(name)


@pytest.mark.parametrize("name", ["no_such_module_anywhere:Mixer", "no.such.package:Mixer"])
def test_missing_module_is_refused(name):
    for refuse in (check_mixer, lambda n: build_mixer(n, 16)):
        with pytest.raises(SettingError, match=f"model.mixer='{name}'.*cannot be imported"):
            refuse(name)


def test_module_that_fails_to_import_is_refused(mine, tmp_path):
    (tmp_path / f"{mine}_broken.py").write_text("import no_such_module_anywhere\n")
    with pytest.raises(SettingError, match="model.mixer=.*no_such_module_anywhere"):
        build_mixer(f"{mine}_broken:Mean", 16)


@pytest.mark.parametrize("name", [":Mean", "module:", "a:b:c", "module:Class()"])
def test_what_is_no_module_and_class_is_unknown(name):
    with pytest.raises(SettingError) as error:
        build_mixer(name, 16)
    assert all(allowed in str(error.value) for allowed in MIXERS)


class Outcomes:
    """A pytest plugin that keeps the name and outcome of every test."""

    def __init__(self):
        self.outcomes = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            self.outcomes[report.nodeid.rpartition("::")[2]] = report.outcome


def test_conformance_suite_runs_over_outside_mixers(mine, request, capsys):
    """pytest tests/iris --mixer A --mixer B: the mixers' part, over these two, and nothing else."""
    plugin = Outcomes()
    names = [f"{mine}:Mean", f"{mine}:Leaking"]
    arguments = [
        str(request.path.parent),
        *(f"--mixer={name}" for name in names),
        "-q",
        "-n0",  # the module lies on this process's path alone
        "-p",
        "no:cacheprovider",
        "-k",
        "independent or divide or other_seed or (1x1 and shape)",
    ]
    code = pytest.main(arguments, plugins=[plugin])
    assert code == pytest.ExitCode.TESTS_FAILED, capsys.readouterr().out
    assert {name.partition("[")[2].partition("-1x1")[0].strip("]") for name in plugin.outcomes} == set(names)
    failed = [name for name, outcome in plugin.outcomes.items() if outcome == "failed"]
    assert failed == [f"test_batch_elements_are_independent[{mine}:Leaking]"]
    assert len(plugin.outcomes) == 2 * 4
