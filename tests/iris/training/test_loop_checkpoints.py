"""Checkpoints: damage is noticed and the one before used; a full disk leaves the last good one; the best stays."""

import errno
import json
import os
import random
import resource
import signal
import traceback

import numpy as np
import pytest
import torch
from small_models import CAPTIONS, CHANNELS, parameters_of, small_model
from torch import nn

import iris.io.tensors as tensors_module
from iris.io.tensors import load_tensors, save_tensors
from iris.training.checkpoint import BEST, CHECKPOINT, Checkpoints, averaged_weights
from iris.training.loop import METRICS, LoopSettings, fit
from iris.training.optimiser import OPTIMISERS, OptimiserSettings
from iris.training.safety import DiskFull
from iris.training.tasks import FlowTask

STEPS = 9


def flow_task():
    module = small_model(awake=True)
    latents = torch.randn(4, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))
    encode = module.text.vocabulary.encode
    return FlowTask(
        module, latents, encode(CAPTIONS), encode([""])[0], batch=2, seed=0, caption_dropout=0.3, loss_weight="none"
    )


class Line:
    """A task whose weight walks towards 3, with a measure and draws of one's choice."""

    batch = 2

    def __init__(self, measure=None, draw=lambda: 0.0):
        self.module, self.measure, self.draw = nn.Linear(1, 1), list(measure or []), draw
        nn.init.zeros_(self.module.weight)
        nn.init.zeros_(self.module.bias)
        if measure is not None:
            self.validate = lambda: self.measure.pop(0)

    def loss(self, step):
        return (self.module(torch.ones(1, 1)) - 3 - self.draw()).square().mean(), {}


def settings(steps=STEPS, optimiser="adamw", seconds=0.0, **changes):
    return LoopSettings(steps, OptimiserSettings(optimiser, 3e-3), log_every=1, checkpoint_seconds=seconds, **changes)


def rows(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def stop_at(step):
    def observe(row):
        if row["step"] == step:
            raise KeyboardInterrupt

    return observe


def kill(task, chosen, folder, step):
    """Run until kill -9 after the row of ``step``, in a process of its own."""

    def observe(row):
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            fit(task, chosen, folder, observe)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Damage


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("damage", ["none", "truncated", "a bit", "empty"])
def test_a_run_killed_at_a_random_step_ends_as_if_it_was_not(optimiser, damage, tmp_path):
    whole = parameters_of(fit(flow_task(), settings(optimiser=optimiser, seconds=1e9), tmp_path / "whole"))
    step = random.randint(4, STEPS - 1)
    kill(flow_task(), settings(optimiser=optimiser), tmp_path / "cut", step)
    newest = tmp_path / "cut" / CHECKPOINT
    data = bytearray(newest.read_bytes())
    assert load_tensors(newest)[1]["step"] == step - 1
    if damage == "a bit":
        data[-random.randint(1, 4000)] ^= 1 << random.randint(0, 7)
    newest.write_bytes(data[: {"truncated": len(data) * 2 // 3, "empty": 0}.get(damage, len(data))])
    seen = []
    observe = lambda row: seen.append(row["step"])  # noqa: E731
    if damage == "none":
        resumed = fit(flow_task(), settings(optimiser=optimiser), tmp_path / "cut", observe)
    else:
        with pytest.warns(RuntimeWarning, match=f"{CHECKPOINT}.*the checkpoint before it is used"):
            resumed = fit(flow_task(), settings(optimiser=optimiser), tmp_path / "cut", observe)
    assert seen == list(range(step if damage == "none" else step - 1, STEPS + 1)), f"killed at {step}"
    assert same(parameters_of(resumed), whole), f"killed at {step}"
    assert [row["loss"] for row in rows(tmp_path / "cut")] == [row["loss"] for row in rows(tmp_path / "whole")]


def test_a_damaged_checkpoint_does_not_push_a_good_one_out(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(Line(), settings(), tmp_path, stop_at(4))
    (tmp_path / CHECKPOINT).write_bytes(b"damaged")
    with pytest.warns(RuntimeWarning), pytest.raises(KeyboardInterrupt):
        fit(Line(), settings(), tmp_path, stop_at(4))  # saved step 3 again
    assert [load_tensors(tmp_path / name)[1]["step"] for name in (CHECKPOINT, "checkpoint.1.safetensors")] == [3, 2]


def test_any_flipped_bit_is_noticed(tmp_path):
    """Every byte of a small file, so that header, names, metadata and data all have their turn."""
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.arange(3.0), "b": torch.tensor(True)}, {"step": 3})
    data = path.read_bytes()
    tensors, about = load_tensors(path)
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found = load_tensors(path)
        except ValueError:
            continue
        assert same(found[0], tensors) and found[1] == about, place  # the header's padding holds nothing


def test_files_without_a_checksum_are_read(tmp_path):
    """Those that were saved before there was one."""
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "old", metadata={"about": '{"step": 3}'})
    assert load_tensors(tmp_path / "old")[1] == {"step": 3}


def test_a_checkpoint_of_the_earlier_loop_is_continued(tmp_path):
    whole = parameters_of(fit(Line(), settings(), tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        fit(Line(), settings(), tmp_path / "cut", stop_at(5))
    tensors, about = load_tensors(tmp_path / "cut" / CHECKPOINT)
    plain = {name: value for name, value in tensors.items() if not name.startswith("random.")}
    save_tensors(tmp_path / "cut" / CHECKPOINT, plain, {"step": about["step"]})
    assert same(parameters_of(fit(Line(), settings(), tmp_path / "cut")), whole)


# Which are kept


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_last_few_are_kept(keep, tmp_path):
    fit(Line(), settings(keep=keep), tmp_path)
    names = [CHECKPOINT, *(f"checkpoint.{k}.safetensors" for k in range(1, keep))]
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == sorted(names)
    assert [load_tensors(tmp_path / name)[1]["step"] for name in names] == list(range(STEPS, STEPS - keep, -1))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, METRICS])


def test_the_best_is_kept_and_measured_with_averaged_weights(tmp_path):
    task, seen = Line([5.0, 2.0, 3.0]), []
    measure = task.validate
    task.validate = lambda: seen.append((task.module.training, task.module.weight.detach().clone())) or measure()
    chosen = settings(6, seconds=1e9, validate_every=2)
    fit(task, chosen, tmp_path)
    assert [row.get("validation") for row in rows(tmp_path)] == [None, 5.0, None, 2.0, None, 3.0]
    tensors, about = load_tensors(tmp_path / BEST)
    assert about["step"] == 4 and about["best"] == 2.0
    assert not any(training for training, _ in seen)
    assert torch.equal(seen[1][1], tensors["average.weight"])
    assert torch.equal(seen[1][1], averaged_weights(tmp_path / BEST)["weight"])
    assert not torch.equal(tensors["average.weight"], tensors["model.weight"])
    assert load_tensors(tmp_path / CHECKPOINT)[1]["step"] == 6


def test_measuring_changes_no_weight(tmp_path):
    plain = parameters_of(fit(Line(), settings(), tmp_path / "plain"))
    assert same(parameters_of(fit(Line([1.0] * 9), settings(validate_every=1), tmp_path / "measured")), plain)


def test_the_best_survives_a_restart(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(Line([5.0, 1.0, 3.0]), settings(validate_every=1), tmp_path, stop_at(3))
    fit(Line([3.0] * 9), settings(validate_every=1), tmp_path)
    assert load_tensors(tmp_path / BEST)[1]["step"] == 2


@pytest.mark.parametrize("damage", [False, True])
def test_a_kill_between_the_checkpoint_and_the_best_is_made_good(damage, monkeypatch, tmp_path):
    """With ``damage`` to the newest checkpoint, by which the one before goes on."""
    calls, real = [], Checkpoints.keep_best

    def keep_best(self):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(self)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Checkpoints, "keep_best", keep_best)
        fit(Line([5.0, 1.0]), settings(validate_every=1), tmp_path)
    best, newest = tmp_path / BEST, tmp_path / CHECKPOINT
    assert load_tensors(best)[1]["step"] == 1 and load_tensors(newest)[1]["best_step"] == 2
    if damage:
        newest.write_bytes(b"damaged")
        best.unlink()
        with pytest.warns(RuntimeWarning), pytest.raises(KeyboardInterrupt):
            fit(Line([7.0]), settings(validate_every=1), tmp_path, stop_at(2))
    else:
        fit(Line([3.0] * 9), settings(validate_every=1), tmp_path)
    _tensors, about = load_tensors(best)
    assert (about["step"], about["best"]) == ((1, 5.0) if damage else (2, 1.0))


# What is in them


@pytest.mark.parametrize(
    "draw",
    [lambda: torch.randn(()), lambda: float(np.random.randn()), lambda: random.gauss(0, 1)],
    ids=["torch", "numpy", "python"],
)
def test_global_generators_are_resumed(draw, tmp_path):
    """No task here needs them; one from elsewhere may."""

    def seed():
        torch.manual_seed(5), np.random.seed(5), random.seed(5)

    seed()
    whole = parameters_of(fit(Line(draw=draw), settings(), tmp_path / "whole"))
    seed()
    with pytest.raises(KeyboardInterrupt):
        fit(Line(draw=draw), settings(), tmp_path / "cut", stop_at(5))
    draw(), draw()
    assert same(parameters_of(fit(Line(draw=draw), settings(), tmp_path / "cut")), whole)


# The disk


def full_from(monkeypatch, call, number=errno.ENOSPC):
    """From the ``call``-th file on there is no space, as safetensors says it."""
    from safetensors import SafetensorError

    calls, real = [], tensors_module.save_file

    def save_file(*given, **named):
        calls.append(given)
        if len(calls) >= call:
            raise SafetensorError(f"Error while serializing: I/O error: No space left on device (os error {number})")
        real(*given, **named)

    monkeypatch.setattr(tensors_module, "save_file", save_file)


def test_a_full_disk_leaves_the_last_checkpoint(monkeypatch, tmp_path):
    whole = parameters_of(fit(Line(), settings(), tmp_path / "whole"))
    with monkeypatch.context() as patched:
        full_from(patched, 5)
        with pytest.raises(DiskFull, match=r"no space left.*last checkpoint.*is of step 4.*same command") as error:
            fit(Line(), settings(), tmp_path / "cut")
    assert error.value.errno == errno.ENOSPC
    left = [load_tensors(tmp_path / "cut" / name)[1]["step"] for name in (CHECKPOINT, "checkpoint.1.safetensors")]
    assert left == [4, 3]
    assert same(parameters_of(fit(Line(), settings(), tmp_path / "cut")), whole)


def test_another_error_of_the_disk_keeps_its_kind(monkeypatch, tmp_path):
    full_from(monkeypatch, 2, errno.EIO)
    with pytest.raises(OSError, match="Input/output error") as error:
        fit(Line(), settings(), tmp_path)
    assert not isinstance(error.value, DiskFull) and error.value.errno == errno.EIO


def test_a_row_that_finds_no_space_says_so(tmp_path):
    def meter():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull, match="there is no checkpoint"):
        fit(Line(), settings(), tmp_path, meter=meter)


def test_a_write_that_really_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    """A limit on the size of files, in a process of its own."""
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(2)}, {"step": 1})
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            save_tensors(path, {"a": torch.ones(100_000)}, {"step": 2})
        except OSError as error:
            os._exit(0 if error.errno == errno.EFBIG else 2)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert load_tensors(path)[1] == {"step": 1} and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_kill_between_the_renames_loses_nothing(monkeypatch, tmp_path):
    """The newest has moved to its next name, and the new one is not there yet."""
    with pytest.raises(KeyboardInterrupt):
        fit(Line(), settings(), tmp_path, stop_at(5))
    os.replace(tmp_path / CHECKPOINT, tmp_path / "checkpoint.1.safetensors")
    assert Checkpoints(tmp_path, 2).load()[1]["step"] == 4
