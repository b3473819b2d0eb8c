"""A constant made once serves inference, training, export and compilation, in whichever order they come."""

import pytest
import torch
from torch import nn

from iris.nn.constants import cached_constant


class Ramp(nn.Module):
    """Multiplies by 0, 1, 2, … from a cache that starts empty."""

    def __init__(self):
        super().__init__()
        self.ramp = cached_constant(lambda length, dtype: torch.arange(length).to(dtype))

    def forward(self, x):
        return x * self.ramp(x.shape[-1], x.dtype)


def check(layer, length=3):
    x = torch.ones(2, length, requires_grad=True)
    y = layer(x)
    assert type(y) is torch.Tensor
    y.sum().backward()
    assert x.grad.tolist() == [list(range(length))] * 2


def test_made_once_a_key():
    made = []
    constant = cached_constant(lambda length: made.append(length) or torch.arange(length))
    for length in (3, 3, 4, 3):
        assert constant(length).tolist() == list(range(length))
    assert made == [3, 4]


def test_made_in_inference_mode_it_serves_training():
    layer = Ramp()
    with torch.inference_mode():
        layer(torch.ones(2, 3))
    check(layer)


@pytest.mark.parametrize("strict", [False, True])
def test_made_in_an_export_it_is_an_ordinary_tensor(strict):
    layer = Ramp()
    exported = torch.export.export(layer, (torch.ones(2, 3),), strict=strict)
    check(layer)
    check(exported.module())


def test_compilation_traces_it_for_any_size():
    layer = Ramp()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for length in (3, 4, 5):
        check(compiled, length)
    check(layer)
