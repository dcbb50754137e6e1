"""Causal depthwise convolution over time, channel-last, with interchangeable backends.

``y_t = act(bias + sum_k weight[:, W-1-k] * x_{t-k})`` with ``x`` before the first step taken from
``history`` (zero when absent): the short convolution in front of the scan of Mamba (Gu & Dao 2023,
section 3.4), the arithmetic of ``nn.Conv1d(groups=D, padding=W-1)`` cut to the input length.

Backends: ``cuda`` (official ``causal_conv1d`` package), ``torch`` (one shifted multiply-add per
tap, hand-written first-order backward, no transposed copies) and ``reference`` (``F.conv1d``).
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mail_agents.errors import InvalidInputError
from mail_agents.ops._opaque import opaque_conv, tracing
from mail_agents.ops.backends import (
    CAUSAL_CONV1D,
    Candidate,
    choose,
    probe,
    refuse_torch_func,
    refuse_without,
)

Activation = Literal["silu"] | None

#: Elements of a batch block, per thread: its buffers stay in the cache between taps.
_TILE = 2**17
_GPU_TILE = 2**40


class _ConvInputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: Activation
    history: Tensor | None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "silu",
    history: Tensor | None = None,
    return_history: bool = False,
    backend: str = "auto",
) -> Any:
    """Convolves every channel with its own causal filter.

    Args:
        x: Input, (B, L, D); any strides, for example one half of a projection.
        weight: Filters, (D, W); the last column multiplies the current step.
        bias: (D,).
        activation: ``"silu"`` or None.
        history: The W - 1 inputs before the first step, oldest first, (B, W-1, D). Differentiable.
        return_history: Whether to return the last W - 1 inputs, the ``history`` of the next call.
        backend: ``"auto"`` or a name of :data:`mail_agents.ops.backends.BACKENDS`.

    Returns:
        y (B, L, D) in the dtype of ``x``; with ``return_history`` the pair of y and the history.

    Raises:
        InvalidInputError: Shapes do not fit, the activation is unknown, or a backend named
            explicitly cannot run.
        UnknownNameError: There is no such backend.
        MissingDependencyError: A backend named explicitly is not installed.
    """
    _check(x.shape, 3, weight, bias, activation, history)
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    history = None if history is None else history.to(x.dtype)
    inputs = _ConvInputs(x, weight, bias, activation, history)
    if tracing(x) and bias is not None and activation and history is None and not return_history:
        return opaque_conv(x, weight, bias, backend)[0]
    y = choose("causal_conv1d", _CANDIDATES, backend, inputs).run(inputs)
    return (y, _next_history(x, weight.shape[1], history)) if return_history else y


def causal_conv1d_step(
    x: Tensor,
    history: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "silu",
) -> tuple[Tensor, Tensor]:
    """Advances :func:`causal_conv1d` by one step.

    Args:
        x: Input, (B, D).
        history: The W - 1 inputs before it, oldest first, (B, W-1, D); not modified.
        weight: (D, W).
        bias: (D,).
        activation: ``"silu"`` or None.

    Returns:
        y (B, D) and the new history (B, W-1, D).

    Raises:
        InvalidInputError: Shapes do not fit or the activation is unknown.
    """
    _check(x.shape, 2, weight, bias, activation, history)
    window = torch.cat((history.to(x.dtype), x.unsqueeze(1)), 1)
    y = (window * weight.to(x.dtype).t()).sum(1)
    if bias is not None:
        y = y + bias.to(x.dtype)
    return F.silu(y) if activation == "silu" else y, window[:, 1:]


def _check(
    shape: torch.Size,
    dims: int,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    history: Tensor | None,
) -> None:
    if len(shape) != dims or weight.dim() != 2 or weight.shape[0] != shape[-1]:
        raise InvalidInputError(
            f"causal_conv1d needs x ({'B, L, D' if dims == 3 else 'B, D'}) and weight (D, W), "
            f"got x {tuple(shape)} and weight {tuple(weight.shape)}. "
            "Sequences are channel-last here; Conv1d weights (D, 1, W) need .squeeze(1)."
        )
    width = weight.shape[1]
    past = (shape[0], width - 1, shape[-1])
    for name, tensor, wanted in (("bias", bias, (shape[-1],)), ("history", history, past)):
        if tensor is not None and tensor.shape != wanted:
            raise InvalidInputError(
                f"causal_conv1d: {name} has shape {tuple(tensor.shape)}, expected {wanted}."
            )
    if activation not in ("silu", None):
        raise InvalidInputError(f"causal_conv1d: activation {activation!r} is not 'silu' or None.")


def _next_history(x: Tensor, width: int, history: Tensor | None) -> Tensor:
    if history is None:
        history = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    return torch.cat((history, x), 1)[:, x.shape[1] :]


def _reference(inputs: _ConvInputs) -> Tensor:
    x, weight, bias, activation, history = inputs
    width = weight.shape[1]
    if history is None:
        history = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    padded = torch.cat((history, x), 1).transpose(1, 2)
    if x.numel() == 0:
        return x.clone()
    y = F.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[2]).transpose(1, 2)
    return F.silu(y) if activation == "silu" else y


def _torch(inputs: _ConvInputs) -> Tensor:
    return _ShiftedSum.apply(*inputs)  # type: ignore[misc, no-any-return]


def _cuda(inputs: _ConvInputs) -> Tensor:
    x, weight, bias, activation, history = inputs
    official: Any = probe(CAUSAL_CONV1D).module
    # (B, D, L) views of channel-last memory: the layout in which the kernel accepts a history.
    y = official.causal_conv1d_fn(
        x.transpose(1, 2),
        weight,
        bias,
        initial_states=None if history is None else history.contiguous().transpose(1, 2),
        activation=activation,
    )
    return y.transpose(1, 2)


def _refuse_cuda(inputs: _ConvInputs) -> str | None:
    missing = refuse_without(CAUSAL_CONV1D, inputs.x.is_cuda)
    if missing is not None:
        return missing
    x, width = inputs.x, inputs.weight.shape[1]
    if not 2 <= width <= 4:
        return f"the kernel takes filters of width 2 to 4, got {width}"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernel takes float32, float16 or bfloat16, not {x.dtype}"
    if x.numel() == 0:
        return "the kernel takes no empty sequences"
    if x.stride(2) != 1 or any(size % 8 for size in (x.shape[2], x.stride(0), x.stride(1))):
        return (
            "the kernel needs contiguous channels, and the number of channels and the strides of "
            f"batch and time divisible by 8; got shape {tuple(x.shape)} with strides {x.stride()}"
        )
    return None


_CANDIDATES = (
    Candidate("cuda", _cuda, _refuse_cuda, CAUSAL_CONV1D),
    Candidate("torch", _torch, refuse_torch_func),
    Candidate("reference", _reference, lambda _: None),
)


def _row_blocks(x: Tensor) -> list[slice]:
    tile = _TILE * torch.get_num_threads() if x.device.type == "cpu" else _GPU_TILE
    rows = max(1, tile // max(1, x.shape[1] * x.shape[2]))
    return [slice(row, row + rows) for row in range(0, x.shape[0], rows)]


class _ShiftedSum(torch.autograd.Function):
    """Sum over taps of the input shifted in time; keeps the value before the activation."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: Activation,
        history: Tensor | None,
    ) -> Tensor:
        taps = weight.t().contiguous()
        out, pre = conv_forward(x, taps, bias, activation, history)
        ctx.save_for_backward(x, taps, history, pre)
        ctx.has_bias = bias is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, history, pre = ctx.saved_tensors
        dx, dtaps, dbias, dhistory = conv_backward(x, taps, history, pre, dy)
        return dx, dtaps.t(), dbias if ctx.has_bias else None, None, dhistory


def conv_forward(
    x: Tensor, taps: Tensor, bias: Tensor | None, activation: Activation, history: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Result, and the value before the activation (None without one); ``taps`` is (W, D)."""
    batch, length, channels = x.shape
    pre = x.new_empty(batch, length, channels)
    out = torch.empty_like(pre) if activation == "silu" else pre
    for rows in _row_blocks(x):
        block, source = pre[rows], x[rows]
        if bias is None:
            torch.mul(source, taps[-1], out=block)
        else:
            torch.addcmul(bias, source, taps[-1], out=block)
        for lag in range(1, len(taps)):
            tap, head = taps[-1 - lag], min(lag, length)
            block[:, lag:].addcmul_(source[:, : length - head], tap)
            if history is not None:
                first = len(taps) - 1 - lag
                block[:, :head].addcmul_(history[rows, first : first + head], tap)
        if activation == "silu":
            torch.ops.aten.silu.out(block, out=out[rows])
    return out, pre if activation == "silu" else None


def conv_backward(
    x: Tensor, taps: Tensor, history: Tensor | None, pre: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of input, taps, bias and history."""
    batch, length, channels = x.shape
    dx = x.new_empty(batch, length, channels)
    dhistory = None if history is None else torch.zeros_like(history)
    dtaps, dbias = torch.zeros_like(taps), taps.new_zeros(channels)
    for rows in _row_blocks(x):
        source, grad = x[rows], dy[rows]
        if pre is not None:
            grad = torch.ops.aten.silu_backward(grad, pre[rows])
        dbias += grad.sum((0, 1))
        torch.mul(grad, taps[-1], out=dx[rows])
        dtaps[-1] += _channel_dot(grad, source)
        for lag in range(1, len(taps)):
            tap, head = taps[-1 - lag], min(lag, length)
            later = grad[:, lag:]
            dx[rows, : length - head].addcmul_(later, tap)
            dtaps[-1 - lag] += _channel_dot(later, source[:, : length - head])
            if history is not None and dhistory is not None:
                span = slice(len(taps) - 1 - lag, len(taps) - 1 - lag + head)
                dhistory[rows, span].addcmul_(grad[:, :head], tap)
                dtaps[-1 - lag] += _channel_dot(grad[:, :head], history[rows, span])
    return dx, dtaps, dbias, dhistory


def _channel_dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over batch and time of ``a * b``, (D,)."""
    return (a * b).sum((0, 1))
