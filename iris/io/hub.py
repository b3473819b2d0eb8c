"""Saved pipelines on the Hugging Face hub: which names are its, and a repository's folder on this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from iris.errors import SettingError

SECONDS = 5.0  # to wait for the hub's first answer; its own retries take up to a minute
FILES = ("config.json", "*.safetensors", "text_encoder/*", "tokenizer/*")

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_hub_name(name: str | Path) -> bool:
    """Whether ``name`` could be a repository's (owner/name); paths are not."""
    return isinstance(name, str) and bool(_NAME.fullmatch(name)) and not name.startswith(".")


def no_answer(name: str, revision: str | None = None, token: str | bool | None = None) -> Exception | None:
    """Ask the hub once, briefly, for the repository ``name``; what went wrong, or None when it answered."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, revision=revision, token=token, timeout=SECONDS)
    except Exception as error:  # the client's own errors and those of whichever HTTP library it uses
        return error
    return None


def fetch(name: str, *, revision: str | None = None, token: str | bool | None = None, **options: Any) -> Path:
    """The folder with the files of the repository ``name``: downloaded, or out of the hub's cache on disk.

    The hub is asked once, briefly; without an answer, or while HF_HUB_OFFLINE is set, the cache serves.

    Args:
        options: cache_dir, force_download and local_files_only of ``huggingface_hub.snapshot_download``.

    Raises:
        SettingError: the repository can be had from neither.
    """
    import huggingface_hub
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE or options.get("local_files_only", False)
    problem = None if offline else no_answer(name, revision, token)
    offline = offline or problem is not None
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, token=token, allow_patterns=list(FILES), **options | {"local_files_only": offline}
        )
    except Exception as error:
        where = options.get("cache_dir") or constants.HF_HUB_CACHE
        why = (
            f"the hub gave {problem!r}"
            if problem is not None
            else ("HF_HUB_OFFLINE or local_files_only forbids a download" if offline else f"the hub gave {error!r}")
        )
        raise SettingError(f"model={name!r}: no such folder, not in the hub's cache ({where}), and {why}") from error
    return Path(folder)
