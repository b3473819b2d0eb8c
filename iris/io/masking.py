"""Passwords in addresses: what is printed, logged or written shows where something is, and not how to get in."""

from __future__ import annotations

import re

# After the user's name, up to the last @ of the line: a password may hold / and @ itself.
_PASSWORD = re.compile(r"(://[^:/@\s]*:)(.*)(?=@)")
_QUERY = re.compile(
    r"([?&;][^=&;\s]*(?:pass|pwd|token|secret|key|credential|connect)[^=&;\s]*=)([^&;\s]+)", re.IGNORECASE
)


def masked(text: str) -> str:
    """``text`` with *** for the password of an address (user:password@host) and for what its query keeps secret.

    Meant for an address, or a word of a command line: of a longer line more may be masked than is secret.
    """
    return _QUERY.sub(r"\1***", _PASSWORD.sub(r"\1***", text))


def secrets(address: str) -> list[str]:
    """What ``masked`` hides of an address."""
    return [found[1] for pattern in (_PASSWORD, _QUERY) for found in pattern.findall(address) if found[1]]
