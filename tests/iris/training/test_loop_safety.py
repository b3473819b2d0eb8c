"""What ends a run early: signals, losses that are not finite, memory, and processes that are gone."""

import json
import os
import signal
import threading
import traceback

import pytest
import torch
from small_models import CAPTIONS, CHANNELS, parameters_of, small_model
from torch import nn

from iris.io.tensors import load_tensors
from iris.training.checkpoint import CHECKPOINT
from iris.training.loop import METRICS, LoopSettings, NonFiniteLoss, fit
from iris.training.optimiser import OptimiserSettings
from iris.training.safety import (
    ROWS_NAMED,
    BatchFacts,
    LostWorker,
    OutOfMemory,
    Stopped,
    explained_loss_of_worker,
    explained_memory,
    non_finite,
)
from iris.training.tasks import FlowTask, batch_indices

STEPS = 8
SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]


def flow_task(loss_weight="none"):
    module = small_model(awake=True)
    latents = torch.randn(4, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))
    encode = module.text.vocabulary.encode
    return FlowTask(
        module,
        latents,
        encode(CAPTIONS),
        encode([""])[0],
        batch=2,
        seed=0,
        caption_dropout=0.3,
        loss_weight=loss_weight,
    )


class Breaking:
    """A weight that walks, with losses that are not finite at ``bad`` steps, or an ``error`` raised there."""

    batch = 4

    def __init__(self, bad=(), value=float("nan"), error=None):
        self.module, self.bad, self.value, self.error = nn.Linear(1, 1), bad, value, error
        nn.init.zeros_(self.module.weight)
        nn.init.zeros_(self.module.bias)

    def loss(self, step):
        loss = (self.module(torch.ones(1, 1)) - 3).square().mean()
        if step in self.bad and self.error is not None:
            raise self.error
        return (loss * self.value if step in self.bad else loss), {}


def settings(steps=STEPS, seconds=1e9, **changes):
    return LoopSettings(steps, OptimiserSettings("adamw", 3e-3), log_every=1, checkpoint_seconds=seconds, **changes)


def rows(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def send_at(step, number):
    def observe(row):
        if row["step"] == step:
            os.kill(os.getpid(), number)

    return observe


# Signals


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_leaves_a_checkpoint_and_the_run_ends_the_same(number, tmp_path, capfd):
    before = signal.getsignal(number)
    whole = parameters_of(fit(flow_task(), settings(), tmp_path / "whole"))
    with pytest.raises(SystemExit) as stopped:
        fit(flow_task(), settings(), tmp_path / "cut", send_at(3, number))
    assert isinstance(stopped.value, Stopped) and stopped.value.code == 128 + number
    assert f"{number.name}: the last checkpoint in {tmp_path}/cut is of step 4 of 8" in capfd.readouterr().err
    assert load_tensors(tmp_path / "cut" / CHECKPOINT)[1]["step"] == 4
    assert signal.getsignal(number) == before
    assert same(parameters_of(fit(flow_task(), settings(), tmp_path / "cut")), whole)
    assert [row["loss"] for row in rows(tmp_path / "cut")] == [row["loss"] for row in rows(tmp_path / "whole")]


def test_the_exit_code_is_that_of_the_signal(tmp_path):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            fit(Breaking(), settings(), tmp_path, send_at(3, signal.SIGTERM))
        except SystemExit as stopped:
            code = stopped.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    assert load_tensors(tmp_path / CHECKPOINT)[1]["step"] == 4


@pytest.fixture
def hook():
    """A handler that is there before the run, as submitit's: what it returns or raises decides."""
    called, before = [], signal.getsignal(signal.SIGUSR2)

    def install(act):
        signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number) or act())
        return called

    yield install
    signal.signal(signal.SIGUSR2, before)


def test_a_handler_from_before_requeues_after_the_checkpoint(hook, tmp_path):
    def requeue():
        assert load_tensors(tmp_path / CHECKPOINT)[1]["step"] == 4
        raise SystemExit(-1)

    called = hook(requeue)
    with pytest.raises(SystemExit) as left:
        fit(Breaking(), settings(), tmp_path, send_at(3, signal.SIGUSR2))
    assert called == [signal.SIGUSR2] and left.value.code == -1


def test_a_handler_that_passes_over_the_signal_lets_the_run_go_on(hook, tmp_path):
    called = hook(lambda: None)
    fit(Breaking(), settings(), tmp_path, send_at(3, signal.SIGUSR2))
    assert called == [signal.SIGUSR2] and rows(tmp_path)[-1]["step"] == STEPS


def test_a_signal_in_the_last_step_finds_everything_saved(tmp_path):
    with pytest.raises(Stopped):
        fit(Breaking(), settings(), tmp_path, send_at(STEPS, signal.SIGTERM))
    assert load_tensors(tmp_path / CHECKPOINT)[1]["step"] == STEPS


def test_another_thread_can_train(tmp_path):
    """Only the main thread may set handlers."""
    ended = []
    thread = threading.Thread(target=lambda: ended.append(fit(Breaking(), settings(2), tmp_path)))
    thread.start()
    thread.join()
    assert len(ended) == 1


# Losses that are not finite


def test_the_message_names_rows_and_settings(tmp_path):
    task = flow_task("odds")
    with torch.no_grad():
        task.latents[2] = float("nan")
    bad = next(step for step in range(STEPS) if 2 in batch_indices(4, 2, 0, step))
    with pytest.raises(NonFiniteLoss) as error:
        fit(task, settings(group="pretrain"), tmp_path)
    text = str(error.value)
    assert text.startswith(f"step {bad + 1}: loss nan, gradient norm nan.")
    assert f"Rows of the batch: {', '.join(map(str, batch_indices(4, 2, 0, bad).tolist()))}" in text
    own = "pretrain.learning_rate=0.003", "pretrain.clip=1.0", "pretrain.loss_weight=odds", "pretrain.time=logit_normal"
    for named in (*own, "compute.precision=no", "model.iterations=2"):
        assert named in text


class Named:
    """Latents that know where they came from."""

    def __init__(self, latents):
        self.latents, self.shape = latents, latents.shape

    def __len__(self):
        return len(self.latents)

    def __getitem__(self, rows):
        return self.latents[rows]

    def keys(self, rows):
        return [f"timeout-{row // 2}.tar/{row:03d}" for row in rows]


def test_the_message_names_where_the_rows_came_from():
    """In a run of several processes too, whatever words are in the names."""
    task = flow_task()
    task.latents = Named(task.latents)
    facts = task.describe(1)
    first = facts.rows[0]
    error = non_finite(2, float("nan"), 1.0, facts, {})
    assert f"Rows of the batch: {first} (timeout-{first // 2}.tar/{first:03d}), " in str(error)
    with pytest.raises(NonFiniteLoss), explained_loss_of_worker(2, str):
        raise error


def test_a_long_batch_is_not_listed_whole():
    text = str(non_finite(1, 0.0, float("inf"), BatchFacts(range(100)), {}))
    assert text.endswith(f"{ROWS_NAMED - 1} and {100 - ROWS_NAMED} more")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_steps_are_skipped_up_to_the_limit(value, tmp_path):
    seen = []
    task = Breaking(bad=(2, 5), value=value)
    fit(task, settings(skip_nonfinite=2), tmp_path, lambda row: seen.append(task.module.weight.item()))
    assert seen[2] == seen[1] != seen[3] and seen[5] == seen[4] != seen[6]
    assert [row.get("skipped") for row in rows(tmp_path)] == [None, None, 1, 1, 1, 2, 2, 2]
    tensors, about = load_tensors(tmp_path / CHECKPOINT)
    assert about["skipped"] == 2 and all(tensor.isfinite().all() for tensor in tensors.values())
    with pytest.raises(NonFiniteLoss, match="step 6.*compute.skip_nonfinite=1"):
        fit(Breaking(bad=(2, 5), value=value), settings(skip_nonfinite=1), tmp_path / "less")


def test_the_count_of_skipped_steps_is_resumed(tmp_path):
    with pytest.raises(Stopped):
        fit(Breaking(bad=(1, 5)), settings(skip_nonfinite=1), tmp_path, send_at(3, signal.SIGTERM))
    with pytest.raises(NonFiniteLoss, match="step 6"):
        fit(Breaking(bad=(1, 5)), settings(skip_nonfinite=1), tmp_path)


def test_skipped_steps_leave_the_average_alone(tmp_path):
    task = Breaking(bad=range(1, STEPS))
    fit(task, settings(skip_nonfinite=STEPS), tmp_path)
    tensors, _ = load_tensors(tmp_path / CHECKPOINT)
    once = Breaking()
    with pytest.raises(Stopped):
        fit(once, settings(seconds=0.0), tmp_path / "once", send_at(1, signal.SIGTERM))
    first, _ = load_tensors(tmp_path / "once" / "checkpoint.1.safetensors")
    assert torch.equal(tensors["average.weight"], first["average.weight"])


# Memory and processes


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_running_out_of_memory_names_the_knobs(error, tmp_path):
    from ablations.session.work import cause_of

    with pytest.raises(
        OutOfMemory, match=r"step 3 with train.batch=4, 2 rows at a time.*compute.accumulate=2"
    ) as raised:
        task = Breaking(bad=(2,), error=error)
        split = task.loss
        task.loss = lambda step, part=None: split(step)
        fit(task, settings(accumulate=2), tmp_path)
    assert "gradient_checkpointing" not in str(raised.value)  # nothing to recompute here
    assert cause_of(raised.value) == "oom"


def test_memory_that_a_real_allocation_lacks(tmp_path):
    task = flow_task()
    task.loss = lambda step: torch.empty(1 << 60)
    with pytest.raises(OutOfMemory, match=r"of size 3 x 4 x 4.*compute.gradient_checkpointing=true"):
        fit(task, settings(), tmp_path)


def test_memory_that_a_look_lacks(tmp_path):
    def look():
        raise torch.OutOfMemoryError("CUDA out of memory")

    task = Breaking()
    task.validate = look
    told = r"averaged weights were looked at after step 2: lower preview.count, or set compute.validate_every=2 to 0"
    with pytest.raises(OutOfMemory, match=told):
        fit(task, settings(validate_every=2), tmp_path)


def test_other_errors_keep_their_kind():
    for error in (RuntimeError("shapes differ"), ValueError("x")):
        with pytest.raises(type(error)) as raised, explained_memory(lambda: ""), explained_loss_of_worker(2, str):
            raise error
        assert raised.value is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:1"),
        torch.distributed.DistBackendError("NCCL communicator was aborted"),
    ],
)
def test_a_lost_process_is_told_apart(error):
    saved = []
    with (
        pytest.raises(LostWorker, match=r"another of the 2 processes is gone; kept"),
        explained_loss_of_worker(2, lambda: saved.append(1) or "kept"),
    ):
        raise error
    assert saved == [1]
    with pytest.raises(type(error)), explained_loss_of_worker(1, str):
        raise error


def test_a_lost_process_is_explained_once():
    with (
        pytest.raises(LostWorker, match="inner") as raised,
        explained_loss_of_worker(2, lambda: "outer"),
        explained_loss_of_worker(2, lambda: "inner"),
    ):
        raise RuntimeError("Connection closed by peer")
    assert "outer" not in str(raised.value)
