"""WebDataset shards: tar files in which neighbours with one name and several endings (0001.jpg, .txt, .json) are a row.

They are read from their start to their end with the standard library, and taken up again at a byte offset. Damage costs
the rows it lies in: reading goes on at the next sound header.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from iris.data.settings import SourceSettings
from iris.data.source import LOST, Raw, Source
from iris.errors import SettingError

IMAGE_ENDINGS = "jpg;jpeg;png;webp"  # what data.image_column=image stands for
TEXT_ENDINGS = "txt"  # what data.text_column=text stands for
FINGERPRINT_BYTES = 1 << 16  # bytes of each shard that the fingerprint reads
BLOCK = tarfile.BLOCKSIZE

_CHOICE = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Shards(Source):
    """The shards that data.path names.

    Raises:
        SettingError: shards are missing, compressed, or there are none.
    """

    def __init__(self, settings: SourceSettings) -> None:
        self.settings, self.buffer = settings, settings.buffer
        self.files = find(settings.path)
        self.shards = len(self.files)
        self._image = IMAGE_ENDINGS if settings.image_column == "image" else settings.image_column
        self._text = TEXT_ENDINGS if settings.text_column == "text" else settings.text_column

    def read(self, shard: int, offset: int = 0) -> Iterator[tuple[Raw, int]]:
        if offset == LOST:
            return
        path = self.files[shard]
        try:
            with open(path, "rb") as file:
                for group in _groups(file, offset):
                    yield self._row(path.name, group), group[-1].end
        except OSError as error:
            yield Raw(path.name, problem=f"shard not readable: {error.strerror or type(error).__name__}"), LOST

    def content(self) -> bytes:
        digest = hashlib.sha256()
        for path in self.files:
            with open(path, "rb") as file:
                digest.update(f"{path.name}\x1f{path.stat().st_size}\x1f".encode() + file.read(FINGERPRINT_BYTES))
        return digest.digest()

    def _row(self, shard: str, group: list[Member]) -> Raw:
        if group[0].problem:
            return Raw(shard, problem=group[0].problem)
        key, members = f"{shard}/{group[0].stem}", {member.ending: member.data for member in group}
        try:
            image, text = _value(members, self._image), _value(members, self._text)
            numbers = {name: _value(members, column) for name, column in self.settings.extra.items()}
            label = int(numbers["label"]) if "label" in numbers else None
            score = float(numbers["score"]) if numbers.get("score") is not None else None
        except (ValueError, TypeError) as error:  # not JSON, or not a number
            return Raw(key, problem=f"unreadable: {error}")
        if not isinstance(image, bytes):
            return Raw(key, problem=f"no {self._image}")
        return Raw(key, {"bytes": image, "path": None}, self._caption(text), label, score)

    def _caption(self, text: Any) -> str | None:
        """Text of a member or a field; class numbers become names."""
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        names = self.settings.labels
        if names is not None and str(text).strip().isdecimal() and int(text) < len(names):
            return names[int(text)]
        return text if text is None else str(text)


def find(pattern: str) -> list[Path]:
    """The shards a pattern names, in its order: a folder's *.tar, or braces ({000..123}, {a,b}), then * and ?.

    Raises:
        SettingError: names data.path and the first shard that is missing.
    """
    root = Path(pattern).expanduser()
    if root.is_dir():
        found = sorted(root.glob("*.tar"))
    else:
        found = []
        for name in expand(str(root)):
            some = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
            if not glob.has_magic(name) and not Path(name).is_file():
                raise SettingError(f"data.path: shard {name} is missing (of {pattern})")
            found += [Path(file) for file in some]
    if not found:
        raise SettingError(f"data.path has no tar shards: {pattern}")
    for path in found:
        if path.suffix != ".tar":
            raise SettingError(f"data.path: {path.name} must be an uncompressed .tar, to be resumed in the middle")
    return found


def expand(pattern: str) -> list[str]:
    """Brace expansion as a shell does it: a{1..3}b, a{001..120}b, a{x,y}b; of several, the last varies fastest."""
    found = _CHOICE.search(pattern)
    if found is None:
        return [pattern]
    span = _RANGE.fullmatch(found[1])
    if span:
        first, last, width = int(span[1]), int(span[2]), len(span[1]) if span[1].startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        choices = found[1].split(",")
    return [full for choice in choices for full in expand(pattern[: found.start()] + choice + pattern[found.end() :])]


class Member(NamedTuple):
    """A member file, or a damaged stretch (then ``problem`` says so); ``end`` is where reading goes on behind it."""

    name: str
    data: bytes
    end: int
    problem: str | None = None

    @property
    def stem(self) -> str:
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    @property
    def ending(self) -> str:
        return self.name.rpartition("/")[2].partition(".")[2].lower()


def _groups(file: BinaryIO, offset: int) -> Iterator[list[Member]]:
    """Neighbours of one stem; a damaged stretch is a group of its own."""
    group: list[Member] = []
    for member in _members(file, offset):
        if group and (member.problem or group[0].problem or member.stem != group[0].stem):
            yield group
            group = []
        group.append(member)
    if group:
        yield group


def _members(file: BinaryIO, offset: int) -> Iterator[Member]:
    """Files and damaged stretches from ``offset`` on, which must be where a member begins."""
    sound = offset  # everything before it has been accounted for
    for header in _headers(file, offset):
        if header.offset > sound and not _is_end(file, sound):
            yield Member("", b"", header.offset, f"damaged from byte {sound} to {header.offset}")
        file.seek(header.offset_data)
        data = file.read(header.size) if header.isfile() else b""
        if header.isfile() and len(data) < header.size:
            break
        sound = header.offset_data + (-(-header.size // BLOCK) * BLOCK if header.isfile() else 0)
        if header.isfile():
            yield Member(header.name, data, sound)
    if not _is_end(file, sound):
        yield Member("", b"", LOST, f"damaged or cut off behind byte {sound}")


def _headers(file: BinaryIO, offset: int) -> Iterator[tarfile.TarInfo]:
    """Sound headers from ``offset`` on; what lies between them is passed over."""
    file.seek(offset)
    archive = None
    while True:
        try:
            archive = archive or tarfile.open(fileobj=file, mode="r:", ignore_zeros=True)
            header = archive.next()
            archive.members = []  # tarfile keeps them all
        except (tarfile.TarError, ValueError, OverflowError):  # cut off, or a damaged extended header
            return
        if header is None:
            return
        yield header


def _is_end(file: BinaryIO, offset: int) -> bool:
    """Whether an end-of-archive mark is there: a block of zeros."""
    file.seek(offset)
    return file.read(BLOCK) == bytes(BLOCK)


def _value(members: dict[str, bytes], column: str) -> Any:
    """The first member with one of the endings "a;b", else the field of that (dotted) name in the .json, else None."""
    for ending in column.split(";"):
        if ending in members:
            return members[ending]
    value = json.loads(members["json"]) if "json" in members else {}
    for part in column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
