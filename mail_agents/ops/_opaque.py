"""The CPU kernels of Mamba blocks as single operations that ``torch.compile`` does not look into.

Only traced code calls them: eager code needs no dispatcher in between. Which backend runs is
decided, and recorded, at every call and not when code is traced; only ``torch`` can.
"""

from typing import Any

import torch
from torch import Tensor

from mail_agents.ops._scan_torch import Inputs, kept_states, scan_backward, scan_forward
from mail_agents.ops.backends import Candidate, choose


def tracing(x: Tensor) -> bool:
    """Whether code on CPU tensors is being traced by ``torch.compile``."""
    return torch.compiler.is_compiling() and x.device.type == "cpu"


def _torch(_: Any) -> None:
    """Stands for the ``torch`` backend, which runs here without its autograd function."""


def _check_backend(op: str, backend: str) -> None:
    def refuse(_: Any) -> str:
        return "it cannot be compiled, leave out --compile or policy.compile()"

    candidates = (
        Candidate("cuda", _torch, lambda _: "its kernels need tensors on a CUDA device"),
        Candidate("torch", _torch, lambda _: None),
        Candidate("reference", _torch, refuse),
    )
    choose(op, candidates, backend, None)


@torch.library.custom_op("mail_agents::selective_scan", mutates_args=())
def opaque_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    bias: Tensor,
    softplus: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :class:`~mail_agents.ops._scan_torch.Inputs`; the result, and what backward needs."""
    _check_backend("selective_scan", backend)
    found = scan_forward(_inputs(u, delta, A, B, C, D, z, bias, softplus))
    assert found.ungated is not None  # there is a gate
    return found.out, found.dt, found.ungated, found.kept


@torch.library.custom_op("mail_agents::selective_scan_backward", mutates_args=())
def _scan_gradients(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    bias: Tensor,
    softplus: bool,
    dt: Tensor,
    ungated: Tensor,
    kept: Tensor,
    dout: Tensor,
) -> list[Tensor]:
    inputs = _inputs(u, delta, A, B, C, D, z, bias, softplus)
    found = scan_backward(inputs, dt, ungated, kept, dout, None)[:8]
    return [gradient.contiguous() for gradient in found if gradient is not None]


@torch.library.custom_op("mail_agents::causal_conv1d", mutates_args=())
def opaque_conv(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Convolution with SiLU, and the value before the activation, both (B, L, D)."""
    from mail_agents.ops.causal_conv1d import conv_forward  # it imports this module

    _check_backend("causal_conv1d", backend)
    out, pre = conv_forward(x, weight.t().contiguous(), bias, "silu", None)
    assert pre is not None  # there is an activation
    return out, pre


@torch.library.custom_op("mail_agents::causal_conv1d_backward", mutates_args=())
def _conv_gradients(
    x: Tensor, weight: Tensor, pre: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from mail_agents.ops.causal_conv1d import conv_backward

    dx, dtaps, dbias, _ = conv_backward(x, weight.t().contiguous(), None, pre, dy)
    return dx, dtaps.t().contiguous(), dbias


def _inputs(*tensors: Any) -> Inputs:
    *dense, D, z, bias, softplus = tensors
    u, delta, A, B, C = (tensor.contiguous() for tensor in dense)
    return Inputs(u, delta, A, B, C, D, z, bias, softplus, None, None, False)


def _like(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors]


@opaque_scan.register_fake
def _(u: Any, delta: Any, A: Any, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, length, d), n = u.shape, A.shape[1]
    states = kept_states(batch, length, n * d, u.device)
    out, dt, ungated = _like(u, u, u)
    return out, dt, ungated, u.new_empty(states, batch, n, d)


@_scan_gradients.register_fake
def _(*inputs: Any) -> list[Tensor]:
    return _like(*inputs[:8])


@opaque_conv.register_fake
def _(x: Any, *_: Any) -> tuple[Tensor, Tensor]:
    out, pre = _like(x, x)
    return out, pre


@_conv_gradients.register_fake
def _(x: Any, weight: Any, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _like(x, weight, weight[:, 0])
    return dx, dweight, dbias


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:8], *output[1:])
    ctx.softplus = inputs[8]


def _scan_backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, dt, ungated, kept = ctx.saved_tensors
    arguments: list[Any] = [*tensors, ctx.softplus, dt, ungated, kept, dout]
    gradients = _scan_gradients(*arguments)
    return *gradients, None, None


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _conv_backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, pre = ctx.saved_tensors
    return *_conv_gradients(x, weight, pre, dy), None


opaque_scan.register_autograd(_scan_backward, setup_context=_scan_setup)
opaque_conv.register_autograd(_conv_backward, setup_context=_conv_setup)
