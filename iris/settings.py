"""Settings: declared as fields of dataclasses, composed from the words of a command line, checked, and told.

A setting is a field beside the code that reads it: its type, default, help, allowed values, whether it changes a result
or only how one is computed, and since which version it is there. The commands put these dataclasses together to trees.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import math
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, Union

import yaml

from iris.errors import SettingError

WIDE = 118  # columns of a help
FIRST = 1  # the version of settings that were there when versions began to count


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    above: bool = False,
    choices: Sequence[str] | None = None,
    result: bool = True,
    since: int = FIRST,
) -> Any:
    """A field of a settings dataclass.

    Args:
        default: a list or dict is copied for each object.
        help: a few words, for ``--help`` and ``--cfg job``.
        low, high: bounds of a number; ``above`` makes the lower one exclusive.
        choices: what a string may be.
        result: whether it changes what is computed, or only where, how fast or how watched.
        since: the version that it came with. At its default it is no part of a key, so that older keys stay.
    """
    about = {"help": help, "result": result, "since": since}
    if low is not None or high is not None:
        about |= {"low": low, "high": high, "above": above}
    if choices is not None:
        about["choices"] = tuple(choices)
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=about)
    return field(default=default, metadata=about)


def build(kind: type, values: Mapping[str, Any], where: str = "") -> Any:
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
    return kind(**{n: _value(f"{where}{n}", hints[n], values[n], fields[n].metadata) for n in fields})


def check(settings: Any, group: str) -> None:
    """Raise a SettingError unless the fields of a dataclass that was made in Python have the types and values allowed."""
    for one in dataclasses.fields(settings):
        _value(f"{group}.{one.name}", _hints(type(settings))[one.name], getattr(settings, one.name), one.metadata)


def defaults(kind: type) -> dict[str, Any]:
    """A dataclass's defaults as nested plain values; a field that holds settings has those of its own class."""
    found: dict[str, Any] = {}
    for one in dataclasses.fields(kind):
        hint = _hints(kind)[one.name]
        if dataclasses.is_dataclass(hint):
            found[one.name] = defaults(hint)
        elif one.default is not MISSING:
            found[one.name] = list(one.default) if isinstance(one.default, tuple) else one.default
        elif one.default_factory is not MISSING:
            found[one.name] = one.default_factory()
    return found


def facts(settings: Any) -> dict[str, Any]:
    """What of a settings dataclass changes a result, as plain values: what a key is made of."""
    found: dict[str, Any] = {}
    for one in dataclasses.fields(settings):
        value, about = getattr(settings, one.name), one.metadata
        if not about.get("result", True) or (about.get("since", FIRST) > FIRST and value == _default(one)):
            continue
        found[one.name] = facts(value) if dataclasses.is_dataclass(value) else value
    return found


def _default(one: dataclasses.Field) -> Any:
    return one.default_factory() if one.default_factory is not MISSING else one.default


@functools.lru_cache(maxsize=128)
def _hints(kind: type) -> dict[str, Any]:
    """Types of a dataclass's fields; kept, because a large grid builds the same settings for each of its arms."""
    return typing.get_type_hints(kind)


def suggestion(key: str, known: Iterable[str]) -> str:
    """ " (did you mean …?)" when a known word is close, else nothing."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def merged(kind: type, values: Mapping[str, Any], changes: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """``values`` of a dataclass with ``changes`` in them, group by group.

    Raises:
        SettingError: a change names what is no setting.
    """
    found = dict(values)
    for key, value in changes.items():
        if key not in found:
            raise SettingError(f"{where}{key} is not a setting{suggestion(key, found)}; allowed: {', '.join(found)}")
        hint = _hints(kind)[key]
        group = dataclasses.is_dataclass(hint) and isinstance(value, Mapping)
        found[key] = merged(hint, found[key], value, f"{where}{key}.") if group else copy.deepcopy(value)
    return found


# -- checking ---------------------------------------------------------------------------------------------------------


def _options(hint: Any) -> tuple[Any, ...]:
    """The types that a value may have."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is Union
    return typing.get_args(hint) if union else (hint,)


def _plain(hint: Any) -> Any:
    """list of list[str], tuple of tuple[int, ...]."""
    return typing.get_origin(hint) or hint


def _value(name: str, hint: Any, value: Any, about: Mapping[str, Any]) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise SettingError(f"{name}={value!r} must be a group of settings")
        return build(hint, value, f"{name}.")
    if typing.get_origin(hint) is tuple:  # of what, its own dataclass checks
        return tuple(value) if isinstance(value, list) else value
    options = tuple(_plain(one) for one in _options(hint))
    if value is None and type(None) in options:
        return None
    if float in options and isinstance(value, int) and not isinstance(value, bool) and int not in options:
        value = float(value)
    if not isinstance(value, options) or (isinstance(value, bool) and bool not in options):
        wanted = " or ".join("null" if o is type(None) else o.__name__ for o in options)
        raise SettingError(f"{name}={value!r} must be {wanted}")
    if "choices" in about and value not in about["choices"]:
        close, allowed = suggestion(str(value), about["choices"]), ", ".join(about["choices"])
        raise SettingError(f"{name}={value!r} is unknown{close}; allowed: {allowed}")
    if "low" in about and not isinstance(value, str):
        _check_bounds(name, value, about)
    return value


def _check_bounds(name: str, value: float, about: Mapping[str, Any]) -> None:
    low, high = about["low"], about["high"]
    if not math.isfinite(value):
        raise SettingError(f"{name}={value} must be a finite number")
    if low is not None and (value < low or (about["above"] and value == low)):
        raise SettingError(f"{name}={value} must be {'above' if about['above'] else 'at least'} {low}")
    if high is not None and value > high:
        raise SettingError(f"{name}={value} must be at most {high}")


# -- words ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML whose words mean what they do in YAML 1.2: "no" and "on" are texts, 1e-3 is a number."""


class _Dumper(yaml.SafeDumper):
    """Lists in one line, and in quotes what ``load_yaml`` or another reader would take for something else."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"null|~|", "n~\0"),
    ("bool", r"true|false", "tf"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
):
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
# The loader's own takes 010 for octal.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


def _list_in_a_line(dumper: yaml.Dumper, value: Sequence[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)


_Dumper.add_representer(list, _list_in_a_line)
_Dumper.add_representer(tuple, _list_in_a_line)


def load_yaml(text: str) -> Any:
    """Plain values of a YAML text, as settings files and words are written."""
    return yaml.load(text, _Loader)


def parse(hint: Any, text: str, name: str) -> Any:
    """The value that a word gives a setting of this type; a text is taken as it stands.

    Raises:
        SettingError: a list or map that cannot be read.
    """
    options = [_plain(one) for one in _options(hint)]
    if text == "null" and type(None) in options:
        return None
    if str in options:
        return text
    if dict in options or text.lstrip().startswith(("[", "{")):
        return _read(re.sub(r":(?=[\[{])", ": ", text), name)
    if list in options or tuple in options:
        return [_read(part.strip(), name) for part in text.strip("'\"").split(",")] if text else []
    value = _read(text, name)
    return text if value is None and text != "null" else value


def _read(text: str, name: str) -> Any:
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise SettingError(f"{name}={text}: it cannot be read as a list or map ({problem})") from error


@dataclass(frozen=True)
class Tree:
    """The settings of one command.

    Attributes:
        kind: the dataclass that holds them.
        groups: group -> option -> what the option sets within the group, such as ``latent=haar``.
        wide: word -> option -> what it sets over several groups, such as ``scale=smoke``; later ones win. A function, as
            some lie in files.
        chosen: word -> the option that holds where none is named.
        changes: what this command sets otherwise than the dataclasses' own defaults.
        example: what a message shows as valid settings.
    """

    kind: type
    groups: Mapping[str, Mapping[str, Mapping[str, Any]]]
    wide: Mapping[str, Callable[[], Mapping[str, Mapping[str, Any]]]] = field(default_factory=dict)
    chosen: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    example: str = "train.steps=2000"

    @property
    def words(self) -> tuple[str, ...]:
        """Names that ``name=option`` chooses for."""
        return (*self.groups, *self.wide)

    def options(self, word: str) -> list[str]:
        """What ``word=`` takes."""
        return sorted(self._options(word))

    def _options(self, word: str) -> Mapping[str, Mapping[str, Any]]:
        return self.groups[word] if word in self.groups else self.wide[word]()

    def compose(self, words: Sequence[str]) -> dict[str, Any]:
        """Nested plain values: defaults, the chosen options of the groups, those that reach over several, then each
        ``key=value``.

        Raises:
            SettingError: an option, a key or a value that does not exist or cannot be read.
        """
        pairs = [self._pair(word) for word in words]
        values = merged(self.kind, defaults(self.kind), self.changes)
        chosen = dict(self.chosen) | {key: value for key, value in pairs if key in self.words}
        for word in self.words:
            if word not in chosen:
                continue
            change = self._options(word)[self._checked(word, chosen[word])]
            values = merged(self.kind, values, {word: change} if word in self.groups else change)
        for key, text in pairs:
            if key not in self.words:
                self._set(values, key, text)
        return values

    def build(self, words: Sequence[str]) -> Any:
        """Checked settings of a command line.

        Raises:
            SettingError: as ``compose`` and ``build``.
        """
        return build(self.kind, self.compose(words))

    def _pair(self, word: str) -> tuple[str, str]:
        key, equals, value = word.partition("=")
        if not equals:
            raise SettingError(f"{word!r} is no setting; write key=value, such as {self.example}")
        bare = key.lstrip("+~")
        if key != bare:
            raise SettingError(f"{word!r}: settings are neither added nor removed; write {bare}=value")
        return key, value

    def _checked(self, word: str, option: str) -> str:
        allowed = self.options(word)
        if option not in allowed:
            close = suggestion(option, allowed)
            raise SettingError(f"{word}={option!r} is unknown{close}; allowed: {', '.join(allowed)}")
        return option

    def _set(self, values: dict[str, Any], key: str, text: str) -> None:
        """Put the value of a word in its place."""
        kind, place, path = self.kind, values, key.split(".")
        for depth, name in enumerate(path):
            hint = _hints(kind).get(name)
            if hint is None:
                raise self._unknown(values, key)
            whole = ".".join(path[: depth + 1])
            if dict in [_plain(one) for one in _options(hint)] and depth < len(path) - 1:
                return self._set_in_map(values, place[name], key, whole, text)
            if not dataclasses.is_dataclass(hint):
                if depth < len(path) - 1:
                    raise self._unknown(values, key)
                place[name] = parse(hint, text, key)
                return None
            kind, place = hint, place[name]
        raise SettingError(f"{key}={text!r} names a whole group; set one of {', '.join(f'{key}.{n}' for n in place)}")

    def _set_in_map(self, values: dict[str, Any], held: Any, key: str, whole: str, text: str) -> None:
        """One entry of a setting that holds a map, such as grid.decide.metric."""
        name = key.removeprefix(f"{whole}.")
        if isinstance(held, dict) and name in held:
            held[name] = _read(text, key)
        elif "." in name:  # the map's own keys have dots, such as those of grid.axes
            raise SettingError(
                f"{key} is not a setting by itself; allowed: {whole} as a whole, such as '{whole}={{{name}: …}}'"
            )
        else:
            raise self._unknown(values, key)

    def _unknown(self, values: dict[str, Any], key: str) -> SettingError:
        known, parent = flatten(values), key.rpartition(".")[0]
        near = sorted(k for k in known if k.rpartition(".")[0] == parent)
        if not parent or not near:  # then the groups too
            near += sorted({*self.words, *(k.partition(".")[0] for k in known)} - {*near})
        close = suggestion(key, [*known, *self.words])
        return SettingError(f"{key} is not a setting{close}; allowed: {', '.join(near)}")

    # -- telling ------------------------------------------------------------------------------------------------------

    def overview(self) -> list[str]:
        """For ``--help``: a line for each word and its options, the groups of settings, and settings in no group."""
        width = max(map(len, self.words), default=0)
        chosen = [f"  {word:{width}} {', '.join(self.options(word))}" for word in self.words]
        groups = textwrap.wrap(f"Groups that --help GROUP explains: {', '.join(self._kinds)}", WIDE)
        own = ["Settings in no group:" if groups else "Settings:", *_explained("", self.kind, self.compose([]))]
        return [*chosen, "", *groups, "", *own] if self._kinds else own

    @property
    def _kinds(self) -> dict[str, type]:
        """Group -> its dataclass."""
        return {name: hint for name, hint in _hints(self.kind).items() if dataclasses.is_dataclass(hint)}

    def explain(self, group: str) -> list[str]:
        """A line for each setting of a group: name, default, what it is, what it may be.

        Raises:
            SettingError: no such group.
        """
        kinds = self._kinds
        if group not in kinds:
            raise SettingError(f"--help {group}: no such group{suggestion(group, kinds)}; allowed: {', '.join(kinds)}")
        return list(_explained(f"{group}.", kinds[group], self.compose([])[group]))

    def dump(self, values: Mapping[str, Any]) -> str:
        """The composed settings as YAML, as ``--cfg job`` shows them."""
        return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _explained(prefix: str, kind: type, values: Mapping[str, Any]) -> Iterable[str]:
    """A line a setting; groups within a group too, but not those of the whole tree, which have a --help of their own."""
    for one in dataclasses.fields(kind):
        hint, about, name = _hints(kind)[one.name], one.metadata, f"{prefix}{one.name}"
        if dataclasses.is_dataclass(hint):
            yield from _explained(f"{name}.", hint, values[one.name]) if prefix else ()
            continue
        shown = yaml.dump(values[one.name], Dumper=_Dumper, default_flow_style=True, width=200).partition("\n")[0]
        words = [about.get("help", "")]
        words += [f"one of {', '.join(about['choices'])}"] if "choices" in about else []
        words += [_range(about)] if "low" in about else []
        words += ["changes no result"] if not about.get("result", True) else []
        yield f"  {name}={shown}".ljust(40) + "  " + "; ".join(word for word in words if word)


def _range(about: Mapping[str, Any]) -> str:
    low, high = about["low"], about["high"]
    parts = [f"{'above' if about['above'] else 'from'} {low}"] if low is not None else []
    return " ".join([*parts, *([f"to {high}"] if high is not None else [])])
