"""The settings of ``python -m eval``: groups, what is no part of a key, and errors that name what is allowed."""

import pytest

from eval.judges import JUDGES
from eval.settings import SCALES, TREE, WHAT, Measure, Settings
from eval.subjects import KINDS
from iris.data.settings import KINDS as SOURCES
from iris.data.settings import READY
from iris.errors import SettingError
from iris.settings import build, defaults, facts, flatten, merged
from iris.stages.settings import SCALES as TRAINING_SCALES


def build_of(*words):
    return TREE.build(["model=x", *words])


def test_every_option_of_every_group_composes():
    assert set(TREE.options("data")) == {*SOURCES, *READY} and set(TREE.options("judge")) == set(JUDGES)
    assert set(TREE.words) == {"data", "judge", "measure", "sample"}
    for group in TREE.words:
        for option in TREE.options(group):
            found = build_of(f"{group}={option}")
            if group in ("data", "judge"):
                assert getattr(found, group).name == option


def test_groups_are_those_of_the_other_commands():
    assert build_of("sample=heun").sample.steps == 4 and build_of("sample=heun", "sample.steps=2").sample.steps == 2
    assert set(SCALES) < set(TRAINING_SCALES)
    for scale, samples in (("smoke", 96), ("gpu", 10000)):
        assert build(Measure, merged(Measure, defaults(Measure), SCALES[scale]["measure"])).samples == samples


def test_lists_are_written_as_they_look():
    assert build_of("measure=full").measure.what == list(WHAT)
    for word in ("skills,caps", "[skills,caps]", "[skills, caps]"):
        assert build_of(f"measure.what={word}").measure.what == ["skills", "caps"]
    found = build_of("measure.what=null", "measure.quality.metrics=fid", "measure.latency.batches=1,8").measure
    assert (found.what, found.quality.metrics, found.latency.batches) == (None, ["fid"], [1, 8])


def test_how_it_is_run_is_no_part_of_a_key():
    run = {
        "name", "out", "track", "runs_dir", "threads", "device", "judge.weights", "sample.batch",
        "measure.threads", "measure.timeout",
        *(f"measure.latency.{name}" for name in ("batches", "rounds", "warmup")),
        *(f"measure.caps.{name}" for name in ("megabytes", "method", "group")),
    }  # fmt: skip
    every = set(flatten(defaults(Settings)))
    assert every - set(flatten(facts(build_of()))) == run and run < every


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("measure.what=fid", "measure.what='fid' is unknown; allowed: quality, alignment"),
        ("measure.what=[]", "measure.what is empty; allowed: quality"),
        ("measure.quality.metrics=is", "measure.quality.metrics='is' is unknown; allowed: fid, fid_infinity"),
        ("measure.latency.batches=[0]", r"measure.latency.batches=\[0\] must be a list of numbers above 0"),
        ("measure.latency.batches=[1.5]", r"measure.latency.batches=\[1.5\] must be"),
        ("measure.latency.rounds=1", "measure.latency.rounds=1 has no spread; allowed: 2 or more, or 0"),
        ("measure.caps.megabytes=[]", r"measure.caps.megabytes=\[\] must be"),
        ("measure.caps.method=cgroup", "measure.caps.group=None: a group and measure.caps.method=cgroup go together"),
        ("measure.caps.group=/sys", "measure.caps.group=/sys: .* go together; the method is RLIMIT_DATA"),
        ("measure.samples=0", "measure.samples=0 must be at least 1"),
        ("measure.confidence=1", "measure.confidence=1.0 must be at most 0.9999"),
        ("name=../../escape", "name=.../../escape. names a folder"),
        ("kind=onnx", f"kind='onnx' is unknown; allowed: {', '.join(KINDS)}"),
        ("judge=oracle", "judge='oracle' is unknown; allowed: .*clip_vit_b32"),
        ("judge.name=clip_vit", "judge.name='clip_vit' is unknown .did you mean clip_vit_b32"),
        ("dtype=int8", "dtype='int8' is unknown"),
        ("stepz=3", "stepz is not a setting; allowed: device"),
        ("measure.step=3", "measure.step is not a setting"),
    ],
)
def test_errors_name_the_setting_and_what_is_allowed(word, expected):
    with pytest.raises(SettingError, match=expected):
        build_of(word)
