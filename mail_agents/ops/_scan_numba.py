"""Selective scan on the CPU without a C++ compiler: numba compiles it instead.

Gu & Dao 2023 ("Mamba"), equations 2a and 4, one step after the other for a block of channels that
stays in the cache; the backward pass recomputes states from one that is kept every few steps. numba
is imported by the first call, which compiles the loops once per machine.
"""

import importlib
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mail_agents.ops._native import refuse_memory, threads
from mail_agents.ops._scan_inputs import Forward, ScanInputs

#: Below this many state updates, starting threads costs more than they save.
_WORTH_THREADS = 2**22
_LOG2E = 1.4426950408889634


def refuse(inputs: ScanInputs) -> str | None:
    """Returns why this backend cannot run these inputs, or None; does not look for numba."""
    return refuse_memory(*inputs.tensors())


def prepare(inputs: ScanInputs) -> ScanInputs:
    """Float32."""
    return inputs.to(torch.float32)


def new_kept(inputs: ScanInputs) -> Tensor:
    """Memory for the states that a backward pass needs."""
    batch, length, width = inputs.u.shape
    chunks = max(0, length - 1) // _kernels().CHUNK
    return inputs.u.new_empty(chunks, batch, inputs.A.shape[1], width)


def scan_forward(inputs: ScanInputs, kept: Tensor | None) -> Forward:
    """The op without autograd, on inputs from :func:`prepare`.

    Args:
        inputs: As :func:`prepare` returns them.
        kept: What a backward pass needs, from :func:`new_kept`; without it there is none.
    """
    kernels, u, n = _kernels(), inputs.u, inputs.A.shape[1]
    batch, length, width = u.shape
    kept = u.new_empty(0, batch, n, width) if kept is None else kept
    out, last = u.new_empty(batch, length, width), u.new_empty(batch, n, width)
    arrays, results = _arrays(inputs), (kept.numpy(), out.numpy(), last.numpy())
    _in_threads(
        lambda first, stop: kernels.forward(arrays, inputs.delta_softplus, first, stop, *results),
        *(batch, length * width * n),
    )
    return Forward(out, None, last if inputs.return_state else None)


def scan_backward(
    inputs: ScanInputs,
    _: Tensor | None,
    kept: Tensor,
    dout: Tensor | None,
    dlast: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients by input, from what the forward pass kept and the cotangents of its results.

    ``dlast`` is (B, N, D), like ``last``.
    """
    kernels, u = _kernels(), inputs.u
    (batch, length, width), n = u.shape, inputs.A.shape[1]
    arrays, empty = _arrays(inputs), u.new_empty(0)
    parts = _thread_count(batch, length * width * n)

    def like(x: Tensor | None) -> Tensor:
        return empty.view(0, 0, 0) if x is None else u.new_empty(x.shape)

    def totals(*shape: int) -> Tensor:
        return u.new_zeros(parts, *shape)

    D, z, bias, h0 = inputs.D, inputs.z, inputs.delta_bias, inputs.h0
    du, ddelta, dz, dh0 = like(u), like(u), like(z), empty.view(0, 0, 0)
    if h0 is not None:
        dh0 = u.new_empty(batch, n, width)
    dB, dC = u.new_zeros(inputs.B.shape), u.new_zeros(inputs.C.shape)
    # One copy for every thread: their sums have an order of their own, whoever comes first.
    dA = totals(n, width)
    dD, dbias = (totals(0 if x is None else width) for x in (D, bias))
    gated = u.new_zeros(u.shape) if dout is None else dout.resolve_neg().contiguous()
    carried = dh0[:0] if dlast is None else dlast.resolve_neg().contiguous()
    cotangents = kept.numpy(), gated.numpy(), carried.numpy()

    def work(first: int, stop: int) -> None:
        part = first * parts // max(1, batch)
        tensors = (du, ddelta, dA[part], dB, dC, dD[part], dz, dbias[part], dh0)
        gradients = kernels.Gradients(*(tensor.numpy() for tensor in tensors))
        kernels.backward(arrays, inputs.delta_softplus, first, stop, *cotangents, gradients)

    _in_threads(work, batch, length * width * n)
    return (
        *(du, ddelta, dA.sum(0).t(), dB, dC),
        None if D is None else dD.sum(0),
        None if z is None else dz,
        None if bias is None else dbias.sum(0),
        None,
        None if h0 is None else dh0.transpose(1, 2),
        *(None, None),
    )


def _kernels() -> Any:
    return importlib.import_module("mail_agents.ops._scan_numba_kernels")


def _arrays(inputs: ScanInputs) -> Any:
    def dense(x: Tensor | None, dims: int) -> np.ndarray:
        return np.empty((0,) * dims, np.float32) if x is None else x.detach().contiguous().numpy()

    u, delta, A, B, C, D, z, bias, _, h0, reset, _ = inputs
    rates = A.detach().t().contiguous()
    return _kernels().Arrays(
        *(dense(u, 3), dense(delta, 3), rates.numpy(), (rates * _LOG2E).numpy()),
        *(dense(B, 3), dense(C, 3), dense(D, 1), dense(z, 3), dense(bias, 1)),
        dense(None if h0 is None else h0.transpose(1, 2), 3),
        np.empty((0, 0), np.bool_) if reset is None else reset.contiguous().numpy(),
    )


def _thread_count(batch: int, size: int) -> int:
    """Threads for ``batch`` rows with ``size`` state updates each."""
    return max(1, min(threads(), batch)) if batch * size >= _WORTH_THREADS else 1


def _in_threads(work: Callable[[int, int], None], batch: int, size: int) -> None:
    """Calls ``work(first, stop)`` for equal shares of the batch."""
    count = _thread_count(batch, size)
    if count == 1:
        work(0, batch)
        return
    edges = [-(-batch * i // count) for i in range(count + 1)]
    with ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(work, *edge) for edge in itertools.pairwise(edges)]:
            done.result()
