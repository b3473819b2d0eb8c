"""Before any compute: settings -> arms and trials, checked by building every model without memory, and their cost."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ablations.launch import processes_of, threads_of
from ablations.question.grid import Arm, Trial, expand, match_arms, trials_of
from ablations.question.settings import Launcher, Settings
from ablations.trial.model import (
    build_model,
    build_text,
    generator_config,
    latent_sizes,
    part_facts,
    sampling_of,
    text_width,
    times_of,
)
from ablations.trial.stages import Stages
from eval.judges import describe
from eval.speed.process import processor_name
from iris import data
from iris.errors import SettingError
from iris.io.files import read_json, write_json
from iris.io.hashing import digest
from iris.nn.generator import Generator
from iris.nn.mixers import OPTION_GROUPS, check_mixer
from iris.randomness import addressed
from iris.text import TextEncoder, Vocabulary, WordEncoder
from iris.training.optimiser import Optimisers, OptimiserSettings
from iris.training.tasks import FlowTask

BUILT = ("latent", "model", "depth", *OPTION_GROUPS)  # groups that a generator is built from
TIMED = 15  # evaluations of each of two generators whose times are compared
_COUNTS: dict[str, float] = {}
EXAMPLE = "a large red circle in the centre on a white background"


@dataclass(frozen=True)
class Plan:
    """A grid ready to run."""

    arms: list[Arm]
    trials: list[Trial]
    facts: dict[str, dict[str, str]]  # arm -> data fingerprint, judge sha256, those of pretrained parts
    judge: dict[str, Any]
    threads: int
    runs: Path

    def folder(self, trial: Trial) -> Path:
        """Where a trial lives."""
        return self.runs / "trials" / trial.key

    def job_plan(self, trial: Trial) -> dict[str, Any]:
        """What a job is told."""
        return {
            "key": trial.key,
            "settings": trial.settings,
            "facts": self.facts[trial.arm],
            "runs_dir": str(self.runs),
            "threads": self.threads,
        }

    def stages(self, trial: Trial) -> Stages:
        """The shared stages of a trial."""
        return Stages(trial.settings, self.facts[trial.arm], self.runs)


def make_plan(settings: Settings, values: dict[str, Any]) -> Plan:
    """Expand, match and identify all trials of a grid.

    Raises:
        SettingError: anything that would fail later and can be known now.
    """
    check_mixer(settings.model.mixer)
    arms = [_with_places(arm) for arm in expand(settings, values)]
    for arm in arms:
        _check_arm(arm)
        _check_shared_batch(arm, settings.launcher)
    arms = match_arms(arms, settings.grid.match, _cost(settings.grid.match, arms[0], Path(settings.runs_dir)))
    judge = describe(**values["judge"])
    facts = {
        arm.name: {"data": _fingerprint(arm.settings["data"]), "judge": judge["sha256"], **part_facts(arm.settings)}
        for arm in arms
    }
    threads = threads_of(settings.launcher, settings.threads)
    trials = _different(trials_of(arms, settings.seeds, facts), bool(settings.grid.include))
    named = {trial.arm for trial in trials}
    arms = [arm for arm in arms if arm.name in named]
    return Plan(arms, trials, facts, judge, threads, Path(settings.runs_dir).absolute())


def _different(trials: list[Trial], joined: bool) -> list[Trial]:
    """The trials, each key once. Grids that are joined may meet in a trial; in one grid, two arms of one key are an error."""
    seen: dict[str, Trial] = {}
    for trial in trials:
        other = seen.setdefault(trial.key, trial)
        if other is not trial and not joined:
            apart = ", ".join(
                key for key in trial.values | other.values if trial.values.get(key) != other.values.get(key)
            )
            raise SettingError(
                f"grid: {other.arm} and {trial.arm} are the same trial, {apart} changes nothing there; "
                "grid.when says where an axis counts, grid.exclude leaves points out"
            )
    return list(seen.values())


def _with_places(arm: Arm) -> Arm:
    """The arm with paths of pretrained parts as absolute paths: jobs and saved models are used from elsewhere."""
    places = {}
    for group, name in (("latent", "source"), ("model", "text_source")):
        given = arm.settings[group][name]
        if given and Path(given).expanduser().is_dir():
            places[group] = arm.settings[group] | {name: str(Path(given).expanduser().absolute())}
    weights = arm.settings["judge"]["weights"]  # a path, or a tag of open_clip
    if weights and (os.sep in weights or Path(weights).suffix) and Path(weights).expanduser().exists():
        places["judge"] = arm.settings["judge"] | {"weights": str(Path(weights).expanduser().absolute())}
    return replace(arm, settings=arm.settings | places)


def _fingerprint(settings: dict[str, Any]) -> str:
    return data.fingerprint(settings["name"], **{k: v for k, v in settings.items() if k not in ("name", "max_bad")})


def _check_arm(arm: Arm) -> None:
    size, (_, factor) = arm.settings["data"]["size"], latent_sizes(arm.settings)
    if size % factor:
        raise SettingError(
            f"{arm.name}: data.size={size} must be a multiple of {factor}, the factor of latent "
            f"{arm.settings['latent']['name']} (latent.patch, or 2 ^ (latent.levels + latent.stages))"
        )
    _check_counts(arm)
    parameters(arm.settings)
    times_of(arm.settings)
    sampling_of(arm.settings)
    _check_passes(arm)


def _check_shared_batch(arm: Arm, launcher: Launcher) -> None:
    """The processes of a trial and the parts of each take equal shares of a batch."""
    parts = processes_of(launcher) * arm.settings["train"]["accumulate"]
    if arm.settings["train"]["batch"] % parts:
        raise SettingError(
            f"train.batch={arm.settings['train']['batch']} must be a multiple of {parts}: launcher.nodes={launcher.nodes} "
            f"times launcher.gpus_per_trial={launcher.gpus_per_trial} (at least 1) times train.accumulate"
        )


def _check_counts(arm: Arm) -> None:
    """A drawn world must hold as many captions as are sampled; how many files hold is known only when they are read."""
    measured, given = arm.settings["measure"], arm.settings["data"]
    for wanted, split in (("samples", "validation"), ("heldout_samples", "heldout")):
        if given["name"] in data.WORLDS and isinstance(given[split], int) and measured[wanted] > given[split]:
            raise SettingError(
                f"{arm.name}: measure.{wanted}={measured[wanted]} must be at most data.{split}={given[split]}, "
                "the captions that there are"
            )


def _check_passes(arm: Arm) -> None:
    """Further numbers of passes to measure at must be ones that the generator can run."""
    given, trained = arm.settings["measure"]["iterations"], arm.settings["model"]["iterations"]
    if any(not isinstance(r, int) or isinstance(r, bool) or r < 1 for r in given) or len(set(given)) != len(given):
        raise SettingError(
            f"measure.iterations={given} must be a list of different integers of at least 1, such as [1,2,4,8]"
        )
    if not arm.settings["depth"]["share"] and any(r != trained for r in given):
        raise SettingError(
            f"{arm.name}: measure.iterations={given} must be empty with depth.share=false, whose layers run once each"
        )


def parameters(settings: dict[str, Any]) -> float:
    """Generator parameters of trial settings."""
    return _counted(_parameters, settings)


def flops(settings: dict[str, Any]) -> float:
    """Operations of one generator evaluation for one image."""
    return _counted(_flops, settings)


def network_of(settings: dict[str, Any]) -> str:
    """Names what one image takes of trial settings: the network and how it is sampled, not how it was trained."""
    return digest([settings["data"]["size"], settings["sample"], *(settings[group] for group in BUILT)])


def _counted(count: Callable[[dict[str, Any]], float], settings: dict[str, Any]) -> float:
    """``count(settings)``, once for all settings of the same generator: a grid over seeds and rates builds it once."""
    built = json.dumps(
        [count.__name__, settings["data"]["size"], *(settings[group] for group in BUILT)], sort_keys=True
    )
    if built not in _COUNTS:
        _COUNTS[built] = count(settings)
    return _COUNTS[built]


def _parameters(settings: dict[str, Any]) -> float:
    config = generator_config(settings, latent_sizes(settings)[0], text_width(settings))
    with torch.device("meta"):
        return sum(p.numel() for p in Generator(config).parameters())


def _flops(settings: dict[str, Any]) -> float:
    from eval.speed.flops import count_flops

    task = _example(settings, batch=1)
    with torch.no_grad():
        return count_flops(lambda: task.loss(0)).total


def _cost(what: str, baseline: Arm, runs: Path) -> Callable[[dict[str, Any]], float]:
    """What ``grid.match`` makes equal, as a function of trial settings."""
    return {
        "params": parameters,
        "flops": flops,
        "latency": RelativeTime(baseline.settings, runs / "times"),
        "none": parameters,
    }[what]


class RelativeTime:
    """Time of one generator evaluation over the baseline's, both run in turn, so that a drift meets both alike.

    Times are kept in ``folder``: a grid planned again has the same widths, and so the same keys.
    """

    def __init__(self, baseline: dict[str, Any], folder: Path) -> None:
        self.baseline, self.folder = baseline, folder

    def __call__(self, settings: dict[str, Any]) -> float:
        if settings is self.baseline:
            return 1.0
        built = [[given["data"]["size"], *(given[group] for group in BUILT)] for given in (self.baseline, settings)]
        kept = self.folder / f"{digest(built)}.json"
        known = read_json(kept)
        if known is None:
            torch.set_num_threads(1)
            tasks = [_example(self.baseline, batch=1), _example(settings, batch=1)]
            times = [[_seconds(task) for task in tasks] for _ in range(TIMED + 2)][2:]
            known = {"ratio": statistics.median(mine / first for first, mine in times), "settings": built[1]}
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(kept, known)
        return known["ratio"]


@torch.no_grad()
def _seconds(task: FlowTask) -> float:
    """Processor time of one evaluation on this thread, which other processes do not change."""
    started = time.thread_time()
    task.loss(0)
    return time.thread_time() - started


def _example(settings: dict[str, Any], batch: int) -> FlowTask:
    """A training task of the right shapes on random data."""
    channels, factor = latent_sizes(settings)
    side = settings["data"]["size"] // factor
    text = _example_text(settings)
    model = build_model(settings | {"seed": 0}, channels, text)
    captions = text.tokenise([EXAMPLE] * batch)
    return FlowTask(
        model,
        torch.randn(batch, channels, side, side, generator=addressed("example")),
        captions,
        text.tokenise([""])[0],
        batch,
        0,
        0.1,
        "none",
        steps=settings["train"]["steps"],
    )


def _example_text(settings: dict[str, Any]) -> TextEncoder:
    """A text encoder of the right width; a frozen one is stood for by a small one, since its embeddings are made beforehand."""
    if settings["model"]["text"] == "clip":
        return WordEncoder(Vocabulary.from_captions([EXAMPLE], 77), text_width(settings), 0, heads=1)
    return build_text(settings, [EXAMPLE])


def step_seconds(settings: dict[str, Any], steps: int = 3) -> float:
    """Seconds of one training step of trial settings, measured here on a few steps; for the cost of a dry run."""
    task = _example(settings, settings["train"]["batch"])
    optimisers = Optimisers(task.module, OptimiserSettings(settings["train"]["optimiser"]))
    started = time.monotonic()
    for step in range(steps + 1):
        if step == 1:  # the first step allocates
            started = time.monotonic()
        task.loss(step)[0].backward()
        optimisers.step(1e-3)
    return (time.monotonic() - started) / steps


def hardware(threads: int) -> dict[str, Any]:
    """What this machine is, for the record."""
    import psutil

    return {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": "cpu",
        "torch": torch.__version__,
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "python": platform.python_version(),
    }


def commit() -> str:
    """The git commit, "+changes" appended when the tree is dirty, or "unknown"."""
    root = Path(__file__).parents[1]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", ".", "../iris", "../eval")
        return git("rev-parse", "--short=10", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def command() -> str:
    """What the user typed."""
    return " ".join(["python -m ablations.run", *sys.argv[1:]])
