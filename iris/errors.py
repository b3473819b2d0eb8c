"""The error that bad input raises."""

from __future__ import annotations


class SettingError(ValueError):
    """A setting has a value that cannot be used; the message names the setting and what is allowed."""
