"""A decoder for phones: small, without normalisation or attention, so that it tiles and quantises well."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iris.latents.convolutions import ScaledConv2d, ZeroConv2d


class SeparableBlock(nn.Module):
    """Depthwise 3x3, pointwise to twice the width, ReLU, pointwise back, around a skip; starts as the identity.

    Depthwise-separable as in SnapGen's decoder (arXiv 2412.09619). [B, width, h, w] -> same.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = ScaledConv2d(width, width, 3, padding=1, groups=width)
        self.expand, self.project = ScaledConv2d(width, 2 * width, 1, gain=2**0.5), ZeroConv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(F.relu(self.expand(self.depthwise(x))))


class Bound(nn.Module):
    """x -> limit tanh(x / limit): latents that lie far out cannot blow up what has no normalisation."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return self.limit * torch.tanh(x / self.limit)


def phone_decoder(channels: int, bands: int, stages: int, width: int) -> nn.Sequential:
    """Latents [B, channels, h, w] -> bands [B, bands, 2^stages h, 2^stages w], laid out as TAESD's decoder.

    3 tanh(z / 3); convolution to ``width``; per stage three blocks, then nearest x2 and a convolution; one block;
    convolution to the bands. What follows, the inverse wavelet, doubles the grid once more at no cost. ``width`` is at
    most 128, hence at most 1.0 M parameters with 16 channels, 3 stages and 12 bands.

    Departures from TAESD: blocks are separable; the finest grid, where most of the time goes, has half the width; every
    ReLU lies inside a skip. Training first silences the noise of the posterior, and where a ReLU could do that (behind
    the skips, before the last convolution) it died for good.
    """
    width = min(width, 128)
    layers: list[nn.Module] = [Bound(3.0), ScaledConv2d(channels, width, 3, padding=1)]
    for stage in range(stages):
        layers += [SeparableBlock(width) for _ in range(3)]
        out = width // 2 if stage == stages - 1 else width
        layers += [nn.Upsample(scale_factor=2), ScaledConv2d(width, out, 3, padding=1)]
        width = out
    # A small gain: otherwise the posterior's noise starts as noise in the image, which training must silence first.
    layers += [SeparableBlock(width), ScaledConv2d(width, bands, 3, padding=1, gain=0.1)]
    return nn.Sequential(*layers)
