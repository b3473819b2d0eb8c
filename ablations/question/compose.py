"""From the command line to checked settings, by Hydra's compose; its errors in this program's words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from iris.settings import Composer, build, plain_values

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from ablations.question.settings import Settings

CONF = Path(__file__).parents[1] / "conf"
GROUPS = ("grid", "data", "latent", "model", "train", "sample", "judge", "measure", "launcher", "scale")
COMPOSER = Composer("ablations.conf", CONF, GROUPS, "grid=mixers or train.steps=2000")

options, composed = COMPOSER.options, COMPOSER.composed


def settings_of(config: DictConfig) -> tuple[Settings, dict[str, Any]]:
    """Checked settings and the same as plain values.

    Raises:
        SettingError: see ``build``.
    """
    from ablations.question.settings import Settings  # knows every part of the model, and with them torch

    values = plain_values(config)
    return build(Settings, values), values
