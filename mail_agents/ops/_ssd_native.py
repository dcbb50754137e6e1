"""State space duality on compiled CPU kernels: ``native/ssd.cpp`` called through ctypes.

One chunk, which is how short sequences are trained; states before and after it only without
gradients, which is how policies act. Strided sequences are read in place as long as heads and
channels are contiguous; nothing but the inputs is kept for the backward pass.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mail_agents.ops._native import refuse_native, threads
from mail_agents.ops._native_call import Sequence, address, call, cotangent, sequence
from mail_agents.ops._ssd_chunks import Inputs, chunks
from mail_agents.ops._ssd_inputs import SsdInputs


class _Ssd(ctypes.Structure):
    """``struct Ssd`` of ``native/ssd.cpp``, field by field."""

    _fields_ = (
        *((n, ctypes.c_int64) for n in ("batch", "length", "heads", "head", "groups", "states")),
        *((n, Sequence) for n in ("x", "B", "C")),
        *((n, ctypes.c_void_p) for n in ("dt", "A", "D", "reset", "h0", "last", "y")),
        ("dy", Sequence),
        *((n, ctypes.c_void_p) for n in ("dx", "ddt", "dB", "dC", "dA", "dD")),
        ("threads", ctypes.c_int64),
    )


def refuse(inputs: SsdInputs) -> str | None:
    """Returns why the kernel cannot run these inputs, or None; builds the kernels if needed."""
    stateful = inputs.h0 is not None or inputs.return_state
    if stateful and torch.is_grad_enabled() and any(t.requires_grad for t in inputs.tensors()):
        return "the kernel has no gradient through states (call it under no_grad)"
    if len(chunks(inputs.x.shape[1])) > 1:
        return f"the kernel takes one chunk, a sequence of {inputs.x.shape[1]} steps is longer"
    if inputs.x.numel() == 0 or inputs.B.numel() == 0:
        return "the kernel takes no empty inputs"
    return refuse_native(*inputs.tensors())


def forward(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """The op without autograd, on float32 inputs that fit :func:`refuse`.

    Returns y (B, L, H, P) and the last state (B, H, P, N), or None unless wanted.
    """
    inputs = _ready(inputs)
    x, n = inputs.x, inputs.B.shape[3]
    y = x.new_empty(x.shape)
    last = x.new_empty(x.shape[0], *x.shape[2:], n) if inputs.want_state else None
    args = _arguments(inputs)
    args.y, args.last, args.h0 = y.data_ptr(), address(last), address(inputs.h0)
    call("ssd", "mail_ssd_forward", args)
    return y, last


def backward(inputs: Inputs, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D and h0 (None) from the cotangent of y."""
    D, inputs = inputs.D, _ready(inputs)
    x, dy = inputs.x, _dense(cotangent("ssd", dy))
    batch, _, heads, head = x.shape
    dx, ddt, dB, dC = (x.new_empty(t.shape) for t in (x, inputs.dt, inputs.B, inputs.C))
    dA, dD = x.new_empty(batch, heads), None if D is None else x.new_empty(batch, heads, head)
    args = _arguments(inputs)
    args.dy = sequence(dy)
    args.dx, args.ddt, args.dB, args.dC = (t.data_ptr() for t in (dx, ddt, dB, dC))
    args.dA, args.dD = dA.data_ptr(), address(dD)
    call("ssd", "mail_ssd_backward", args)
    if D is not None and dD is not None:
        dD = dD.sum(0) if D.dim() == 2 else dD.sum((0, 2))
    return dx, ddt, dA.sum(0), dB, dC, dD, None


class NativeDuality(torch.autograd.Function):
    """The op between step size and gate; ``apply(*Inputs)``, first-order gradients, y only."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        inputs = Inputs(*args)
        ctx.save_for_backward(*inputs[:6], inputs.reset)
        return forward(inputs)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, reset = ctx.saved_tensors
        inputs = Inputs(*tensors, h0=None, reset=reset, exact_zero=False, want_state=False)
        return *backward(inputs, dy), None, None, None


def _ready(inputs: Inputs) -> Inputs:
    """What the kernel reads in place."""
    x, B, C = (_dense(t) for t in (inputs.x, inputs.B, inputs.C))
    D, reset = inputs.D, inputs.reset
    if D is not None:
        D = (D if D.dim() == 2 else D.unsqueeze(1)).expand(x.shape[2:]).contiguous()
    reset, h0 = (None if t is None else t.contiguous() for t in (reset, inputs.h0))
    dt, A = inputs.dt.contiguous(), inputs.A.contiguous()
    return inputs._replace(x=x, dt=dt, A=A, B=B, C=C, D=D, h0=h0, reset=reset)


def _dense(x: Tensor) -> Tensor:
    """The same values with the last two axes contiguous."""
    fits = x.stride(3) == 1 and x.stride(2) == x.shape[3]
    return x if fits else x.contiguous()


def _arguments(inputs: Inputs) -> _Ssd:
    return _Ssd(
        *(*inputs.x.shape, *inputs.B.shape[2:]),
        *map(sequence, (inputs.x, inputs.B, inputs.C)),
        *map(address, (inputs.dt, inputs.A, inputs.D, inputs.reset)),
        threads=threads(),
    )
