"""The error that bad input raises."""

from __future__ import annotations

import re


class SettingError(ValueError):
    """A setting has a value that cannot be used; the message names the setting and what is allowed."""


def require_choice(setting: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise a SettingError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise SettingError(f"{setting}={value!r} is unknown; allowed: {', '.join(allowed)}")


def require_folder_name(setting: str, value: str) -> None:
    """Raise a SettingError unless ``value`` names a folder inside the one that it goes to, and no other."""
    if not re.fullmatch(r"[\w][\w .=+,@-]*", value):
        raise SettingError(
            f"{setting}={value!r} names a folder: letters, digits, blanks and _ . = + , @ - are allowed, the first a letter "
            "or a digit"
        )
