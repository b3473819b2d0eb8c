"""Before any compute: settings -> arms and trials with their chains, checked by building every model without memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ablations.question.chain import Chain, Chains
from ablations.question.costs import cost_of, parameters
from ablations.question.grid import Arm, expand, match_arms
from ablations.question.settings import Settings
from iris.errors import SettingError
from iris.nn.mixers import check_mixer
from iris.stages.engine import Stage


class Silent:
    """Tells nobody."""

    def say(self, text: str) -> None: ...

    def done(self, work: str, count: int, total: int | None = None) -> None: ...

    def training(self, work: str, row: Any, batch: int) -> None: ...


@dataclass(frozen=True)
class Trial:
    """One fully resolved configuration with one seed.

    Attributes:
        key: of all that determines its result.
        values: axis -> value.
        settings: as plain values.
        curves: files of its trainings' curves, the last one its own; model: the folder of its saved model. Both are
            relative to the runs folder, since stages are shared by trials.
    """

    key: str
    arm: str
    values: dict[str, Any]
    seed: int
    baseline: bool
    settings: dict[str, Any]
    matched: str | None
    curves: tuple[str, ...]
    model: str
    chain: Chain = field(repr=False, compare=False)

    @property
    def label(self) -> str:
        """Name of the trial for people."""
        return f"{self.arm}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A grid ready to run.

    Attributes:
        refused: measure -> why it cannot be taken of these trials.
    """

    arms: list[Arm]
    trials: list[Trial]
    threads: int
    runs: Path
    refused: dict[str, str]

    @property
    def judge(self) -> dict[str, Any]:
        """What is known of the judge, see ``eval.judges.describe``."""
        return self.trials[0].chain.run.judging.about

    @property
    def data(self) -> dict[str, Any]:
        """Settings and fingerprint of the baseline's data."""
        run, settings = self.trials[0].chain.run, self.trials[0].settings["data"]
        return settings | {"fingerprint": run.data.fingerprint(run.data.split), "size": run.data.size}

    def folder(self, trial: Trial) -> Path:
        """Where a trial lives."""
        return self.runs / "trials" / trial.key

    def job_plan(self, trial: Trial, **more: Any) -> dict[str, Any]:
        """What a job is told."""
        return {
            "key": trial.key,
            "settings": trial.settings,
            "runs_dir": str(self.runs),
            "threads": self.threads,
        } | more

    def stages(self, trial: Trial) -> list[Stage]:
        """The stages of a trial, the first first."""
        return trial.chain.stages


def make_plan(settings: Settings) -> Plan:
    """Expand, match and identify all trials of a grid.

    Raises:
        SettingError: anything that would fail later and can be known now.
    """
    check_mixer(settings.model.mixer)
    runs = Path(settings.runs_dir).absolute()
    chains = Chains(runs, Silent(), settings.launcher.processes)
    arms = expand(settings)
    for arm in arms:
        _check(arm, chains)
    arms = match_arms(arms, settings.grid.match, cost_of(settings.grid.match, arms[0].settings, runs))
    trials = _different(_trials(arms, settings.seeds, chains), bool(settings.grid.include))
    named = {trial.arm for trial in trials}
    arms = [arm for arm in arms if arm.name in named]
    threads = settings.launcher.threads_of(settings.threads)
    return Plan(arms, trials, threads, runs, trials[0].chain.refused)


def _check(arm: Arm, chains: Chains) -> None:
    """What a trial's stages say of the settings, with the arm's name before it."""
    try:
        chains.of(arm.settings)
        parameters(arm.settings)
    except SettingError as error:
        raise SettingError(f"{arm.name}: {error}") from error


def _trials(arms: list[Arm], seeds: list[int], chains: Chains) -> list[Trial]:
    """One trial an arm and seed."""
    return [_trial(arm, seed, chains.of(arm.seeded(seed))) for seed in seeds for arm in arms]


def _trial(arm: Arm, seed: int, chain: Chain) -> Trial:
    curves = tuple(f"stages/{stage.key}/metrics.jsonl" for stage in chain.flows)
    model = f"stages/{chain.model.key}/weights"
    settings = asdict(replace(arm.settings, seed=seed))
    return Trial(chain.key, arm.name, arm.values, seed, arm.baseline, settings, arm.matched, curves, model, chain)


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
