"""A grid in miniature, for tests that kill it: a cached stage and trials of a small network, made of the parts of real ones."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ablations.launch import pool
from ablations.launch.backend import JobRun, run_jobs
from ablations.launch.job import RESULT, Job
from ablations.launch.progress import Status, StatusProgress
from ablations.question.settings import Launcher
from ablations.session.work import told
from iris.io.files import write_json
from iris.randomness import initialise
from iris.stages.engine import Context, Stage
from iris.training.loop import LoopSettings, fit
from iris.training.optimiser import OptimiserSettings

TRIALS, STEPS, ROWS, WIDTH, BATCH = 4, 60, 1 << 16, 64, 32
PATIENCE = 600.0  # seconds that a loaded machine may take for anything


class Numbers(Stage):
    """What the trials share: numbers [ROWS, WIDTH] float32."""

    kind = "numbers"

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / "numbers.npy"

    def facts(self) -> dict[str, Any]:
        """Their shape."""
        return {"rows": ROWS, "width": WIDTH}

    def work(self) -> dict[str, Any]:
        """Draw them; notes which process did."""
        with open(self.folder / "made", "a") as marks:
            marks.write(f"{os.getpid()}\n")
        np.save(self.path, np.random.default_rng(0).standard_normal((ROWS, WIDTH), np.float32))
        return {}


def numbers(root: Path, status: Status | None = None) -> Numbers:
    """The stage of the grid in ``root``."""
    return Numbers(Context(root, StatusProgress(status)))


class Predict:
    """The task: one half of a row's numbers from the other. Notes each step that is computed, and by which process."""

    batch = BATCH

    def __init__(self, seed: int, rows: torch.Tensor, place: Path) -> None:
        self.rows, self.notes = rows, place / "steps"
        self.module = initialise(nn.Sequential(nn.Linear(WIDTH // 2, 512), nn.GELU(), nn.Linear(512, WIDTH // 2)), seed)

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean squared error of the rows of a step."""
        with open(self.notes, "a") as notes:
            notes.write(f"{step} {os.getpid()}\n")
        known, wanted = self.rows[step * BATCH : (step + 1) * BATCH].chunk(2, dim=1)
        return (self.module(known) - wanted).square().mean(), {}


def stage(folder: str, plan: dict[str, Any]) -> None:
    """A job: make the numbers that the trials share."""
    with told(Path(folder)) as status:
        numbers(Path(plan["root"]), status).make()


def trial(folder: str, plan: dict[str, Any]) -> None:
    """A job: train, with a checkpoint at every step."""
    with told(Path(folder)) as status:
        write_json(Path(folder) / RESULT, _train(Path(folder), plan, status))


def _train(place: Path, plan: dict[str, Any], status: Status) -> dict[str, Any]:
    made = numbers(Path(plan["root"]), status)
    made.make()
    rows = torch.from_numpy(np.load(made.path))
    settings = LoopSettings(STEPS, OptimiserSettings("adamw", 1e-3), log_every=1, checkpoint_seconds=0.0)
    module = fit(Predict(plan["seed"], rows, place), settings, place, lambda row: status.training("train", row, BATCH))
    weights = b"".join(value.detach().numpy().tobytes() for value in module.parameters())
    return {"metrics": {"weights": hashlib.sha256(weights).hexdigest()}}


def drive(root: Path) -> int:
    """The command: run what is missing. 0 when all trials have a result."""
    plan, shared = {"root": str(root)}, numbers(root)
    jobs = [
        Job(f"trial{seed}", trial, plan | {"seed": seed}, root / "trials" / str(seed), (shared.folder,))
        for seed in range(TRIALS)
    ]
    errors: list[dict[str, str]] = []
    run = JobRun(
        [Job(shared.key, stage, plan, shared.folder), *jobs],
        pool.Pool(Launcher(workers=2, timeout_min=30), root, 1),
        lambda job: None,
        lambda job, error: errors.append(error) if error else None,
    )
    run.backend.poll_seconds = 0.1
    run_jobs(run, lambda: None)
    print(*errors, sep="\n", flush=True)
    return 1 if errors else 0


def results(root: Path) -> list[dict[str, str]]:
    """Metrics of all trials."""
    return [json.loads((root / "trials" / str(seed) / "result.json").read_text())["metrics"] for seed in range(TRIALS)]


class Driver:
    """The command in a fork of this process, which has imported everything already; what it says goes to ``log``."""

    def __init__(self, root: Path, log: Path | None = None) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                sys.stdout = sys.stderr = open(log or root.with_suffix(".log"), "a", buffering=1)  # not pytest's
                code = drive(root)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        """Its exit code, minus the signal that ended it, or None."""
        if self.code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if done else None
        return self.code

    def wait(self) -> int:
        """Its exit code."""
        deadline = time.monotonic() + PATIENCE
        while self.poll() is None:
            assert time.monotonic() < deadline, "the grid does not go on"
            time.sleep(0.02)
        return self.code
