"""Networks on spectra: two block-diagonal layers around a nonlinearity, the same network for every frequency.

They take and give a spectrum [..., width] as its real parts: (real, imaginary) of a DFT, (coefficients,) of a DCT. All
but the published one have no bias and an odd nonlinearity, since what is constant over frequencies is a spike at token
(0, 0). Weights are used in the spectrum's dtype, whatever their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SpectralNetwork(nn.Module):
    """What the networks share: ``blocks`` groups of channels that do not meet, and the soft-shrink threshold.

    Subclasses define ``mix`` on [blocks, frequencies, parts * width / blocks], the parts side by side.
    """

    def __init__(self, width: int, blocks: int, shrink: float) -> None:
        super().__init__()
        self.blocks, self.block, self.shrink = blocks, width // blocks, shrink

    def forward(self, *parts: Tensor) -> tuple[Tensor, ...]:
        shape = parts[0].shape
        z = torch.cat([part.reshape(-1, self.blocks, self.block).transpose(0, 1) for part in parts], -1)
        return tuple(part.reshape(shape) for part in self.mix(z).transpose(0, 1).chunk(len(parts), -1))

    def mix(self, z: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define mix()")


class ComplexNetwork(SpectralNetwork):
    """Complex layer, ``activate``, complex layer, soft-shrink of the modulus. Where ``activate`` changes moduli alone,
    the network commutes with a turn of all phases, and so the mixer with cyclic shifts of the tokens.

    Subclasses define ``activate``, and call ``reset_parameters`` once they have their own parameters.
    """

    def __init__(self, width: int, blocks: int, shrink: float) -> None:
        super().__init__(width, blocks, shrink)
        self.first = nn.Parameter(torch.empty(2, blocks, self.block, self.block))  # real and imaginary part
        self.second = nn.Parameter(torch.empty(2, blocks, self.block, self.block))

    def reset_parameters(self) -> None:
        for weight in (self.first, self.second):  # variance 1/b for the complex product, half of it in each part
            nn.init.normal_(weight, std=(2 * weight.shape[-1]) ** -0.5)

    def mix(self, z: Tensor) -> Tensor:
        z = self.activate(torch.bmm(z, _real_form(self.first.to(z.dtype))))
        z = torch.bmm(z, _real_form(self.second.to(z.dtype)))
        return _scale(z, (1 - self.shrink / _modulus(z)).clamp(min=0))

    def activate(self, z: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define activate()")


class PhaseNetwork(ComplexNetwork):
    """z -> z sigmoid(slope |z| + offset), slope and offset per channel."""

    def __init__(self, width: int, blocks: int, shrink: float) -> None:
        super().__init__(width, blocks, shrink)
        self.slope = nn.Parameter(torch.empty(blocks, 1, self.block))
        self.offset = nn.Parameter(torch.empty(blocks, 1, self.block))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.slope)
        nn.init.zeros_(self.offset)

    def activate(self, z: Tensor) -> Tensor:
        return _gate(z, self.slope, self.offset)


class ModReLUNetwork(ComplexNetwork):
    """modReLU (arXiv 1511.06464): z -> z relu(|z| + beta) / |z|, beta per channel.

    beta = 0 would make the network linear, and one value for all channels would silence whole bands of a natural
    spectrum, whose moduli fall with frequency. So beta starts uniform in [-1, 0]: of a spectrum of unit power each
    channel drops between none and 63% of the coefficients, those below its threshold.
    """

    FLOOR = 1e-6  # |z| is sqrt(|z|^2 + FLOOR): where beta has become positive, the gain at z = 0 is at most 1000 beta

    def __init__(self, width: int, blocks: int, shrink: float) -> None:
        super().__init__(width, blocks, shrink)
        self.beta = nn.Parameter(torch.empty(blocks, 1, self.block))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.uniform_(self.beta, -1, 0)

    def activate(self, z: Tensor) -> Tensor:
        modulus = _modulus(z, self.FLOOR)
        return _scale(z, F.relu(modulus + self.beta.to(z.dtype)) / modulus)


class StockNetwork(ComplexNetwork):
    """AFNO as published (arXiv 2111.13587): biases, ReLU and soft-shrink on real and imaginary part apart.

    The biases, and the positive mean that ReLU leaves, are the spike at token (0, 0). Everything is drawn with standard
    deviation 0.02, so that the output starts at 0.02 to 0.07 of its input's.
    """

    def __init__(self, width: int, blocks: int, shrink: float) -> None:
        super().__init__(width, blocks, shrink)
        self.first_bias = nn.Parameter(torch.empty(2, blocks, self.block))
        self.second_bias = nn.Parameter(torch.empty(2, blocks, self.block))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def mix(self, z: Tensor) -> Tensor:
        z = F.relu(self._layer(z, self.first, self.first_bias))
        return F.softshrink(self._layer(z, self.second, self.second_bias), self.shrink)

    @staticmethod
    def _layer(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = torch.cat(bias.to(z.dtype).unbind(0), -1)[:, None]  # blocks, 1, 2b
        return torch.baddbmm(rows, z, _real_form(weight.to(z.dtype)))


class RealNetwork(SpectralNetwork):
    """For real coefficients: layer to twice the channels, gated in pairs by their modulus as ``PhaseNetwork`` gates
    (real, imaginary), layer back, soft-shrink. It has exactly the parameters of ``PhaseNetwork``.
    """

    def __init__(self, width: int, blocks: int, shrink: float) -> None:
        super().__init__(width, blocks, shrink)
        self.first = nn.Parameter(torch.empty(blocks, self.block, 2 * self.block))
        self.second = nn.Parameter(torch.empty(blocks, 2 * self.block, self.block))
        self.slope = nn.Parameter(torch.empty(blocks, 1, self.block))
        self.offset = nn.Parameter(torch.empty(blocks, 1, self.block))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.first, std=(2 * self.block) ** -0.5)  # a pair has the power of one input coefficient
        nn.init.normal_(self.second, std=self.block**-0.5)
        nn.init.ones_(self.slope)
        nn.init.zeros_(self.offset)

    def mix(self, z: Tensor) -> Tensor:
        z = _gate(torch.bmm(z, self.first.to(z.dtype)), self.slope, self.offset)
        return F.softshrink(torch.bmm(z, self.second.to(z.dtype)), self.shrink)


def _modulus(z: Tensor, floor: float = 1e-12) -> Tensor:
    real, imaginary = z.chunk(2, -1)
    return torch.sqrt(real * real + imaginary * imaginary + floor)


def _scale(z: Tensor, factor: Tensor) -> Tensor:
    """Multiply the real and the imaginary part by ``factor``."""
    return z * factor.repeat(1, 1, 2)


def _gate(z: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    return _scale(z, torch.sigmoid(slope.to(z.dtype) * _modulus(z) + offset.to(z.dtype)))


def _real_form(weight: Tensor) -> Tensor:
    """Complex matrices [2, blocks, b, b] as real ones [blocks, 2b, 2b] acting on (real, imaginary) rows."""
    real, imaginary = weight.unbind(0)
    return torch.cat([torch.cat([real, imaginary], -1), torch.cat([-imaginary, real], -1)], -2)
