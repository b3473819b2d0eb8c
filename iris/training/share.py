"""A share of a step's global batch: what one process takes, or one of those that it adds up."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Share(NamedTuple):
    """Which rows of a step's global batch a call takes: index, index + of, index + 2 of, …"""

    index: int = 0
    of: int = 1

    def take(self, batch: Tensor) -> Tensor:
        """This share's rows of a tensor [global batch, …]."""
        return batch[self.index :: self.of]


WHOLE = Share()
