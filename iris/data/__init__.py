"""Captioned images: drawn worlds, parquet files, folders. Importing this loads neither torch nor ``datasets``."""

from iris.data.decode import Decoded, pixels
from iris.data.sources import SOURCES, WORLDS, fingerprint, load

__all__ = ["SOURCES", "WORLDS", "Decoded", "fingerprint", "load", "pixels"]
