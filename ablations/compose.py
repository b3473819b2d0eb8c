"""From the command line to checked settings, by Hydra's compose; its errors in this program's words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ablations.settings import Settings, build, flatten, suggestion
from iris.errors import SettingError

CONF = Path(__file__).parent / "conf"
GROUPS = ("grid", "data", "latent", "model", "train", "sample", "judge", "measure", "launcher", "scale")


def options(group: str) -> list[str]:
    """Names that ``group=`` takes."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(overrides: list[str]) -> DictConfig:
    """The composed configuration.

    Raises:
        SettingError: a group, option, key or value that does not exist or cannot be read.
    """
    for override in overrides:
        _check_override(override)
    try:
        return _compose(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingError(_explain(error, overrides)) from error


def _compose(overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_module("ablations.conf", version_base="1.3"):
        return compose("config", overrides)


def settings_of(config: DictConfig) -> tuple[Settings, dict[str, Any]]:
    """Checked settings and the same as plain values.

    Raises:
        SettingError: see ``build``.
    """
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise SettingError(str(error).splitlines()[0]) from error
    return build(Settings, values), values


def _check_override(override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise SettingError(f"{override!r} is no setting; write key=value, such as grid=mixers or train.steps=2000")
    bare = key.lstrip("+~")
    if bare in GROUPS and value not in options(bare):
        allowed = options(bare)
        raise SettingError(f"{bare}={value!r} is unknown{suggestion(value, allowed)}; allowed: {', '.join(allowed)}")
    if key != bare:
        raise SettingError(f"{override!r}: settings are neither added nor removed; write {bare}=value")


def _explain(error: Exception, overrides: list[str]) -> str:
    """Hydra's message, with the keys that exist beside one that does not."""
    text = str(error)
    unknown = re.search(r"Could not override '([^']+)'", text)
    if not unknown:
        return f"{text.splitlines()[0]} (in: {' '.join(overrides)})"
    key = unknown.group(1)
    known = flatten(OmegaConf.to_container(_compose([]), resolve=False))
    parent = key.rpartition(".")[0]
    near = sorted({k for k in known if k.rpartition(".")[0] == parent} or {k.split(".")[0] for k in known})
    return f"{key} is not a setting{suggestion(key, known)}; allowed: {', '.join(near)}"
