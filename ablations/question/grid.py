"""A grid's question -> arms: axes, baseline, fair swaps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

from ablations.question.axes import points_of, values_by_setting
from ablations.question.decide import EXPECTATIONS, MEASURES, SKILLS, SPEED, fraction
from ablations.question.settings import TRIAL, Settings, TrialSettings
from iris.errors import SettingError
from iris.nn.mixers import is_resizable
from iris.settings import build, flatten, suggestion

WIDEST = 1 << 16
TOLERANCE = {"params": 0.01, "flops": 0.01, "latency": 0.05}  # relative difference that `match` accepts


@dataclass(frozen=True)
class Arm:
    """One combination of axis values: the trials of all seeds share it."""

    name: str
    values: dict[str, Any]
    baseline: bool
    settings: TrialSettings  # of seed 0
    matched: str | None = None

    def seeded(self, seed: int) -> TrialSettings:
        """The settings of one trial."""
        return replace(self.settings, seed=seed)


def expand(settings: Settings) -> list[Arm]:
    """The arms of ``settings.grid``: its points (``ablations.question.axes``), the baseline first.

    Raises:
        SettingError: an axis, baseline or decision that cannot be used; names the key and what is allowed.
    """
    grid = settings.grid
    values = {name: asdict_of(getattr(settings, name)) for name in TRIAL}
    _check_seeds(settings.seeds)
    _check_decision(grid.decide)
    if grid.decide["metric"] in SPEED and not settings.measure.latency.rounds:
        raise SettingError(f"grid.decide.metric={grid.decide['metric']} needs measure.latency.rounds=2 or more, got 0")
    combinations = points_of(grid, flatten(values))
    for key in grid.baseline:
        if key not in (axes := values_by_setting(combinations)):
            raise SettingError(f"grid.baseline: {key} is not an axis; allowed: {', '.join(axes)}")
    baseline = next(
        (point for point in combinations if grid.baseline.items() <= point.items()), combinations[0] | grid.baseline
    )
    if baseline not in combinations:
        combinations.append(baseline)
    bare = len({key for point in combinations for key in point}) == 1
    arms = [
        Arm(_name(point, bare), point, point == baseline, _resolved(values, point))
        for point in sorted(combinations, key=lambda p: p != baseline)
    ]
    return _named_apart(arms)


def asdict_of(value: Any) -> Any:
    """A group of settings as plain values; a value as it is."""
    return asdict(value) if is_dataclass(value) else value


def _resolved(values: dict[str, Any], point: dict[str, Any]) -> TrialSettings:
    """Trial settings with a point's values in them."""
    resolved = copy.deepcopy(values)
    for key, value in point.items():
        *groups, name = key.split(".")
        place = resolved
        for group in groups:
            place = place[group]
        place[name] = value
    return build(TrialSettings, resolved | {"seed": 0})


def _named_apart(arms: list[Arm]) -> list[Arm]:
    """Arms whose short names are the same get the settings' whole names."""
    short = [arm.name for arm in arms]
    return [
        arm if short.count(arm.name) == 1 else replace(arm, name=" ".join(f"{k}={v}" for k, v in arm.values.items()))
        for arm in arms
    ]


def _check_seeds(seeds: list[Any]) -> None:
    if (
        not seeds
        or any(not isinstance(s, int) or isinstance(s, bool) or s < 0 for s in seeds)
        or len(set(seeds)) != len(seeds)
    ):
        raise SettingError(f"seeds={seeds} must be a list of different integers >= 0, such as [0,1,2]")


def _check_decision(decide: dict[str, Any]) -> None:
    allowed = ("metric", "better", "practical", "expect")
    for key in decide:
        if key not in allowed:
            raise SettingError(f"grid.decide.{key} is not a setting; allowed: {', '.join(allowed)}")
    if decide.get("better") not in ("lower", "higher"):
        raise SettingError(f"grid.decide.better={decide.get('better')!r} must be lower or higher")
    metric = decide.get("metric")
    if not isinstance(metric, str) or not (metric in MEASURES or metric.startswith(SKILLS)):
        raise SettingError(
            f"grid.decide.metric={metric!r} is no measure{suggestion(str(metric), MEASURES)}; allowed: {', '.join(MEASURES)}, accuracy_colour and other skills"
        )
    try:
        fraction(decide.get("practical", 0.05))
    except ValueError as error:
        raise SettingError(f"grid.{error}") from error
    for arm, word in (decide.get("expect") or {}).items():
        if word not in EXPECTATIONS:
            raise SettingError(f"grid.decide.expect.{arm}={word!r} is unknown; allowed: {', '.join(EXPECTATIONS)}")


def expectations(decide: dict[str, Any], arms: list[Arm]) -> tuple[dict[Any, str], list[str]]:
    """What the claim says of arms that are there, and the names in ``decide.expect`` that no arm of this run bears.

    The second is for a note in the report: an axis cut short on the command line leaves such names behind.
    """
    named = {arm.name for arm in arms} | {
        name for arm in arms for value in arm.values.values() for name in (value, str(value))
    }
    expect = decide.get("expect") or {}
    return {k: v for k, v in expect.items() if k in named}, [str(k) for k in expect if k not in named]


def _name(point: dict[str, Any], bare: bool) -> str:
    """An arm's name; ``bare``: the value alone, where one setting varies."""
    if bare:
        return str(next(iter(point.values())))
    return " ".join(f"{_short(key)}={value}" for key, value in point.items())


def _short(key: str) -> str:
    """The last word of a setting that says something: mixer of model.mixer, runtime of runtime.name."""
    group, _, name = key.rpartition(".")
    return group if name == "name" else name


def match_arms(arms: list[Arm], what: str, cost: Callable[[TrialSettings], float]) -> list[Arm]:
    """Resize every other arm's mixer to the baseline's parameters, FLOPs or time.

    The knob is ``model.mixer_width``, in steps of 4 * model.heads so that each mixer can use it, or finer where a mixer
    allows it and the coarse steps miss; the width that comes closest is taken.

    Args:
        arms: the baseline first.
        what: params, flops, latency or none.
        cost: trial settings -> parameters, FLOPs, or time.

    Raises:
        SettingError: no width comes within 1 % of the baseline (latency: 5 %).
    """
    if what == "none":
        return arms
    target = cost(arms[0].settings)
    return [arms[0], *(_resize(arm, what, target, cost) for arm in arms[1:])]


def _resize(arm: Arm, what: str, target: float, cost: Callable[[TrialSettings], float]) -> Arm:
    if not is_resizable(arm.settings.model.mixer):
        error = cost(arm.settings) / target - 1
        return replace(arm, matched=f"has no size to change: {error:+.2%} {what}")
    heads = arm.settings.model.heads
    width, error = _closest(arm, 4 * heads, target, cost)
    if (
        abs(error) > TOLERANCE[what] and arm.settings.model.mixer != "attention"
    ):  # whose heads must be multiples of 4 wide
        width, error = _closest(arm, math.lcm(heads, 4), target, cost)
    if abs(error) > TOLERANCE[what]:
        raise SettingError(
            f"grid.match={what}: {arm.name} comes no closer than {error:+.1%} to the baseline (mixer_width={width}); use a "
            "larger model.dim, fewer model.heads, or grid.match=none"
        )
    words = f"mixer_width {width} (model.dim {arm.settings.model.dim}): {error:+.2%} {what}"
    return replace(arm, settings=_with_width(arm.settings, width), matched=words)


def _closest(arm: Arm, step: int, target: float, cost: Callable[[TrialSettings], float]) -> tuple[int, float]:
    """The multiple of ``step`` whose cost is closest to ``target``, and its relative error."""

    def at(width: int) -> float:
        return cost(_with_width(arm.settings, width))

    high = step
    while at(high) < target and high < WIDEST:  # a mixer may take a width and not grow with it
        high *= 2
    low = high // 2 if high > step else step
    while high - low > step:  # cost grows with width: bisect on multiples of the step
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if at(middle) < target else (low, middle)
    width = min((low, high), key=lambda w: abs(at(w) - target))
    return width, at(width) / target - 1


def _with_width(settings: TrialSettings, width: int) -> TrialSettings:
    return replace(settings, model=replace(settings.model, mixer_width=width))
