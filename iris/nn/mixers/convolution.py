"""Depthwise convolution: the cheapest local mixer, and what any global one has to beat."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from iris.nn.layers import Linear, require_divisible


class Convolution(nn.Module):
    """Linear D -> width, depthwise kernel x kernel convolution, tanh-GELU, linear back: [B, h, w, D] -> same.

    Cost per token: 2 D width + kernel^2 width multiply-accumulates. Zeros surround the grid.
    """

    kernel: int
    reach: int
    resizable = True

    def __init__(self, dim: int, width: int | None = None, heads: int = 4) -> None:
        super().__init__()
        width = dim if width is None else width
        require_divisible("model.mixer_width", width, "model.heads", heads)
        self.input, self.out = Linear(dim, width), Linear(width, dim)
        self.depthwise = Depthwise(width, self.kernel)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.input(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.out(F.gelu(y, approximate="tanh"))


class Convolution3(Convolution):
    """3 x 3."""

    kernel, reach = 3, 1


class Convolution7(Convolution):
    """7 x 7, as in ConvNeXt (arXiv 2201.03545)."""

    kernel, reach = 7, 3


class Depthwise(nn.Conv2d):
    """One kernel a channel, [B, C, h, w] -> same, drawn so that white input keeps its variance.

    torch's own draw has a third of it, which leaves the mixer's output at 0.3 of its input's standard deviation.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__(width, width, kernel, padding=kernel // 2, groups=width)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1 / self.kernel_size[0])
        nn.init.zeros_(self.bias)
