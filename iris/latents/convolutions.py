"""Convolutions by how they start."""

from __future__ import annotations

from torch import nn


class ZeroConv2d(nn.Conv2d):
    """A convolution that starts at zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class ScaledConv2d(nn.Conv2d):
    """A convolution that starts with normal weights of standard deviation gain / sqrt(inputs per output) and zero bias.

    The mean square of what comes out is gain^2 times that of what goes in, however the input is correlated.
    """

    def __init__(self, *sizes: int, gain: float = 1.0, **options: int) -> None:
        self.gain = gain  # first, because nn.Conv2d draws its weights
        super().__init__(*sizes, **options)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.gain * self.weight[0].numel() ** -0.5)
        nn.init.zeros_(self.bias)
