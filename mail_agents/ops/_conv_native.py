"""Causal depthwise convolution on compiled CPU kernels: ``native/conv.cpp`` called through ctypes.

Bias, filter and SiLU in one pass over strided rows, float32; nothing but the inputs is kept for the
backward pass.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mail_agents.ops._native import refuse_native, threads
from mail_agents.ops._native_call import Sequence, address, call, cotangent, rows, sequence


class _Conv(ctypes.Structure):
    """``struct Conv`` of ``native/conv.cpp``, field by field."""

    _fields_ = (
        *((n, ctypes.c_int64) for n in ("batch", "length", "channels", "width", "silu")),
        ("x", Sequence),
        *((n, ctypes.c_void_p) for n in ("weight", "bias")),
        ("history", Sequence),
        ("out", ctypes.c_void_p),
        ("dout", Sequence),
        *((n, ctypes.c_void_p) for n in ("dx", "dweight", "dbias", "dhistory")),
        ("threads", ctypes.c_int64),
    )


def refuse(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None) -> str | None:
    """Returns why the kernel cannot run these inputs, or None; builds the kernels if needed."""
    return refuse_native(x, weight, bias, history)


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, history: Tensor | None
) -> Tensor:
    """Runs the kernel on inputs that :func:`refuse` accepts; (B, L, D) in the dtype of ``x``."""
    ready = prepare(x, weight, bias, silu, history)
    known = [tensor for tensor in (x, weight, bias, history) if tensor is not None]
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in known)
    y: Any = _NativeConv.apply(*ready) if differentiable else conv_forward(*ready)
    return y.to(x.dtype)


def prepare(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, history: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, bool, Tensor | None]:
    """Float32 with contiguous channels, which is what the kernel reads."""
    shift = None if bias is None else bias.float().contiguous()
    past = None if history is None else rows(history.float())
    return rows(x.float()), weight.float().contiguous(), shift, silu, past


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, history: Tensor | None
) -> Tensor:
    """The op without autograd; float32, channels contiguous."""
    out = x.new_empty(x.shape)
    args = _arguments(x, weight, bias, silu, history)
    args.out = out.data_ptr()
    call("causal_conv1d", "mail_conv_forward", args)
    return out


def conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    history: Tensor | None,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of input, filters, bias and history."""
    dout = rows(cotangent("causal_conv1d", dout))
    dx, dweight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    dbias = None if bias is None else bias.new_empty(bias.shape)
    dhistory = None if history is None else history.new_empty(history.shape)
    args = _arguments(x, weight, bias, silu, history)
    args.dout = sequence(dout)
    args.dx, args.dweight = dx.data_ptr(), dweight.data_ptr()
    args.dbias, args.dhistory = address(dbias), address(dhistory)
    call("causal_conv1d", "mail_conv_backward", args)
    return dx, dweight, dbias, dhistory


class _NativeConv(torch.autograd.Function):
    """``apply(x, weight, bias, silu, history)``, first-order gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        silu: bool,
        history: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, history)
        ctx.silu = silu
        return conv_forward(x, weight, bias, silu, history)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, history = ctx.saved_tensors
        dx, dweight, dbias, dhistory = conv_backward(x, weight, bias, ctx.silu, history, dout)
        return dx, dweight, dbias, None, dhistory


def _arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, history: Tensor | None
) -> _Conv:
    return _Conv(
        *(*x.shape, weight.shape[1], silu, sequence(x)),
        *(address(weight), address(bias), sequence(history)),
        threads=threads(),
    )
