"""The linear recurrence h_t = a_t h_(t-1) + b_t behind one function, with a hand-written backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import pad

from iris.errors import require_choice

CHUNK = 16

# Called with the shape of every scan; FLOP counters register here because a scan made of elementwise operations
# counts as zero in torch's own counter.
OBSERVERS: list[Callable[[torch.Size], None]] = []


def linear_scan(a: Tensor, b: Tensor) -> Tensor:
    """All states of h_t = a_t * h_(t-1) + b_t along the second axis, with h before the first token zero.

    Two levels: chunks of 16 tokens are scanned side by side, then their end states are carried across, so that N
    tokens take 16 + N / 16 steps of large elementwise operations. The backward is the same scan in reverse
    (dL/db_t = g_t + a_(t+1) dL/db_(t+1), dL/da_t = h_(t-1) dL/db_t), so autograd keeps a, h and nothing else.

    Args:
        a: decay [B, N, D].
        b: input [B, N, D].

    Returns:
        h [B, N, D].

    Raises:
        ValueError: the shapes differ, are not three-dimensional, or have no tokens.
    """
    if a.shape != b.shape or a.dim() != 3 or a.shape[1] == 0:
        raise ValueError(
            f"linear_scan: a and b must both be [B, N, D] with N >= 1, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    for observe in OBSERVERS:
        observe(a.shape)
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _LinearScan.apply(a, b)
    return _scan(a, b)


def sequential_scan(a: Tensor, b: Tensor) -> Tensor:
    """The same recurrence one token at a time through autograd: the oracle that tests and benchmarks compare with."""
    state, states = torch.zeros_like(b[:, 0]), []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
        state = torch.addcmul(b_t, a_t, state)
        states.append(state)
    return torch.stack(states, 1)


@contextmanager
def traced_as(form: str) -> Iterator[None]:
    """Inside, torch.compile and torch.export trace the scan as ``form``; eager PyTorch is not changed.

    ``chunked`` (the default) is what eager PyTorch computes, 16 + N / 16 steps; ``doubling`` takes log2 N steps, in
    a quarter of the operations but more arithmetic: for runtimes in which each operation costs, and for small graphs.

    Raises:
        SettingError: another form.
    """
    global _form
    require_choice("scan", form, tuple(TRACED))
    before, _form = _form, form
    try:
        yield
    finally:
        _form = before


def _scan(a: Tensor, b: Tensor, reverse: bool = False) -> Tensor:
    """The chunked scan without a graph; ``reverse`` runs it from the last token to the first."""
    batch, length, width = a.shape
    chunk = min(CHUNK, length)
    missing = -length % chunk
    if missing:  # a zero input behind (in scan order) the last token changes no state before it
        side = (0, 0, missing, 0) if reverse else (0, 0, 0, missing)
        a, b = pad(a, side), pad(b, side)
    chunks = (length + missing) // chunk
    a, b = a.reshape(batch, chunks, chunk, width), b.reshape(batch, chunks, chunk, width)
    two_level = TRACED[_form] if torch.compiler.is_compiling() else _two_level
    state = two_level(a, b, reverse).reshape(batch, chunks * chunk, width)
    return state[:, missing:] if reverse else state[:, :length]


def _two_level(a: Tensor, b: Tensor, reverse: bool) -> Tensor:
    """States of [B, chunks, chunk, D]: within all chunks side by side, then end states from chunk to chunk, in place."""
    inside, across = _orders(a, reverse)
    state, decay = torch.empty_like(b), torch.empty_like(a)
    previous = None
    for i in inside:
        if previous is None:
            state[:, :, i], decay[:, :, i] = b[:, :, i], a[:, :, i]
        else:
            torch.addcmul(b[:, :, i], a[:, :, i], state[:, :, previous], out=state[:, :, i])
            torch.mul(a[:, :, i], decay[:, :, previous], out=decay[:, :, i])
        previous = i
    last = previous
    previous = None
    for k in across:
        if previous is not None:
            state[:, k].addcmul_(decay[:, k], state[:, previous, last].unsqueeze(1))
        previous = k
    return state


def _two_level_traced(a: Tensor, b: Tensor, reverse: bool) -> Tensor:
    """The same without writing into tensors, which torch.compile and torch.export cannot follow."""
    inside, across = _orders(a, reverse)
    states: dict[int, Tensor] = {}
    decays: dict[int, Tensor] = {}
    previous = None
    for i in inside:
        a_i, b_i = a[:, :, i], b[:, :, i]
        states[i] = b_i if previous is None else torch.addcmul(b_i, a_i, states[previous])
        decays[i] = a_i if previous is None else a_i * decays[previous]
        previous = i
    state, decay = (torch.stack([part[i] for i in range(len(part))], 2) for part in (states, decays))
    last, previous = previous, None
    done: dict[int, Tensor] = {}
    for k in across:
        carried = None if previous is None else done[previous][:, last].unsqueeze(1)
        done[k] = state[:, k] if carried is None else torch.addcmul(state[:, k], decay[:, k], carried)
        previous = k
    return torch.stack([done[k] for k in range(len(done))], 1)


def _two_level_doubling(a: Tensor, b: Tensor, reverse: bool) -> Tensor:
    """The same by doubling (Hillis & Steele 1986): within all chunks, then over their end states."""
    if reverse:
        return _two_level_doubling(a.flip(1, 2), b.flip(1, 2), reverse=False).flip(1, 2)
    decay, state = _doubled(a, b, axis=2)
    if a.shape[1] == 1:
        return state
    _, ends = _doubled(decay[:, :, -1], state[:, :, -1], axis=1)
    return state + decay * pad(ends[:, :-1], (0, 0, 1, 0)).unsqueeze(2)


def _doubled(a: Tensor, b: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Products of all a and states of all b up to each place of ``axis``, the last but one of [..., N, D]."""
    length, shift = a.shape[axis], 1
    while shift < length:
        reached = length - shift
        b = b + a * pad(b.narrow(axis, 0, reached), (0, 0, shift, 0))
        a = a * pad(a.narrow(axis, 0, reached), (0, 0, shift, 0), value=1.0)
        shift *= 2
    return a, b


TRACED: dict[str, Callable[[Tensor, Tensor, bool], Tensor]] = {
    "chunked": _two_level_traced,
    "doubling": _two_level_doubling,
}
_form = "chunked"


def _orders(a: Tensor, reverse: bool) -> tuple[range, range]:
    """In which order tokens within a chunk, and chunks, are passed."""
    chunks, chunk = a.shape[1:3]
    if reverse:
        return range(chunk - 1, -1, -1), range(chunks - 1, -1, -1)
    return range(chunk), range(chunks)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        h = _scan(a, b)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors
        zero = torch.zeros_like(a[:, :1])
        grad_b = _scan(torch.cat([a[:, 1:], zero], 1), grad.contiguous(), reverse=True)
        return grad_b * torch.cat([zero, h[:, :-1]], 1), grad_b
