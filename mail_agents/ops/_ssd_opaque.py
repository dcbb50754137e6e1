"""State space duality on CPU as one operation that ``torch.compile`` does not look into.

Only traced code calls it. Which backend runs is decided, and recorded, at every call and not when
code is traced; ``native`` and ``torch`` can.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from mail_agents.ops import _ssd_native
from mail_agents.ops._opaque import chosen, keep, like, restore, spread
from mail_agents.ops._ssd_chunks import Inputs, Kept, chunks
from mail_agents.ops._ssd_inputs import UNLIMITED, SsdInputs
from mail_agents.ops._ssd_torch import ssd_backward, ssd_forward


def opaque_ssd(inputs: Inputs, backend: str) -> tuple[Tensor, Tensor | None]:
    """Returns y (B, L, H, P) and the last state (B, H, P, N), if wanted."""
    arguments: list[Any] = [*inputs, backend]
    y, last, *_ = _ssd(*arguments)
    return y, last if inputs.want_state else None


def _refuse_native(inputs: Inputs) -> str | None:
    if inputs.h0 is not None or inputs.want_state:  # gradients may be asked for later
        return "the kernel has no gradient through states"
    # Of step sizes only those are known that softplus, bias and limits have made.
    rest = (None, None, True, UNLIMITED, inputs.h0, inputs.reset, inputs.want_state)
    return _ssd_native.refuse(SsdInputs(*inputs[:6], *rest))


_SSD = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? h0, Tensor? reset, "
    "bool exact_zero, bool want_state"
)


@torch.library.custom_op(
    "mail_agents::ssd",
    mutates_args=(),
    schema=f"({_SSD}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _ssd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:class:`~mail_agents.ops._ssd_chunks.Inputs`, and the backend.

    Returns:
        y, the last state (no elements unless wanted), the three tensors of
        :class:`~mail_agents.ops._ssd_chunks.Kept`, and 1 where ``native`` ran, else 0.
    """
    inputs, backend = Inputs(*arguments[:-1]), arguments[-1]
    refusal = functools.partial(_refuse_native, inputs)
    if chosen("ssd", backend, refusal, numba=False) == "native":
        _, last, whole, up, states = _results(inputs)
        return _ssd_native.forward(inputs)[0], last, whole, up, states, torch.tensor(1)
    y, last, (whole, up, states) = ssd_forward(inputs)
    last = y.new_empty(0) if last is None else last
    return y, last, whole, up, states, torch.tensor(0)


def _results(inputs: Inputs) -> list[Tensor]:
    """Memory for y, the last state and what is kept; zeros in what ``native`` leaves as it is."""
    batch, length, heads, head = inputs.x.shape
    state, new = (batch, heads, head, inputs.B.shape[3]), inputs.x.new_empty
    last = new(state if inputs.want_state else 0)
    scales = [inputs.x.new_zeros(batch, heads, length) for _ in range(2)]
    return [new(inputs.x.shape), last, *scales, new(len(chunks(length)) - 1, *state)]


@torch.library.custom_op(
    "mail_agents::ssd_backward",
    mutates_args=(),
    schema=f"({_SSD}, Tensor whole, Tensor up, Tensor states, Tensor native, Tensor dy, "
    "Tensor dlast) -> Tensor[]",
)
def _gradients(*arguments: Any) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, and of D and h0 where they are there."""
    inputs = Inputs(*arguments[:10])
    whole, up, states, native, dy, dlast = arguments[10:]
    if native.item():
        found = _ssd_native.backward(inputs, dy)
    else:
        dlast = dlast if inputs.want_state else None
        found = ssd_backward(inputs, Kept(whole, up, states), dy, dlast)
    return [gradient.contiguous() for gradient in found if gradient is not None]


@_ssd.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(*arguments[:-1])
    y, last, whole, up, states = _results(inputs)
    return y, last, whole, up, states, inputs.x.new_empty((), dtype=torch.int64)


@_gradients.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return like(*arguments[:10])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    keep(ctx, inputs, output[2:])


def _backward(ctx: Any, dy: Tensor, dlast: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    arguments, kept = restore(ctx)
    every: list[Any] = [*arguments[:10], *kept, dy, dlast]
    return spread(arguments, _gradients(*every))


_ssd.register_autograd(_backward, setup_context=_setup)
