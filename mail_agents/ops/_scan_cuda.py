"""Adapter to the CUDA kernels of the official ``mamba_ssm`` package.

The compiled module ``selective_scan_cuda`` is called directly: importing ``mamba_ssm`` takes
seconds and fails on machines that lack any of its Python dependencies. The call sequence is that of
``SelectiveScanFn`` in ``mamba_ssm/ops/selective_scan_interface.py``; limits are those checked in
``csrc/selective_scan/selective_scan.cpp``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mail_agents.ops._scan_inputs import ScanInputs
from mail_agents.ops.backends import SELECTIVE_SCAN_CUDA, probe

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_STATE = 256


def limits(inputs: ScanInputs) -> str | None:
    """Returns what the kernel cannot do about these inputs, or None."""
    u, n = inputs.u, inputs.A.shape[1]
    if u.dtype not in _DTYPES:
        return f"the kernel takes float32, float16 or bfloat16, not {u.dtype}"
    if n > _MAX_STATE:
        return f"the kernel takes a state size up to {_MAX_STATE}, got {n}"
    if u.numel() == 0:
        return "the kernel takes no empty sequences"
    if inputs.h0 is not None or inputs.reset is not None:
        return "the kernel takes neither an initial state nor resets"
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in inputs.tensors())
    if inputs.return_state and differentiable:
        return "the kernel has no gradient through the last state (call it under no_grad)"
    return None


def run(inputs: ScanInputs) -> tuple[Tensor, Tensor | None]:
    """Runs the kernel on inputs that :func:`limits` accepts."""
    dtype = inputs.u.dtype

    def channel_first(x: Tensor) -> Tensor:
        return x.to(dtype).transpose(1, 2).contiguous()

    def single(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.float().contiguous()

    y, last = _CudaScan.apply(  # type: ignore[misc]
        channel_first(inputs.u),
        channel_first(inputs.delta),
        single(inputs.A),
        channel_first(inputs.B).unsqueeze(1),
        channel_first(inputs.C).unsqueeze(1),
        single(inputs.D),
        None if inputs.z is None else channel_first(inputs.z),
        single(inputs.delta_bias),
        inputs.delta_softplus,
    )
    return y.transpose(1, 2), last if inputs.return_state else None


class _CudaScan(torch.autograd.Function):
    """Forward and backward entry points of the extension, channel-first, B and C (B, 1, N, L)."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
    ) -> tuple[Tensor, Tensor]:
        kernels: Any = probe(SELECTIVE_SCAN_CUDA).module
        out, x, *gated = kernels.fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        # x holds (cumulative decay, state) pairs at the end of every chunk of the kernel.
        last = x[:, :, -1, 1::2].contiguous()
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, x, None if z is None else out)
        ctx.delta_softplus = delta_softplus
        ctx.mark_non_differentiable(last)
        return gated[0] if z is not None else out, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, z, delta_bias, x, out = ctx.saved_tensors
        kernels: Any = probe(SELECTIVE_SCAN_CUDA).module
        du, ddelta, dA, dB, dC, dD, dbias, *rest = kernels.bwd(
            *(u, delta, A, B, C, D, z, delta_bias),
            dout.contiguous(),
            *(x, out, None, ctx.delta_softplus, False),
        )
        return (
            *(du, ddelta, dA, dB, dC),
            None if D is None else dD,
            None if z is None else rest[0],
            None if delta_bias is None else dbias,
            None,
        )
