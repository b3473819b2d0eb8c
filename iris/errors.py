"""The error that bad input raises."""

from __future__ import annotations


class SettingError(ValueError):
    """A setting has a value that cannot be used; the message names the setting and what is allowed."""


def require_choice(setting: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise a SettingError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise SettingError(f"{setting}={value!r} is unknown; allowed: {', '.join(allowed)}")
