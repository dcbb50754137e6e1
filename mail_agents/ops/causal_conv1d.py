"""Causal depthwise convolution over time, channel-last, with interchangeable backends.

``y_t = act(bias + sum_k weight[:, W-1-k] * x_{t-k})`` with ``x`` before the first step taken from
``history`` (zero when absent): the short convolution in front of the scan of Mamba (Gu & Dao 2023,
section 3.4), the arithmetic of ``nn.Conv1d(groups=D, padding=W-1)`` cut to the input length.

Backends: ``cuda`` (official ``causal_conv1d`` package), ``native`` (CPU, not float64, compiled on
first use; computes in float32), ``torch`` (one shifted multiply-add per tap, no transposed copies)
and ``reference`` (``F.conv1d``). Gradients are of first order, those of ``reference`` of any. The
name ``numba``, by which other ops have a backend, means ``torch`` here.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mail_agents.errors import InvalidInputError
from mail_agents.ops import _conv_native
from mail_agents.ops._conv_torch import ShiftedSum
from mail_agents.ops._opaque import opaque_conv, tracing
from mail_agents.ops._precision import as_dtype
from mail_agents.ops.backends import (
    CAUSAL_CONV1D,
    Candidate,
    choose,
    note_step,
    probe,
    refuse_torch_func,
    refuse_without,
)

Activation = Literal["silu"] | None


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
    if tracing(x):
        opaque = (x, weight, bias, activation == "silu", history, backend)
        y = opaque_conv(*opaque) if x.numel() else _reference(inputs)
    else:
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

    Runs on PyTorch whatever backend is named elsewhere, and is recorded as ``torch``: a step on its
    own is too short for a kernel to pay.

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
    note_step("causal_conv1d_step")
    window = torch.cat((as_dtype(history, x.dtype), x.unsqueeze(1)), 1)
    y = (window * as_dtype(weight, x.dtype).t()).sum(1)
    if bias is not None:
        y = y.add_(as_dtype(bias, x.dtype))
    return F.silu(y) if activation == "silu" else y, window[:, 1:]


def _check(
    shape: torch.Size,
    dims: int,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    history: Tensor | None,
) -> None:
    fits = weight.dim() == 2 and weight.shape[0] == shape[-1] and weight.shape[1] > 0
    if len(shape) != dims or not fits:
        raise InvalidInputError(
            f"causal_conv1d needs x ({'B, L, D' if dims == 3 else 'B, D'}) and weight (D, W > 0), "
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
    return ShiftedSum.apply(*inputs)  # type: ignore[misc, no-any-return]


def _native(inputs: _ConvInputs) -> Tensor:
    x, weight, bias, activation, history = inputs
    return _conv_native.run(x, weight, bias, activation == "silu", history)


def _refuse_native(inputs: _ConvInputs) -> str | None:
    x, weight, bias, _, history = inputs
    return _conv_native.refuse(x, weight, bias, history)


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
    Candidate("native", _native, _refuse_native),
    Candidate("torch", _torch, refuse_torch_func, stands_in_for=("numba",)),
    Candidate("reference", _reference, lambda _: None),
)
