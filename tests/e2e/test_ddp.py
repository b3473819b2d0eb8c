"""Two processes on gloo: the single process's loss curve, also after a kill, started by torchrun and by submitit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import free_port, ranks, together

from iris.io.tensors import load_tensors
from iris.latents.discriminator import AdversarialOptions
from iris.latents.wavelet_vae import WaveletVAE
from iris.model import TextToLatent
from iris.nn.depth import Depth
from iris.nn.generator import Generator, GeneratorConfig
from iris.randomness import initialise
from iris.text import Vocabulary, WordEncoder
from iris.training.checkpoint import CHECKPOINT
from iris.training.distill_settings import DistillSettings
from iris.training.distill_task import Distillation, DistillTask
from iris.training.loop import METRICS, LoopSettings, Task, fit
from iris.training.optimiser import OPTIMISERS, OptimiserSettings
from iris.training.run import TrainingRun
from iris.training.safety import LostWorker
from iris.training.tasks import FlowTask
from iris.training.vae_task import VAETask

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ddp")]  # one worker: what the module's fixtures make is shared
ROOT = Path(__file__).parents[2]
STEPS, BATCH, WORLD = 50, 8, 2
CAPTIONS = ["a red circle", "a blue square", "two stars", "a circle"]
# Of losses, relative. Muon's Newton-Schulz iteration is in bfloat16, so that a last bit of a gradient can move an
# update by 1e-3 of itself: measured 8e-5, and 1e-7 with AdamW.
TOLERANCE = {"adamw": 1e-4, "muon": 1e-3}
LOST = 7  # exit code of a process that noticed another's end


def small_task(depth: Depth) -> FlowTask:
    """Sixteen latents and captions, some thousand parameters."""
    text = WordEncoder(Vocabulary.from_captions(CAPTIONS, 6), 12, layers=1)
    config = GeneratorConfig(
        channels=3,
        text_width=12,
        dim=16,
        heads=2,
        prelude=1,
        core=1,
        coda=1,
        iterations=2,
        ffn_ratio=2.0,
        mixer="grfm",
        depth=depth,
    )
    module = initialise(TextToLatent(text, Generator(config)), 0)
    latents = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return FlowTask(
        module,
        latents,
        text.tokenise(CAPTIONS * 4),
        text.tokenise([""])[0],
        batch=BATCH,
        seed=0,
        caption_dropout=0.2,
        loss_weight="none",
        steps=STEPS,
    )


def small_student() -> DistillTask:
    """Of that task's model."""
    task = small_task(Depth())
    distillation = Distillation(task.module, DistillSettings("consistency", steps="1,2", grid=8), 0)
    return DistillTask(distillation, task.latents, task.captions, task.null, BATCH, 0, STEPS)


def small_vae() -> VAETask:
    """Sixteen pictures and a discriminator."""
    pixels = torch.randint(0, 256, (16, 8, 8, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    vae = initialise(WaveletVAE(channels=4, width=8), 0)
    return VAETask(
        vae,
        pixels,
        BATCH,
        0,
        kl_weight=1e-2,
        detail_weight=0.5,
        adversarial=AdversarialOptions(weight=0.1, width=8, layers=1, start=5),
    )


def train(
    folder: Path,
    optimiser: str = "muon",
    depth: Depth = Depth(),
    observe: Callable[[dict], None] = lambda row: None,
    seconds: float = 1e9,
    make: Callable[[], Task] | None = None,
    **changes,
) -> None:
    """The run whose curve is compared; what each process ends with is saved beside it."""
    chosen = OptimiserSettings(optimiser, 3e-3)
    settings = LoopSettings(STEPS, chosen, log_every=1, checkpoint_seconds=seconds, **changes)
    module = fit(make() if make else small_task(depth), settings, folder, observe)
    weights = {name: value.detach() for name, value in module.named_parameters()}
    torch.save(weights, folder / f"rank{os.environ.get('RANK', 0)}.pt")


def submitit_ranks() -> list[dict[str, str]]:
    """The environments of a job of two tasks."""
    shared = {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_JOB_ID": "12",
        "SUBMITIT_LOCAL_NTASKS": str(WORLD),
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
        "SUBMITIT_LOCAL_NODEID": "0",
        "MASTER_PORT": str(free_port()),
    }
    return [shared | {"SUBMITIT_LOCAL_GLOBALID": str(n), "SUBMITIT_LOCAL_LOCALID": str(n)} for n in range(WORLD)]


def pair_of(work: Callable[[int], object], environments: list[dict[str, str]] | None = None) -> list[int]:
    """Do ``work(rank)`` in two processes; their exit codes, ``LOST`` for one that noticed the other's end."""

    def noticing(rank: int) -> int:
        try:
            work(rank)
        except LostWorker:
            traceback.print_exc()
            return LOST
        return 0

    return together(noticing, environments or ranks(WORLD))


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def check_same_curve(folder: Path, other: Path, optimiser: str = "muon") -> None:
    rows, others = logged(folder), logged(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others] == list(range(1, STEPS + 1))
    assert all(rows[k].keys() == others[k].keys() for k in range(STEPS))
    for name in [key for key in rows[0] if key.startswith("loss")]:
        expected = pytest.approx([row[name] for row in others], rel=TOLERANCE[optimiser])
        assert [row[name] for row in rows] == expected, name


def ends(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


def check_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def at(step: int, act: Callable[[], object]) -> Callable[[dict], None]:
    return lambda row: act() if row["step"] == step else None


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """In each process: more than there are cores would wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of runs by one process."""
    made: dict[str, Path] = {}

    def make(**how) -> Path:
        if str(how) not in made:
            made[str(how)] = tmp_path_factory.mktemp("single")
            train(made[str(how)], **how)
        return made[str(how)]

    return make


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by two processes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("pair")
    assert pair_of(lambda rank: train(folder)) == [0, 0]
    return folder


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_two_processes_follow_one(optimiser, single, tmp_path):
    """And hold the same weights: each makes Muon's update of the same averaged gradient."""
    assert pair_of(lambda rank: train(tmp_path, optimiser)) == [0, 0]
    check_same_curve(tmp_path, single(optimiser=optimiser), optimiser)
    check_equal(*ends(tmp_path))


@pytest.mark.parametrize(
    "how",
    [
        {"depth": Depth(carry=True)},
        {"depth": Depth(training="exits")},
        {"accumulate": 2, "gradient_checkpointing": True},
        {"depth": Depth(initial="noise", training="drawn")},
    ],
    ids=["carry", "exits", "accumulated and recomputed", "noise and drawn"],
)
def test_every_kind_of_step_can_be_shared(how, single, tmp_path):
    """Also those that leave some weights without gradient."""
    assert pair_of(lambda rank: train(tmp_path, "adamw", **how)) == [0, 0]
    check_same_curve(tmp_path, single(optimiser="adamw", **{k: v for k, v in how.items() if k == "depth"}), "adamw")
    check_equal(*ends(tmp_path))


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_is_noticed_and_the_pair_continues(killed, pair, single, tmp_path):
    """kill -9 of either; the first one, when it is left, saves the step it has reached."""

    def work(rank: int) -> None:
        task_at = at(23, lambda: os.kill(os.getpid(), signal.SIGKILL))
        if rank == killed == 0:
            train(tmp_path, observe=task_at, seconds=0.0)
        elif rank == killed:
            losses, loss = [], FlowTask.loss
            FlowTask.loss = lambda *given: losses.append(1) or (task_at({"step": len(losses)}), loss(*given))[1]
            train(tmp_path, seconds=1e9)
        else:
            train(tmp_path, seconds=0.0 if killed == 0 else 1e9)

    codes = pair_of(work)
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == LOST
    assert load_tensors(tmp_path / CHECKPOINT)[1]["step"] == 22
    assert pair_of(lambda rank: train(tmp_path)) == [0, 0]
    check_same_curve(tmp_path, single(optimiser="muon"))
    check_equal(*ends(tmp_path))
    check_equal(ends(tmp_path)[0], ends(pair)[0])


@pytest.mark.parametrize("make", [small_student, small_vae])
def test_a_killed_pair_of_another_stage_continues_and_ends_the_same(make, tmp_path):
    """What beside the trained weights a step depends on, the student's target or the discriminator, comes back too."""
    whole, cut, step = tmp_path / "whole", tmp_path / "cut", random.Random().randint(3, STEPS - 1)
    assert pair_of(lambda rank: train(whole, make=make)) == [0, 0]
    kill = at(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert pair_of(lambda rank: train(cut, observe=kill, seconds=0.0, make=make)) == [-signal.SIGKILL, LOST]
    assert load_tensors(cut / CHECKPOINT)[1]["step"] == step - 1
    assert pair_of(lambda rank: train(cut, make=make)) == [0, 0], f"killed at {step}"
    for name in ("step", "loss", "grad_norm"):
        assert [row[name] for row in logged(cut)] == [row[name] for row in logged(whole)], f"killed at {step}"
    for one, other in zip(ends(cut), ends(whole), strict=True):
        check_equal(one, other)


def test_a_process_that_is_lost_while_the_other_waits_is_noticed(tmp_path, capfd):
    def work(rank: int) -> None:
        if rank == 1:
            TrainingRun.save = lambda run: os.kill(os.getpid(), signal.SIGKILL)
        train(tmp_path, observe=at(23, lambda: os.kill(os.getpid(), signal.SIGTERM)))

    assert pair_of(work) == [LOST, -signal.SIGKILL]
    told = f"another of the 2 processes is gone; the last checkpoint in {tmp_path} is of step 24. Run the same command"
    assert told in capfd.readouterr().err


def test_a_signal_to_one_process_stops_both_at_one_step(pair, tmp_path, capfd):
    def work(rank: int) -> None:
        stop = at(23, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(tmp_path, observe=stop)

    assert pair_of(work) == [143, 143]
    assert capfd.readouterr().err.count(f"SIGTERM: the last checkpoint in {tmp_path} is of step 24 of {STEPS}") == 2
    assert load_tensors(tmp_path / CHECKPOINT)[1]["step"] == 24
    assert pair_of(lambda rank: train(tmp_path)) == [0, 0]
    check_equal(ends(tmp_path)[1], ends(pair)[0])


def test_submitit_starts_a_pair(pair, tmp_path):
    assert pair_of(lambda rank: train(tmp_path), submitit_ranks()) == [0, 0]
    check_equal(torch.load(tmp_path / "rank0.pt"), ends(pair)[0])


def test_torchrun_starts_a_pair(pair, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        f"import pathlib, sys\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests' / 'iris'), str(Path(__file__).parent)]!r}\n"
        f"import test_ddp\ntest_ddp.train(pathlib.Path({str(tmp_path)!r}))\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(WORLD),
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(free_port()),
        str(script),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    check_equal(*ends(tmp_path))
    check_equal(ends(tmp_path)[0], ends(pair)[0])


def test_a_batch_that_cannot_be_shared_is_named(tmp_path, capfd):
    assert pair_of(lambda rank: train(tmp_path, accumulate=3)) == [1, 1]
    assert "train.batch=8 must be a multiple of 6: 2 processes times compute.accumulate=3" in capfd.readouterr().err
