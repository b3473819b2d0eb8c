"""The Fourier pathway: tokens are mixed by a small network on their 2-D spectrum (AFNO, arXiv 2111.13587).

The published AFNO has a bias that is constant over frequencies, which is a spike at token (0, 0), and its inverse
transform loses half of the energy in the kx = 0 column. It is here as the form ``stock``. The others have no bias over
frequencies and an odd nonlinearity. ``phase`` and ``modrelu`` scale a coefficient by its modulus and leave its phase
alone, so that mixing commutes with cyclic shifts, and make the columns kx = 0 and Nyquist Hermitian before the inverse;
``dct`` does not wrap around the grid's edges, so that it has no such columns and commutes with no shift.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iris.nn.layers import Linear, require_divisible
from iris.nn.mixers.dft import dct2, idct2, irdft2, make_hermitian, rdft2
from iris.nn.mixers.spectral import ModReLUNetwork, PhaseNetwork, RealNetwork, SpectralNetwork, StockNetwork
from iris.settings import check, setting

NETWORKS: dict[str, type[SpectralNetwork]] = {
    "phase": PhaseNetwork,
    "modrelu": ModReLUNetwork,
    "stock": StockNetwork,
    "dct": RealNetwork,
}
FORMS = tuple(NETWORKS)


@dataclass(frozen=True)
class FourierOptions:
    """Settings fourier.*: transform and network on the spectrum, mode cut-off, soft-shrink threshold.

    form: ``phase`` (DFT, coefficients gated by their modulus), ``modrelu`` (the same with modReLU), ``stock`` (AFNO as
        published), ``dct`` (DCT-II, coefficients gated in pairs).
    modes: keep |kx| <= modes and |ky| <= modes, of the DCT the indices up to it; None keeps all. What is above becomes
        zero, not identity: only the residual connection around the mixer carries it.
    shrink: what soft-shrink takes off each modulus (``stock``: off real and imaginary part; ``dct``: coefficient).
    """

    form: str = setting("phase", "stock: AFNO as published", choices=FORMS)
    modes: int | None = setting(None, "keep |kx|, |ky| up to this; null: all", low=0)
    shrink: float = setting(0.01, "threshold of the soft-shrink", low=0)

    def __post_init__(self) -> None:
        check(self, "fourier")


class FourierPathway(nn.Module):
    """Linear D -> width, orthonormal 2-D transform, network on the spectrum, inverse: [B, h, w, D] -> [B, h, w, width].

    From transform to inverse in float32 (float64 for float64 tokens), under autocast too. AFNO adds its input to its
    output; here the block around the mixer does, for every form.
    """

    def __init__(
        self, dim: int, width: int | None = None, heads: int = 4, fourier: FourierOptions = FourierOptions()
    ) -> None:
        super().__init__()
        width = dim if width is None else width
        require_divisible("model.mixer_width", width, "model.heads", heads)
        self.form, self.modes = fourier.form, fourier.modes
        self.input = Linear(dim, width)
        self.network = NETWORKS[fourier.form](width, heads, fourier.shrink)

    def forward(self, x: Tensor) -> Tensor:
        y = self.input(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._mix(y.to(torch.promote_types(y.dtype, torch.float32))).to(y.dtype)

    def _mix(self, y: Tensor) -> Tensor:
        h, w = y.shape[1:3]
        if self.form == "dct":
            return idct2(*self.network(dct2(y, self.modes)), h, w)
        spectrum = self.network(*rdft2(y, self.modes))
        return irdft2(*(spectrum if self.form == "stock" else make_hermitian(*spectrum, w)), h, w)


class FourierMixer(nn.Module):
    """The Fourier pathway alone as a mixer, with a linear layer back to D."""

    reach = None
    resizable = True

    def __init__(
        self, dim: int, width: int | None = None, heads: int = 4, fourier: FourierOptions = FourierOptions()
    ) -> None:
        super().__init__()
        self.pathway = FourierPathway(dim, width, heads, fourier)
        self.out = Linear(dim if width is None else width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pathway(x))
