"""Weights files: where libraries keep a judge's, whether one is the published file, and what to say when it is missing.

Nothing is downloaded. Trials run as many processes, often on machines without network, and a figure is worth as much as
its weights: so getting them is one deliberate act, which the error spells out, and every file is hashed before use.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from iris.errors import SettingError


class MissingWeights(SettingError, FileNotFoundError):
    """A judge's weights are not on this machine; the message says which file to get from where, and where to put it."""


@dataclass(frozen=True)
class Published:
    """Weights that their makers offer as a file, on the Hugging Face Hub, or both.

    Attributes:
        label: what they are, for messages.
        url: of the file.
        sha256: of that file, in full or its first digits; empty where nobody states it.
        places: where libraries keep that file.
        hub: (repository, file name) of the same weights on the Hub, the preferred one first.
    """

    label: str
    url: str = ""
    sha256: str = ""
    places: tuple[Path, ...] = ()
    hub: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class WeightsFile:
    """A file that is there, with its sha256; ``verified`` when that is the published one."""

    path: Path
    sha256: str
    verified: bool


def find(judge: str, published: Published) -> WeightsFile:
    """The published weights in the caches of the libraries that load them.

    Raises:
        MissingWeights: they are in none.
        ValueError: a cache holds a file of that name with another hash, such as half a download.
    """
    for path in (*published.places, *(hub_file(*entry) for entry in published.hub)):
        if path and path.is_file():
            return _cached(judge, path, published)
    raise MissingWeights(f"judge {judge}: {_how_to_get(published)}")


def given(judge: str, path: str | os.PathLike[str], published: Published | None = None) -> WeightsFile:
    """The file that ``judge.weights`` names. Any hash is accepted: what it is not called is for the judge to decide.

    Raises:
        MissingWeights: no such file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        hint = f", or leave it out: {_how_to_get(published)}" if published else ""
        raise MissingWeights(f"judge {judge}: judge.weights={path} is no file; set judge.weights to where it is{hint}")
    sha256 = file_sha256(path)
    return WeightsFile(path, sha256, published is not None and _is(path, sha256, published))


def file_sha256(path: Path) -> str:
    """sha256 of a file, computed once while its size and time of change stay the same."""
    path = path.resolve()
    state = path.stat()
    return _sha256(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _sha256(path: Path, changed: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive: a zip file with constants.pkl, which PyTorch's own saves do not have."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def hub_file(repository: str, name: str) -> Path | None:
    """A file of the Hugging Face Hub as its cache holds it; never asks the Hub."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name)
    return Path(found) if isinstance(found, str) else None


def _is(path: Path, sha256: str, published: Published) -> bool:
    """Whether the hash is the published one: stated by the makers, or by the Hub, which names its copies by theirs."""
    if published.sha256 and sha256.startswith(published.sha256):
        return True
    folders = {"models--" + repository.replace("/", "--") for repository, _ in published.hub}
    return path.resolve().name == sha256 and not folders.isdisjoint(path.resolve().parts)


def _cached(judge: str, path: Path, published: Published) -> WeightsFile:
    sha256 = file_sha256(path)
    blob = path.resolve().name if re.fullmatch("[0-9a-f]{64}", path.resolve().name) else ""
    wanted = blob or (published.sha256 if path in published.places else "")
    if not sha256.startswith(wanted):
        raise ValueError(
            f"judge {judge}: {path} has sha256 {sha256}, {published.label} has {wanted}: a broken "
            "download? Delete it and get it again"
        )
    return WeightsFile(path, sha256, _is(path, sha256, published))


def _how_to_get(published: Published) -> str:
    """Where the file comes from and where it belongs."""
    ways = []
    if published.url:
        places = "" if not published.places else f", put at {' or '.join(map(str, published.places))}"
        ways.append(f"{published.url}{places}")
    if published.hub:
        from huggingface_hub import constants

        ways.append(f"the Hugging Face cache {constants.HF_HUB_CACHE} by `hf download {' '.join(published.hub[0])}`")
    return (
        f"the weights of {published.label} are missing. Get them from {'; or into '.join(ways)}. "
        "Or set judge.weights to where they are"
    )
