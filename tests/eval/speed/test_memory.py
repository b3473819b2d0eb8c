import gc

import numpy as np
import pytest
import torch
from torch import nn

from eval.speed.memory import measure_memory
from eval.speed.probes import ActivationTracker, processor_seconds, resident_mb
from eval.speed.workers import Loader


def test_a_known_allocation_is_seen_and_the_parents_is_not():
    bloat = np.ones(400_000_000, dtype=np.uint8)
    parent = resident_mb("VmHWM")
    result = measure_memory(Loader("measured_models:allocating", 200))
    del bloat
    assert result.peak_memory_mb - result.loaded_mb == pytest.approx(200, rel=0.05)
    assert result.activations_mb == pytest.approx(200, rel=1e-6)
    assert result.weights_mb is None and result.device == "cpu"
    assert result.import_mb <= result.loaded_mb < result.import_mb + 50
    # a process's ru_maxrss starts from the peak of the one that started it
    assert result.peak_memory_mb < parent


@torch.inference_mode()
def test_live_tensors_are_counted_exactly():
    weights, x = nn.Linear(100, 100, bias=False), torch.randn(100, 100)
    size = 40_000
    with ActivationTracker() as tracker:
        a = weights(x)  # 1 alive
        b = a.view(10, 1000).t()  # a view
        c = b + 1  # 2
        del a, b  # 1
        d, e = c * 2, c * 3  # 3
        d.add_(1)  # in place
        weights.weight.t() * 1  # 4, dropped at once
        x.mul_(2)  # not ours
    assert tracker.peak == 4 * size and tracker.live == 3 * size
    del c, d, e
    gc.collect()
    assert tracker.live == 0


def test_activations_kept_for_the_backward_are_alive():
    x = torch.randn(1000, requires_grad=True)
    with ActivationTracker() as tracker:
        y = x.exp().exp().exp()
    assert tracker.live == 3 * 4000
    del y
    assert tracker.live == 0


def test_probes_without_a_process():
    assert processor_seconds(2**31 - 1) == 0.0
    assert resident_mb("NoSuchField") is None
