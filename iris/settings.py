"""Settings of a command: Hydra composes them, dataclasses type them, and an error names the key and what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from iris.errors import SettingError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def number(low: float, high: float | None = None, above: bool = False) -> Any:
    """A numeric field with bounds; ``above`` makes the lower one exclusive."""
    return field(metadata={"low": low, "high": high, "above": above})


def one_of(*choices: str) -> Any:
    """A string field with a fixed set of values."""
    return field(metadata={"choices": choices})


def build(kind: type, values: dict[str, Any], where: str = "") -> Any:
    """A dataclass of ``kind`` from nested plain values.

    Raises:
        SettingError: an unknown or missing key, a value of the wrong type or out of range; names the key and what is
            allowed.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = _hints(kind)
    for key in values:
        if key not in fields:
            close = suggestion(str(key), fields)
            raise SettingError(f"{where}{key} is not a setting{close}; allowed: {', '.join(fields)}")
    missing = [name for name in fields if name not in values]
    if missing:
        raise SettingError(f"{where}{missing[0]} is missing")
    made = {name: _value(f"{where}{name}", hints[name], values[name], fields[name].metadata) for name in fields}
    return kind(**made)


@functools.lru_cache(maxsize=128)
def _hints(kind: type) -> dict[str, Any]:
    """Types of a dataclass's fields; kept, because a large grid builds the same settings for each of its arms."""
    return typing.get_type_hints(kind)


def suggestion(key: str, known: Iterable[str]) -> str:
    """ " (did you mean …?)" when a known word is close, else nothing."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _value(name: str, hint: Any, value: Any, bounds: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise SettingError(f"{name}={value!r} must be a group of settings")
        return build(hint, value, f"{name}.")
    if typing.get_origin(hint) is tuple:  # of what, its own dataclass checks
        return tuple(value) if isinstance(value, list) else value
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is Union
    options = typing.get_args(hint) if union else (hint,)
    if value is None and type(None) in options:
        return None
    if float in options and isinstance(value, int) and not isinstance(value, bool) and int not in options:
        value = float(value)
    if not isinstance(value, options) or (isinstance(value, bool) and bool not in options):
        wanted = " or ".join("null" if o is type(None) else o.__name__ for o in options)
        raise SettingError(f"{name}={value!r} must be {wanted}")
    if "choices" in bounds and value not in bounds["choices"]:
        close, allowed = suggestion(str(value), bounds["choices"]), ", ".join(bounds["choices"])
        raise SettingError(f"{name}={value!r} is unknown{close}; allowed: {allowed}")
    if "low" in bounds:
        _check_bounds(name, value, bounds)
    return value


def _check_bounds(name: str, value: float, bounds: Any) -> None:
    low, high = bounds["low"], bounds["high"]
    if not math.isfinite(value):
        raise SettingError(f"{name}={value} must be a finite number")
    if value < low or (bounds["above"] and value == low):
        raise SettingError(f"{name}={value} must be {'above' if bounds['above'] else 'at least'} {low}")
    if high is not None and value > high:
        raise SettingError(f"{name}={value} must be at most {high}")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def plain_values(config: DictConfig) -> dict[str, Any]:
    """A composed configuration as nested plain values.

    Raises:
        SettingError: a value that refers to what is not there.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise SettingError(str(error).splitlines()[0]) from error


def _is_map(override: str) -> bool:
    """Whether ``key=value`` gives a map, such as ``grid.axes={model.dim: [64, 96]}``."""
    return override.partition("=")[2].lstrip().startswith("{")


@dataclass(frozen=True)
class Composer:
    """From the words of a command line to a composed configuration; Hydra's errors in this program's words.

    Attributes:
        package: that holds config.yaml and a folder a group, as Python names it.
        folder: the same on disk.
        groups: of which ``group=option`` chooses a file.
        example: what a message shows as valid settings.
    """

    package: str
    folder: Path
    groups: tuple[str, ...]
    example: str

    def options(self, group: str) -> list[str]:
        """Names that ``group=`` takes."""
        return sorted(path.stem for path in (self.folder / group).glob("*.yaml"))

    def composed(self, overrides: Sequence[str]) -> DictConfig:
        """The composed configuration.

        Raises:
            SettingError: a group, option, key or value that does not exist or cannot be read.
        """
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        for override in overrides:
            self._check(override)
        try:
            return self._with_maps(
                self._compose([word for word in overrides if not _is_map(word)]),
                [word for word in overrides if _is_map(word)],
            )
        except (HydraException, OmegaConfBaseException) as error:
            raise SettingError(self._explain(error, overrides)) from error

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        from hydra import compose, initialize_config_module
        from hydra.core.global_hydra import GlobalHydra

        GlobalHydra.instance().clear()
        with initialize_config_module(self.package, version_base="1.3"):
            return compose("config", list(overrides))

    def _with_maps(self, config: DictConfig, overrides: Sequence[str]) -> DictConfig:
        """The configuration with settings whose value is a map replaced as a whole; Hydra would merge them, old keys staying."""
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from omegaconf import DictConfig, OmegaConf

        for override in OverridesParser.create().parse_overrides(list(overrides)):
            key = override.key_or_group
            if not isinstance(OmegaConf.select(config, key), DictConfig) or "." not in key:
                raise SettingError(f"{key} is no setting that holds a map, or names a whole group")
            OmegaConf.update(config, key, override.value(), merge=False)
        return config

    def _check(self, override: str) -> None:
        key, equals, value = override.partition("=")
        if not equals:
            raise SettingError(f"{override!r} is no setting; write key=value, such as {self.example}")
        bare = key.lstrip("+~")
        if bare in self.groups and value not in self.options(bare):
            allowed = self.options(bare)
            close = suggestion(value, allowed)
            raise SettingError(f"{bare}={value!r} is unknown{close}; allowed: {', '.join(allowed)}")
        if key != bare:
            raise SettingError(f"{override!r}: settings are neither added nor removed; write {bare}=value")

    def _explain(self, error: Exception, overrides: Sequence[str]) -> str:
        """Hydra's message, with the keys that exist beside one that does not."""
        from omegaconf import OmegaConf

        text = str(error)
        unknown = re.search(r"Could not override '([^']+)'", text)
        if not unknown:
            return f"{text.splitlines()[0]} (in: {' '.join(overrides)})"
        key = unknown.group(1)
        values = OmegaConf.to_container(self._compose([]), resolve=False)
        if (named := re.match(r"(\w+)\.(\w+)\.(.+\..+)", key)) and isinstance(
            values.get(named[1], {}).get(named[2]), dict
        ):
            whole = f"{named[1]}.{named[2]}"  # its own keys have dots, such as those of grid.axes
            return f"{key} is not a setting by itself; allowed: {whole} as a whole, such as '{whole}={{{named[3]}: …}}'"
        known, parent = flatten(values), key.rpartition(".")[0]
        near = sorted({k for k in known if k.rpartition(".")[0] == parent} or {k.split(".")[0] for k in known})
        return f"{key} is not a setting{suggestion(key, known)}; allowed: {', '.join(near)}"
