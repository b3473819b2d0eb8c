"""The engine: what names a stage, that it is made once, and what weights are known by."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from forked import ranks, together
from said import Said

from iris.data.settings import Data
from iris.diffusion.sampling import Sample
from iris.errors import SettingError
from iris.latents.discriminator import AdversarialOptions
from iris.latents.losses import ReconstructionOptions
from iris.latents.perceptual import PerceptualOptions
from iris.nn.depth import Depth
from iris.nn.mixers import AttentionOptions, FourierOptions, FusionOptions, RecurrenceOptions, SpatialOptions
from iris.settings import facts, setting
from iris.stages import Context, Stage, identity, named, stage_of
from iris.stages.engine import RESULT, SETTINGS, WEIGHTS, Finished, Inside, content_key
from iris.stages.processes import Processes
from iris.stages.settings import LatentSpace, Model, Preview, Recipe
from iris.training.__main__ import main
from iris.training.distill_settings import DistillSettings
from iris.training.settings import Compute, FlowTraining, Training, VAETraining

SECONDS = 30  # that one process waits for another


class Numbers(Stage):
    """Writes the numbers below ``count``, one a line, and goes on where it was; ``act`` is called after each."""

    kind = "numbers"

    def __init__(self, context: Context, count: int = 4, needs: Any = None, act: Any = lambda number: None) -> None:
        super().__init__(context, needs)
        self.count, self.act = count, act

    def facts(self) -> dict[str, Any]:
        return {"count": self.count}

    @property
    def begun(self) -> bool:
        return (self.folder / "numbers").exists()

    def lines(self) -> list[str]:
        return (self.folder / "numbers").read_text().split()

    def work(self) -> dict[str, Any]:
        with open(self.folder / "numbers", "a") as file:
            for number in range(file.tell() // 2, self.count):
                print(number, file=file, flush=True)
                self.act(number)
        return {"sum": sum(map(int, self.lines()))}


class LongNumbers(Numbers):
    """The same, by all processes, as something that takes a while."""

    collective = True


class NextNumbers(Numbers):
    """The same by other code."""

    version = 2


class Weights(Stage):
    """Writes weights, and some for one step within them."""

    kind = "weights"

    def __init__(self, context: Context, value: str = "a", needs: Any = None) -> None:
        super().__init__(context, needs)
        self.value = value

    @property
    def place(self) -> Path:
        return self.folder / WEIGHTS

    def facts(self) -> dict[str, Any]:
        return {"value": self.value}

    def work(self) -> dict[str, Any]:
        for folder in (self.place, self.place / "steps-1"):
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
            (folder / "model.safetensors").write_text(f"{self.value} {folder.name}")
        return {}

    def known(self) -> dict[str, Any]:
        return {"content": content_key("weights", self.place)}


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path / "runs", Said())


# -- the key --------------------------------------------------------------------------------------------------------


def test_a_key_follows_facts_version_and_what_it_builds_on(context, tmp_path):
    key = Numbers(context).key
    assert key.startswith("numbers-") and key == Numbers(Context(tmp_path / "elsewhere", Said())).key
    others = [
        Numbers(context, 5),
        NextNumbers(context),
        Numbers(context, needs={"first": Numbers(context)}),
        Numbers(context, needs={"second": Numbers(context)}),
        Numbers(context, needs={"first": Numbers(context, 5)}),
        Numbers(context, needs={"first": Finished("x", tmp_path)}),
        Numbers(context, needs={"first": Finished("y", tmp_path)}),
        Numbers(context, needs={"first": Inside(Numbers(context), "x")}),
    ]
    assert len({key, *(other.key for other in others)}) == 9
    assert Numbers(context, needs={"first": None}).key == key
    assert Numbers(context, needs={"first": Finished("x", tmp_path / "moved")}).key == others[5].key
    assert not context.runs.exists()  # nothing is made to know it


def test_what_a_stage_only_uses_is_made_and_is_no_part_of_its_key(context):
    class Looking(Numbers):
        @property
        def uses(self):
            return {"looked at": Numbers(self.context, 2)}

    looking = Looking(context)
    assert looking.key == Numbers(context).key and [one.count for one in looking.chain()] == [2, 4]
    looking.make()
    assert Numbers(context, 2).done and looking.result["built_on"] == {}


@dataclass(frozen=True, kw_only=True)
class Before:
    """Settings of a stage."""

    size: int = setting(3)
    device: str = setting("cpu", result=False)


@dataclass(frozen=True, kw_only=True)
class Since(Before):
    """The same with one more, a version later."""

    shape: str = setting("round", since=2)


def test_settings_that_change_no_result_and_new_ones_at_their_default_leave_the_key(context):
    class Set(Numbers):
        def facts(self):
            return facts(self.settings_)

    def key(settings: Before) -> str:
        stage = Set(context)
        stage.settings_ = settings
        return stage.key

    assert key(Before()) == key(Before(device="cuda")) == key(Since()) == key(Since(device="cuda"))
    assert len({key(Before()), key(Before(size=4)), key(Since(shape="square"))}) == 3


# -- making it ------------------------------------------------------------------------------------------------------


def test_a_stage_is_made_once_and_says_what_it_is(context):
    acted = []
    stage = Numbers(context, needs={"first": Numbers(context, 2)}, act=acted.append)
    assert not stage.done and stage.make() == stage.folder == context.runs / "stages" / stage.key
    assert acted == [0, 1, 2, 3] and stage.done
    assert Numbers(context, needs={"first": Numbers(context, 2)}, act=acted.append).make() == stage.folder
    assert acted == [0, 1, 2, 3] and context.progress[-1] == f"numbers: {stage.key} is finished, taken as it is"
    result = json.loads((stage.folder / RESULT).read_text())
    assert result == stage.result and (result["sum"], result["kind"], result["key"]) == (6, "numbers", stage.key)
    assert result["built_on"] == {"first": Numbers(context, 2).key}
    assert result["environment"]["device"] == "cpu" and result["seconds"] >= 0
    assert json.loads((stage.folder / SETTINGS).read_text()) == {"count": 4}


def test_what_it_builds_on_is_made_first_each_once(context):
    order = []

    def numbers(count: int, **needs: Stage) -> Numbers:
        return Numbers(context, count, needs, lambda number: order.append(count) if number == 0 else None)

    base = numbers(1)
    top = numbers(4, left=numbers(2, base=base), right=numbers(3, base=base))
    assert [one.count for one in top.chain()] == [1, 2, 3, 4]
    top.make()
    assert order == [1, 2, 3, 4] and all(one.done for one in top.chain())
    # One that is finished does not ask for what it was built on.
    shutil.rmtree(base.folder)
    numbers(5, left=numbers(2, base=base)).make()
    assert order == [1, 2, 3, 4, 5] and not base.done


def test_a_failure_leaves_no_result_and_is_tried_again(context):
    def fail(number: int) -> None:
        if number == 2:
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        Numbers(context, act=fail).make()
    stage = Numbers(context)
    assert not stage.done and stage.begun
    stage.make()
    assert stage.result["sum"] == 6


@pytest.mark.parametrize("kind", [Numbers, LongNumbers])
def test_a_killed_stage_goes_on_where_it_was(kind, context):
    def kill(number: int) -> None:
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    assert together(lambda rank: kind(context, act=kill).make() and 0, [{}]) == [-signal.SIGKILL]
    acted = []
    stage = kind(context, act=acted.append)
    assert stage.lines() == ["0", "1", "2"] and not stage.done
    stage.make()  # the lock died with its holder
    assert acted == [3] and stage.lines() == ["0", "1", "2", "3"]
    told = f"numbers: {stage.key} goes on where it was in {stage.folder}"
    assert (told in context.progress) == stage.collective


def test_two_processes_meet_at_the_lock(context, tmp_path):
    """Whichever comes second waits, and takes what the first has made."""
    waiting = tmp_path / "waiting"

    class Waiting(Said):
        def say(self, text: str) -> None:
            if text.endswith("is being made by another process; waiting for it"):
                waiting.touch()

    def wait(number: int) -> None:
        deadline = time.monotonic() + SECONDS
        while not waiting.exists():
            assert time.monotonic() < deadline, "nobody waits"
            time.sleep(0.01)
        time.sleep(0.1)

    def work(rank: int) -> None:
        stage = Numbers(Context(context.runs, Waiting()), act=wait)
        assert stage.make() == stage.folder and stage.result["sum"] == 6

    assert together(work, [{}, {}]) == [0, 0]
    assert Numbers(context).lines() == ["0", "1", "2", "3"]


def test_processes_of_one_command_agree_on_what_there_is(context):
    """Also where another command has finished something when the second of them looks."""

    class Late(Numbers):
        @property
        def done(self) -> bool:
            return super().done or not self.context.processes.first

    class All(LongNumbers):
        def work(self) -> dict[str, Any]:
            assert self.context.processes.agree(lambda: "a word of the first") == "a word of the first"
            return super().work() if self.context.processes.first else {}

    def work(rank: int) -> None:
        here = Context(context.runs, Said(), Processes("cpu"))
        assert (here.processes.rank, here.processes.count) == (rank, 2)
        All(here, needs={"first": Late(here, 2)}).make()

    assert together(work, ranks(2)) == [0, 0]
    assert All(context, needs={"first": Late(context, 2)}).result["sum"] == 6


def test_an_absent_device_is_told_before_anything_is_made(tmp_path):
    stage = Numbers(Context(tmp_path / "runs", Said(), Processes("xpu")))
    with pytest.raises(SettingError, match=r"compute\.device=xpu is not there"):
        stage.make()
    assert not (tmp_path / "runs").exists()


# -- weights by name ------------------------------------------------------------------------------------------------


def test_weights_are_named_by_key_or_by_folder(context, tmp_path, monkeypatch):
    stage = Weights(context, needs={"latent": Finished("latent-1", tmp_path)})
    stage.make()
    monkeypatch.chdir(stage.place)
    for word in (stage.key, f"{stage.key}/", str(stage.place), ".", os.path.relpath(stage.place)):
        found = named("start", word, context)
        assert (found.key, found.place.resolve()) == (stage.key, stage.place) == (stage.key, found.make().resolve())
        assert found.done and list(found.chain()) == [] and found.built_on == {"latent": "latent-1"}
    for word in (f"{stage.key}/steps-1", str(stage.place / "steps-1")):
        found = named("start", word, context)
        assert (found.key, found.folder) == (f"{stage.key}/steps-1", stage.place / "steps-1")
    inside = Inside(stage, "steps-1")
    assert (inside.key, inside.make(), inside.done) == (found.key, found.folder, True)
    assert list(inside.chain()) == [stage]


def test_copied_and_changed_weights_are_known_by_their_content(context, tmp_path):
    stage, copies = Weights(context), [tmp_path / "one", tmp_path / "deep" / "two"]
    stage.make()
    for copy in copies:
        shutil.copytree(stage.place, copy)
    assert identity("start", stage.place) == stage.key
    known = {identity("start", copy) for copy in copies}
    assert len(known) == 1 and known.pop().startswith("folder-")
    assert named("start", str(copies[0]), context) == Finished(identity("start", copies[1]), copies[0])
    other = content_key("start", copies[0])
    for changed in (copies[0] / "model.safetensors", stage.place / "steps-1" / "model.safetensors"):
        changed.write_text("changed")
    assert identity("start", copies[0]) not in (other, identity("start", copies[1]))
    for folder in (stage.place, stage.place / "steps-1"):  # another file of what the stage made is another stage's
        assert identity("start", folder).startswith("folder-")


def test_weights_that_are_not_there_are_told_with_those_that_are(context, tmp_path):
    Weights(context).make()
    Numbers(context).make()
    key = Weights(context).key
    for word in (f"{key[:-1]}x", f"{key}/steps-9", Numbers(context).key):
        with pytest.raises(SettingError) as told:
            named("start", word, context)
        said = f"start={word!r} is neither a finished stage in {context.stages} nor a folder"
        assert str(told.value).startswith(said) and str(told.value).endswith(f"; finished: {key}")
    with pytest.raises(SettingError, match=rf"\(did you mean {key}\?\)"):
        named("start", f"{key}x", context)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError, match=r"start=.*empty: config\.json is missing; expected finished weights"):
        named("start", str(tmp_path / "empty"), context)


# -- the stages of training -----------------------------------------------------------------------------------------


def recipe(**changes: Any) -> Recipe:
    """Built by hand, as no command does."""
    groups = {
        "data": Data(train=8, validation=0),
        "latent": LatentSpace(name="haar"),
        "vae": VAETraining(),
        "reconstruction": ReconstructionOptions(),
        "perceptual": PerceptualOptions(),
        "adversarial": AdversarialOptions(),
        "model": Model(dim=16, heads=2, text_width=16),
        "depth": Depth(),
        "fourier": FourierOptions(),
        "recurrence": RecurrenceOptions(),
        "spatial": SpatialOptions(),
        "fusion": FusionOptions(),
        "attention": AttentionOptions(),
        "pretrain": FlowTraining(),
        "train": FlowTraining(steps=1, batch=4),
        "finetune": FlowTraining(steps=200, learning_rate=1e-3, warmup=0.1),
        "student": DistillSettings(guidance=2.5),
        "distill": Training(),
        "compute": Compute(),
        "sample": Sample(),
        "preview": Preview(),
    }
    return Recipe(stage="text", **groups | changes)


WORDS = (
    "data.train=8",
    "data.validation=0",
    "latent=haar",
    "model.dim=16",
    "model.heads=2",
    "model.text_width=16",
    "train.steps=1",
    "train.batch=4",
)


def test_a_command_and_a_recipe_built_by_hand_make_the_same_stages(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*WORDS, "stage=text", "log=none", "preview.count=1", "sample.steps=1"]) == 0, capsys.readouterr().err
    context = Context(Path("runs"), Said())
    stage = stage_of(recipe(compute=Compute(device="auto", log_every=3)), context)
    made = {path.name for path in Path("runs/stages").iterdir()}
    assert {one.key for one in stage.chain()} == made and all(one.done for one in stage.chain())
    stage.make()
    assert context.progress == [f"text: {stage.key} is finished, taken as it is"]
    # And what goes on from them, whether they are named by a stage, a key or a folder.
    for kind in ("distill", "aesthetic"):
        data = Data(train=8, validation=0, score_column="size", min_score=1.0)
        starts = [None, "text", stage.key, f"runs/stages/{stage.key}/weights"]
        chosen = [stage_of(replace(recipe(data=data), stage=kind, start=start), context) for start in starts]
        assert len({one.key for one in chosen}) == 1
        assert len({tuple(one.key for one in part.chain() if not one.done) for part in chosen}) == 1
