"""Open a data source by name."""

from __future__ import annotations

from typing import Any

from iris.data.hub import open_hub
from iris.data.settings import source_settings
from iris.data.shards import Shards
from iris.data.source import Source
from iris.data.table import open_table

# Those with random access, ``iris.data.table.Table``, have a length and ``batch``; every source has ``stream``.
OPENERS = {
    "shapes": open_table,
    "shapes2": open_table,
    "parquet": open_table,
    "folder": open_table,
    "hub": open_hub,
    "tar": Shards,
}


def open_source(name: str, **settings: Any) -> Source:
    """A source of captioned images.

    Args:
        name: a kind (shapes, shapes2, parquet, folder, hub, tar) or a ready data set (``iris.data.READY``).
        settings: see ``SourceSettings``.

    Raises:
        SettingError: a setting that there is not or that cannot be used, or data that cannot be had.
    """
    chosen = source_settings(name, **settings)
    return OPENERS[chosen.name](chosen)
