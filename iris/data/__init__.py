"""Captioned images: drawn worlds, parquet files, folders, tar shards, the hub. Importing this loads neither torch nor
``datasets``."""

from iris.data.decode import Decoded, pixels
from iris.data.opening import open_source
from iris.data.settings import KINDS, READY, SourceSettings, source_settings
from iris.data.source import Batch, Example, Source, Stream, collate
from iris.data.sources import SOURCES, WORLDS, fingerprint, load

__all__ = [
    "KINDS",
    "READY",
    "SOURCES",
    "WORLDS",
    "Batch",
    "Decoded",
    "Example",
    "Source",
    "SourceSettings",
    "Stream",
    "collate",
    "fingerprint",
    "load",
    "open_source",
    "pixels",
    "source_settings",
]
