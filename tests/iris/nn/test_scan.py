"""The linear scan against a loop in float64, and its hand-written backward against autograd."""

import pytest
import torch

from iris.nn import scan
from iris.nn.scan import linear_scan, sequential_scan

# Around the chunk of 16: shorter, equal, one more, a last chunk of one, whole chunks, a prime.
LENGTHS = [1, 2, 15, 16, 17, 32, 33, 97, 256]


def draw(length, batch=2, width=3, dtype=torch.float64, seed=0):
    draws = torch.Generator().manual_seed(seed)
    a = torch.rand(batch, length, width, generator=draws, dtype=dtype)
    b = torch.randn(batch, length, width, generator=draws, dtype=dtype)
    return a, b


def loop(a, b):
    """The definition, number by number."""
    h = torch.zeros_like(b)
    for n in range(b.shape[0]):
        for d in range(b.shape[2]):
            state = 0.0
            for t in range(b.shape[1]):
                state = a[n, t, d].item() * state + b[n, t, d].item()
                h[n, t, d] = state
    return h


@pytest.mark.parametrize("length", LENGTHS)
def test_states_are_those_of_the_definition(length):
    a, b = draw(length)
    expected = loop(a, b)
    torch.testing.assert_close(linear_scan(a, b), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(sequential_scan(a, b), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(linear_scan(a.float(), b.float()), expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_gradients_are_those_of_the_sequential_scan(length):
    a, b = (x.requires_grad_() for x in draw(length))
    weights = torch.randn(a.shape, generator=torch.Generator().manual_seed(1), dtype=a.dtype)
    got = torch.autograd.grad((linear_scan(a, b) * weights).sum(), (a, b))
    expected = torch.autograd.grad((sequential_scan(a, b) * weights).sum(), (a, b))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("length", [1, 5, 16, 19])
def test_gradcheck(length):
    a, b = (x.requires_grad_() for x in draw(length, batch=1, width=2))
    assert torch.autograd.gradcheck(linear_scan, (a, b))


@pytest.mark.parametrize("which", ["a", "b"])
def test_gradient_for_one_input_alone(which):
    a, b = draw(20)
    wanted = (a if which == "a" else b).requires_grad_()
    (got,) = torch.autograd.grad(linear_scan(a, b).square().sum(), wanted)
    (expected,) = torch.autograd.grad(sequential_scan(a, b).square().sum(), wanted)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_the_graph_changes_no_value():
    a, b = draw(50, dtype=torch.float32)
    without = linear_scan(a, b)
    recorded = linear_scan(a.clone().requires_grad_(), b)
    assert recorded.requires_grad and not without.requires_grad
    assert torch.equal(recorded, without)
    with torch.no_grad():
        assert torch.equal(linear_scan(a.clone().requires_grad_(), b), without)


def test_extreme_decays():
    _, b = draw(40)
    torch.testing.assert_close(linear_scan(torch.zeros_like(b), b), b, rtol=0, atol=0)
    torch.testing.assert_close(linear_scan(torch.ones_like(b), b), b.cumsum(1), rtol=0, atol=1e-12)


def test_inputs_are_left_alone():
    a, b = draw(32)
    before = a.clone(), b.clone()
    linear_scan(a, b)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def test_a_state_sees_only_earlier_tokens():
    a, b = draw(40)
    before = linear_scan(a, b)
    b[:, 20] += 1
    changed = (linear_scan(a, b) != before).any(-1).any(0)
    assert not changed[:20].any() and changed[20]


@pytest.mark.parametrize("shapes", [((2, 4, 3), (2, 5, 3)), ((4, 3), (4, 3)), ((1, 2, 4, 3), (1, 2, 4, 3))])
def test_wrong_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match=r"\[B, N, D\]"):
        linear_scan(torch.rand(shapes[0]), torch.rand(shapes[1]))


def test_observers_see_the_shape_of_every_scan(monkeypatch):
    shapes = []
    monkeypatch.setattr(scan, "OBSERVERS", [shapes.append])
    linear_scan(*draw(7))
    a, b = draw(9)
    linear_scan(a.requires_grad_(), b).sum().backward()
    assert shapes == [(2, 7, 3), (2, 9, 3)]
