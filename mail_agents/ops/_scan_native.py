"""Selective scan on compiled CPU kernels: ``native/scan.cpp`` called through ctypes.

One pass does everything from step size to gate, in float32. Strided sequences are read in place as
long as channels are contiguous. Only when gradients are needed, ungated outputs and the state
before every chunk of time are kept; the backward pass computes the rest again.
"""

import ctypes
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mail_agents.ops._native import load, refuse_native, threads
from mail_agents.ops._scan_inputs import ScanInputs

_MAX_STATE = 256


class _Sequence(ctypes.Structure):
    """A (B, L, channels) tensor with contiguous channels, or null."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("time_stride", ctypes.c_int64),
    )


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
        *((n, _Sequence) for n in ("u", "delta", "z", "B", "C")),
        *((n, ctypes.c_void_p) for n in ("A", "D", "bias")),
        ("h0", _State),
        *((n, ctypes.c_void_p) for n in ("reset", "out", "ungated", "last", "kept")),
        ("dout", _Sequence),
        ("dlast", _State),
        ("parts", ctypes.c_int64),
        *((n, ctypes.c_void_p) for n in ("du", "ddelta", "dz", "dA", "dB", "dC", "dD", "dbias")),
        ("dh0", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    )


class _Inputs(NamedTuple):
    """Arguments of the kernel: float32, sequences with contiguous channels, ``reset`` bool."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    softplus: bool
    h0: Tensor | None
    reset: Tensor | None
    want_state: bool


class Kept(NamedTuple):
    """Results of the forward pass: what the op returns, and what its backward pass needs.

    ``out`` and ``ungated`` (None without a gate) are (B, L, D), ``last`` (None unless wanted) is
    (B, N, D) and ``kept``, one state per chunk of time but the last, (chunks - 1, B, N, D).
    """

    out: Tensor
    ungated: Tensor | None
    last: Tensor | None
    kept: Tensor | None


def refuse(inputs: ScanInputs) -> str | None:
    """Returns why the kernel cannot run these inputs, or None; builds the kernels if needed."""
    if inputs.A.shape[1] > _MAX_STATE:
        return f"the kernel takes a state size up to {_MAX_STATE}, got {inputs.A.shape[1]}"
    return refuse_native(*inputs.tensors())


def run(inputs: ScanInputs) -> tuple[Tensor, Tensor | None]:
    """Runs the kernel on inputs that :func:`refuse` accepts."""
    u, delta, B, C, z = map(_sequence, (inputs.u, inputs.delta, inputs.B, inputs.C, inputs.z))
    A, D, bias = map(_dense, (inputs.A, inputs.D, inputs.delta_bias))
    h0 = None if inputs.h0 is None else inputs.h0.float()
    reset = None if inputs.reset is None else inputs.reset.contiguous()
    assert u is not None and delta is not None and A is not None  # what is given stays given
    assert B is not None and C is not None
    native = _Inputs(
        *(u, delta, A, B, C, D, z, bias, inputs.delta_softplus, h0, reset, inputs.return_state)
    )
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs.tensors()):
        y, last = _NativeScan.apply(*native)  # type: ignore[misc]
    else:
        found = scan_forward(native, keep=False)
        y, last = found.out, found.last
    return y.to(inputs.u.dtype), None if last is None else last.transpose(1, 2)


def kept_states(length: int) -> int:
    """Number of states that :func:`scan_forward` keeps of a sequence."""
    return max(0, math.ceil(length / _library().mail_scan_chunk()) - 1)


def scan_forward(inputs: _Inputs, keep: bool) -> Kept:
    """The op without autograd; ``keep`` says whether a backward pass may follow."""
    u, A = inputs.u, inputs.A
    (batch, length, d), n = u.shape, A.shape[1]
    out = u.new_empty(batch, length, d)
    ungated = torch.empty_like(out) if keep and inputs.z is not None else None
    last = u.new_empty(batch, n, d) if inputs.want_state else None
    kept = u.new_empty(kept_states(length), batch, n, d) if keep else None
    args = _arguments(inputs)
    args.out, args.ungated = _pointer(out), _pointer(ungated)
    args.last, args.kept = _pointer(last), _pointer(kept)
    _call("mail_scan_forward", args)
    return Kept(out, ungated, last, kept)


def scan_backward(
    inputs: _Inputs,
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
    blocks = math.ceil(d / _library().mail_scan_width())
    # Channels are split as well where there are too few sequences to keep all threads busy.
    team = threads()
    parts = 1 if team == 1 else max(1, min(blocks, math.ceil(2 * team / max(1, batch))))
    du, ddelta = u.new_empty(batch, length, d), u.new_empty(batch, length, d)
    dB, dC = u.new_empty(parts, batch, length, n), u.new_empty(parts, batch, length, n)
    dA = A.new_empty(n, d)
    dD, dbias = (None if x is None else x.new_empty(d) for x in (inputs.D, inputs.bias))
    dz = None if inputs.z is None else torch.empty_like(du)
    dh0 = None if inputs.h0 is None else u.new_empty(batch, n, d)
    dout = _sequence(dout)
    args = _arguments(inputs)
    args.ungated, args.kept, args.parts = _pointer(ungated), _pointer(kept), parts
    args.dout = _sequence_of(dout)
    if dlast is not None:
        args.dlast = _state_of(dlast.transpose(1, 2))
    args.du, args.ddelta, args.dz = _pointer(du), _pointer(ddelta), _pointer(dz)
    args.dA, args.dB, args.dC = _pointer(dA), _pointer(dB), _pointer(dC)
    args.dD, args.dbias, args.dh0 = _pointer(dD), _pointer(dbias), _pointer(dh0)
    _call("mail_scan_backward", args)
    dB, dC = (x[0] if parts == 1 else x.sum(0) for x in (dB, dC))
    dh0 = None if dh0 is None else dh0.transpose(1, 2)
    return du, ddelta, dA.t(), dB, dC, dD, dz, dbias, None, dh0, None, None


class _NativeScan(torch.autograd.Function):
    """The whole op; ``apply(*_Inputs)``, first-order gradients, last state (B, N, D)."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None]:
        inputs = _Inputs(*args)
        found = scan_forward(inputs, keep=True)
        tensors = [value if isinstance(value, Tensor) else None for value in inputs]
        ctx.save_for_backward(*tensors, found.ungated, found.kept)
        ctx.flags = inputs.softplus, inputs.want_state
        ctx.set_materialize_grads(False)
        return found.out, found.last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, ungated, kept = ctx.saved_tensors
        softplus, want_state = ctx.flags
        inputs = _Inputs(*tensors)._replace(softplus=softplus, want_state=want_state)
        return scan_backward(inputs, ungated, kept, dout, dlast)


def _library() -> Any:
    library = load().library
    assert library is not None  # refuse() said so
    return library


def _call(name: str, args: _Scan) -> None:
    if getattr(_library(), name)(ctypes.byref(args)):
        raise MemoryError("selective_scan: no memory for the scratch space of the native kernel")


def _arguments(inputs: _Inputs) -> _Scan:
    batch, length, d = inputs.u.shape
    return _Scan(
        *(batch, length, d, inputs.A.shape[1], inputs.softplus),
        *map(_sequence_of, (inputs.u, inputs.delta, inputs.z, inputs.B, inputs.C)),
        *map(_pointer, (inputs.A, inputs.D, inputs.bias)),
        *(_state_of(inputs.h0), _pointer(inputs.reset)),
        threads=threads(),
    )


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _sequence_of(x: Tensor | None) -> _Sequence:
    return _Sequence() if x is None else _Sequence(x.data_ptr(), x.stride(0), x.stride(1))


def _state_of(x: Tensor | None) -> _State:
    return _State() if x is None else _State(x.data_ptr(), *x.stride())


def _sequence(x: Tensor | None) -> Tensor | None:
    """Float32 with contiguous channels."""
    if x is None:
        return None
    x = x.float()
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()
