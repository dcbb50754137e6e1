"""Selective scan on compiled CPU kernels: ``native/scan.cpp`` called through ctypes.

One pass does everything from step size to gate, in float32. Strided sequences are read in place as
long as channels are contiguous. Only when gradients are needed, ungated outputs and the state
before every chunk of time are kept; the backward pass computes the rest again.
"""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from mail_agents.ops._native import refuse_native, threads
from mail_agents.ops._native_call import (
    Sequence,
    address,
    call,
    cotangent,
    library,
    rows,
    sequence,
)
from mail_agents.ops._scan_inputs import Forward, ScanInputs

#: Steps between kept states, as in the kernel.
CHUNK = 32


class _State(ctypes.Structure):
    """A (B, D, N) tensor with any strides, or null."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("channel_stride", ctypes.c_int64),
        ("state_stride", ctypes.c_int64),
    )


class _Scan(ctypes.Structure):
    """``struct Scan`` of ``native/scan.cpp``, field by field."""

    _fields_ = (
        *((n, ctypes.c_int64) for n in ("batch", "length", "channels", "states", "softplus")),
        *((n, Sequence) for n in ("u", "delta", "z", "B", "C")),
        *((n, ctypes.c_void_p) for n in ("A", "D", "bias")),
        ("h0", _State),
        *((n, ctypes.c_void_p) for n in ("reset", "out", "ungated", "last", "kept")),
        ("dout", Sequence),
        ("dlast", _State),
        ("parts", ctypes.c_int64),
        *((n, ctypes.c_void_p) for n in ("du", "ddelta", "dz", "dA", "dB", "dC", "dD", "dbias")),
        ("dh0", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    )


def refuse(inputs: ScanInputs) -> str | None:
    """Returns why the kernel cannot run these inputs, or None; builds the kernels if needed."""
    return refuse_native(*inputs.tensors())


def prepare(inputs: ScanInputs) -> ScanInputs:
    """Float32 with contiguous channels, which is what the kernel reads."""

    def strided(x: Any) -> Any:
        return None if x is None else rows(x.float())

    def dense(x: Any) -> Any:
        return None if x is None else x.float().contiguous()

    return ScanInputs(
        *(strided(inputs.u), strided(inputs.delta), dense(inputs.A)),
        *(strided(inputs.B), strided(inputs.C), dense(inputs.D), strided(inputs.z)),
        *(dense(inputs.delta_bias), inputs.delta_softplus),
        None if inputs.h0 is None else inputs.h0.float(),
        None if inputs.reset is None else inputs.reset.contiguous(),
        inputs.return_state,
    )


def kept_states(length: int) -> int:
    """Number of states that a backward pass needs, besides the first one."""
    return max(0, (length - 1) // CHUNK)


def new_kept(inputs: ScanInputs) -> Tensor:
    """Memory for these states, (:func:`kept_states`, B, N, D)."""
    batch, length, d = inputs.u.shape
    return inputs.u.new_empty(kept_states(length), batch, inputs.A.shape[1], d)


def scan_forward(inputs: ScanInputs, kept: Tensor | None) -> Forward:
    """The op without autograd, on inputs from :func:`prepare`.

    Args:
        inputs: As :func:`prepare` returns them.
        kept: What a backward pass needs, from :func:`new_kept`; without it there is none.
    """
    u, n = inputs.u, inputs.A.shape[1]
    out = u.new_empty(u.shape)
    ungated = None if kept is None or inputs.z is None else torch.empty_like(out)
    last = u.new_empty(len(u), n, u.shape[2]) if inputs.return_state else None
    args = _arguments(inputs)
    args.out, args.ungated = address(out), address(ungated)
    args.last, args.kept = address(last), address(kept)
    call("selective_scan", "mail_scan_forward", args)
    return Forward(out, ungated, last)


def scan_backward(
    inputs: ScanInputs,
    ungated: Tensor | None,
    kept: Tensor,
    dout: Tensor | None,
    dlast: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients by input, from what the forward pass kept and the cotangents of its results.

    ``dlast`` is (B, N, D), like ``last``.
    """
    u, A = inputs.u, inputs.A
    (batch, length, d), n = u.shape, A.shape[1]
    blocks = math.ceil(d / library().mail_scan_width())
    # Channels are split as well where there are too few sequences to keep all threads busy.
    team = threads()
    parts = 1 if team == 1 else max(1, min(blocks, math.ceil(2 * team / max(1, batch))))
    du, ddelta = u.new_empty(batch, length, d), u.new_empty(batch, length, d)
    dB, dC = u.new_empty(parts, batch, length, n), u.new_empty(parts, batch, length, n)
    dA = A.new_empty(n, d)
    dD, dbias = (None if x is None else x.new_empty(d) for x in (inputs.D, inputs.delta_bias))
    dz = None if inputs.z is None else torch.empty_like(du)
    dh0 = None if inputs.h0 is None else u.new_empty(batch, n, d)
    dout = None if dout is None else rows(cotangent("selective_scan", dout))
    args = _arguments(inputs)
    args.ungated, args.kept, args.parts = address(ungated), address(kept), parts
    args.dout = sequence(dout)
    if dlast is not None:
        dlast = cotangent("selective_scan", dlast)
        args.dlast = _state_of(dlast.transpose(1, 2))
    args.du, args.ddelta, args.dz = address(du), address(ddelta), address(dz)
    args.dA, args.dB, args.dC = address(dA), address(dB), address(dC)
    args.dD, args.dbias, args.dh0 = address(dD), address(dbias), address(dh0)
    call("selective_scan", "mail_scan_backward", args)
    dB, dC = (x[0] if parts == 1 else x.sum(0) for x in (dB, dC))
    dh0 = None if dh0 is None else dh0.transpose(1, 2)
    return du, ddelta, dA.t(), dB, dC, dD, dz, dbias, None, dh0, None, None


def _arguments(inputs: ScanInputs) -> _Scan:
    batch, length, d = inputs.u.shape
    return _Scan(
        *(batch, length, d, inputs.A.shape[1], inputs.delta_softplus),
        *map(sequence, (inputs.u, inputs.delta, inputs.z, inputs.B, inputs.C)),
        *map(address, (inputs.A, inputs.D, inputs.delta_bias)),
        *(_state_of(inputs.h0), address(inputs.reset)),
        threads=threads(),
    )


def _state_of(x: Tensor | None) -> _State:
    return _State() if x is None else _State(x.data_ptr(), *x.stride())
