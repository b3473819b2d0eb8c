import math

import pytest
import torch
from torch import nn

from eval.speed.flops import count_flops
from iris.nn import scan


@torch.inference_mode()
def test_matrix_products_convolutions_and_attention():
    linear, x = nn.Linear(32, 64), torch.randn(10, 32)
    assert count_flops(lambda: linear(x)).by_op == {"addmm": 2 * 10 * 32 * 64}
    conv, image = nn.Conv2d(3, 8, 3, padding=1), torch.randn(1, 3, 16, 16)
    assert count_flops(lambda: conv(image)).total == 2 * 16 * 16 * 3 * 8 * 9
    q = torch.randn(1, 2, 64, 16)
    assert count_flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q)).total == 4 * 2 * 64 * 64 * 16


def test_real_ffts_are_no_longer_free():
    x = torch.randn(4, 16, 16)
    flops = count_flops(lambda: torch.fft.irfft2(torch.fft.rfft2(x), s=(16, 16)))
    each = 4 * 256 * 2.5 * math.log2(256)
    assert flops.by_op == {"fft_r2c": each, "fft_c2r": each}
    odd = torch.randn(2, 15)
    assert count_flops(lambda: torch.fft.irfft(torch.fft.rfft(odd), n=15)).total == 2 * int(30 * 2.5 * math.log2(15))
    assert count_flops(lambda: torch.fft.fft(odd.to(torch.complex64))).by_op["fft_c2c"] == int(30 * 5 * math.log2(15))


def test_scans_are_no_longer_free_and_observers_leave():
    a = torch.rand(2, 20, 8)
    flops = count_flops(lambda: scan.linear_scan(a, a))
    assert flops.by_op == {"linear_scan": 3 * 2 * 20 * 8}
    with pytest.raises(RuntimeError, match="broken"):
        count_flops(lambda: (_ for _ in ()).throw(RuntimeError("broken")))
    assert not scan.OBSERVERS


@torch.inference_mode()
def test_uncounted_operations_are_told_by_bytes():
    x = torch.randn(8, 16)
    flops = count_flops(lambda: nn.functional.gelu(x).view(4, 32).t() + 1)
    assert flops.total == 0 and flops.gflops == 0
    assert flops.uncounted == {"gelu": 512, "add": 512}
