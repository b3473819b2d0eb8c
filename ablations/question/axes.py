"""A grid's points: axes and zipped axes multiplied, some conditional, some left out, other grids and single points joined."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ablations.question.settings import Grid, grids
from iris.errors import SettingError
from iris.settings import build, defaults, merged, suggestion

Point = dict[str, Any]


def points_of(grid: Grid, known: Mapping[str, Any]) -> list[Point]:
    """The points of a grid, in order and each once: {setting: value}.

    Args:
        known: every trial setting and its value, flat.

    Raises:
        SettingError: a setting that is none, a value given twice, parts that do not fit, or no point left.
    """
    _check_names(grid, known)
    found: dict[str, Point] = {}
    for point in _multiplied(grid):
        point = {key: value for key, value in point.items() if _applies(grid.when.get(key, {}), point, known)}
        if not any(_holds(condition, known | point) for condition in grid.exclude):
            found.setdefault(_name(point), point)
    for number, point in enumerate(grid.points):
        if _name(point) in found:
            raise SettingError(f"grid.points[{number}]={point} is in the grid already")
        found[_name(point)] = point
    for name in grid.include:
        for point in _included(name, known):
            found.setdefault(_name(point), point)
    if not found:
        raise SettingError(
            f"grid: no trial is left; grid.exclude={grid.exclude} leaves out all that grid.axes and grid.zip give"
        )
    return list(found.values())


def values_by_setting(points: list[Point]) -> dict[str, list[Any]]:
    """Setting -> its values in a list of points, in order and each once."""
    settings = list(dict.fromkeys(key for point in points for key in point))
    seen = {key: {json.dumps(point[key]): point[key] for point in points if key in point} for key in settings}
    return {key: list(values.values()) for key, values in seen.items()}


def _multiplied(grid: Grid) -> Iterator[Point]:
    factors = [[{key: value} for value in values] for key, values in grid.axes.items()]
    factors += [
        [dict(zip(joined, row, strict=True)) for row in zip(*joined.values(), strict=True)] for joined in grid.zip
    ]
    if not factors:
        return
    for parts in itertools.product(*factors):
        yield {key: value for part in parts for key, value in part.items()}


def _applies(condition: Mapping[str, Any], point: Point, known: Mapping[str, Any]) -> bool:
    return _holds(condition, known | point)


def _holds(condition: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether every setting of a condition has the value, or one of the list of values, that it names."""
    return all(values[key] in (wanted if isinstance(wanted, list) else [wanted]) for key, wanted in condition.items())


def _included(name: Any, known: Mapping[str, Any]) -> list[Point]:
    there = grids()
    if name not in there:
        raise SettingError(
            f"grid.include: {name} is no grid{suggestion(str(name), there)}; allowed: {', '.join(there)}"
        )
    return points_of(build(Grid, merged(Grid, defaults(Grid), there[name]["grid"])), known)


def _name(point: Point) -> str:
    return json.dumps(point, sort_keys=True)


def _check_names(grid: Grid, known: Mapping[str, Any]) -> None:
    if not (grid.axes or grid.zip or grid.points or grid.include):
        raise SettingError("grid.axes is empty; give at least one setting and its values")
    for key, values in grid.axes.items():
        _check_axis(f"grid.axes.{key}", key, values, known)
        if len({json.dumps(value) for value in values}) != len(values):
            raise SettingError(f"grid.axes.{key}={values} lists a value twice")
    taken = set(grid.axes)
    for number, joined in enumerate(grid.zip):
        where = f"grid.zip[{number}]"
        if not isinstance(joined, dict) or not joined:
            raise SettingError(f"{where}={joined!r} must map settings to lists of equal length")
        for key, values in joined.items():
            _check_axis(f"{where}.{key}", key, values, known)
        lengths = {key: len(values) for key, values in joined.items()}
        if len(set(lengths.values())) > 1:
            raise SettingError(
                f"{where}: its lists have different lengths: " + ", ".join(f"{k} {n}" for k, n in lengths.items())
            )
        if twice := taken & joined.keys():
            raise SettingError(f"{where}: {', '.join(sorted(twice))} is an axis already")
        taken |= joined.keys()
    for key in grid.when:
        if key not in taken:
            raise SettingError(f"grid.when: {key} is no axis; allowed: {', '.join(taken)}")
    for where, conditions in (("points", grid.points), ("exclude", grid.exclude), ("when", list(grid.when.values()))):
        for condition in conditions:
            _check_condition(f"grid.{where}", condition, known)


def _check_axis(where: str, key: str, values: Any, known: Mapping[str, Any]) -> None:
    _check_setting(where.rpartition(f".{key}")[0], key, known)
    if not isinstance(values, list) or not values:
        raise SettingError(f"{where}={values!r} must be a list of values")


def _check_condition(where: str, condition: Any, known: Mapping[str, Any]) -> None:
    if not isinstance(condition, dict) or not condition:
        raise SettingError(f"{where}: {condition!r} must map settings to values")
    for key in condition:
        _check_setting(where, key, known)


def _check_setting(where: str, key: str, known: Mapping[str, Any]) -> None:
    if key not in known:
        raise SettingError(
            f"{where}: {key} is not a trial setting{suggestion(key, known)}; allowed: {', '.join(known)}"
        )
