"""The Hugging Face hub: which names are its, and where a repository's files are on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from iris.errors import SettingError

SECONDS = 5.0  # to wait for the hub's first answer; its own retries take up to a minute
PIPELINE = ("config.json", "*.safetensors", "text_encoder/*", "tokenizer/*")  # files of a saved pipeline

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_hub_name(name: str | Path) -> bool:
    """Whether ``name`` could be a repository's (owner/name); paths are not."""
    return isinstance(name, str) and bool(_NAME.fullmatch(name)) and not name.startswith(".")


def no_answer(
    name: str, revision: str | None = None, token: str | bool | None = None, kind: str = "model"
) -> Exception | None:
    """Ask the hub once, briefly, for the repository ``name``; what went wrong, or None when it answered.

    Args:
        kind: model or dataset.
    """
    from huggingface_hub import HfApi

    try:
        getattr(HfApi(), f"{kind}_info")(name, revision=revision, token=token, timeout=SECONDS)
    except Exception as error:  # the client's own errors and those of whichever HTTP library it uses
        return error
    return None


def cached(name: str, files: Sequence[str]) -> Path | None:
    """The folder of the repository ``name`` in the hub's cache on disk, if one of ``files`` is there."""
    from huggingface_hub import try_to_load_from_cache

    for file in files:
        found = try_to_load_from_cache(name, file)
        if isinstance(found, str):
            return Path(found).parents[file.count("/")]
    return None


def fetch(
    name: str,
    files: Sequence[str],
    explain: Callable[[str], str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> Path:
    """The folder with the files of the repository ``name``: downloaded, or out of the hub's cache on disk.

    The hub is asked once, briefly; without an answer, or while HF_HUB_OFFLINE is set, the cache serves.

    Args:
        files: patterns of those that are wanted.
        explain: the error's message, given why there is none.
        options: cache_dir, force_download and local_files_only of ``huggingface_hub.snapshot_download``.

    Raises:
        SettingError: the repository can be had from neither.
    """
    import huggingface_hub
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE or options.get("local_files_only", False)
    problem = None if offline else no_answer(name, revision, token)
    options |= {"local_files_only": offline or problem is not None}
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, token=token, allow_patterns=list(files), **options
        )
    except Exception as error:
        why = f"the hub gave {problem or error!r}"
        why = "HF_HUB_OFFLINE or local_files_only forbids a download" if offline else why
        raise SettingError(explain(why)) from error
    return Path(folder)


def fetch_pipeline(name: str, **options: Any) -> Path:
    """``fetch`` for a saved pipeline."""
    from huggingface_hub import constants

    where = options.get("cache_dir") or constants.HF_HUB_CACHE
    explain = lambda why: f"model={name!r}: no such folder, not in the hub's cache ({where}), and {why}"  # noqa: E731
    return fetch(name, PIPELINE, explain, **options)
