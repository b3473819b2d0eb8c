"""Mixers that note every evaluation of a training step in the folder that IRIS_TEST_NOTES names, and by which process."""

import os
from pathlib import Path

from torch import Tensor

from iris.nn.mixers.attention import Attention

FOLDER = "IRIS_TEST_NOTES"


class One(Attention):
    """Attention."""

    def forward(self, x: Tensor) -> Tensor:
        """As attention's."""
        if self.training:
            with open(Path(os.environ[FOLDER]) / type(self).__name__, "a") as notes:
                notes.write(f"{os.getpid()}\n")
        return super().forward(x)


class Two(One):
    """Attention by another name, and so another trial."""
