"""State space duality on CPU as one operation that ``torch.compile`` does not look into.

Only traced code calls it. Which backend runs is decided, and recorded, at every call and not when
code is traced; only ``torch`` can.
"""

from typing import Any

import torch
from torch import Tensor

from mail_agents.ops._ssd_torch import Inputs, Kept, chunks, ssd_backward, ssd_forward
from mail_agents.ops.backends import Candidate, choose


def opaque_ssd(inputs: Inputs, backend: str) -> tuple[Tensor, Tensor | None]:
    """Returns y (B, L, H, P) and the last state (B, H, P, N), if wanted."""
    arguments: list[Any] = [*inputs, backend]
    y, last, *_ = _ssd(*arguments)
    return y, last if inputs.want_state else None


def _check_backend(backend: str) -> None:
    def refuse(_: Any) -> str:
        return "it cannot be compiled, leave out --compile or policy.compile()"

    def run(_: Any) -> None:
        """Stands for backends that run here without their autograd functions."""

    candidates = (
        Candidate("cuda", run, lambda _: "its kernels need tensors on a CUDA device"),
        Candidate("torch", run, lambda _: None),
        Candidate("reference", run, refuse),
    )
    choose("ssd", candidates, backend, None)


@torch.library.custom_op("mail_agents::ssd", mutates_args=())
def _ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    h0: Tensor | None,
    reset: Tensor | None,
    exact_zero: bool,
    want_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :class:`~mail_agents.ops._ssd_torch.Inputs`.

    Returns:
        y, the last state (no elements unless wanted) and the three tensors of
        :class:`~mail_agents.ops._ssd_torch.Kept`.
    """
    _check_backend(backend)
    inputs = Inputs(x, dt, A, B, C, D, h0, reset, exact_zero, want_state)
    y, last, kept = ssd_forward(inputs)
    return y, y.new_empty(0) if last is None else last, *kept


@torch.library.custom_op("mail_agents::ssd_backward", mutates_args=())
def _gradients(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    h0: Tensor | None,
    reset: Tensor | None,
    exact_zero: bool,
    want_state: bool,
    whole: Tensor,
    up: Tensor,
    states: Tensor,
    dy: Tensor,
    dlast: Tensor,
) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, and of D and h0 where they are there."""
    inputs = Inputs(x, dt, A, B, C, D, h0, reset, exact_zero, want_state)
    found = ssd_backward(inputs, Kept(whole, up, states), dy, dlast if want_state else None)
    return [gradient.contiguous() for gradient in found if gradient is not None]


def _like(*tensors: Tensor | None) -> list[Tensor]:
    """Contiguous tensors of these shapes."""
    return [x.new_empty(x.shape) for x in tensors if x is not None]


@_ssd.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(*arguments[:-1])
    batch, length, heads, head = inputs.x.shape
    state = (batch, heads, head, inputs.B.shape[3])
    last = inputs.x.new_empty(state if inputs.want_state else 0)
    whole, up = (inputs.x.new_empty(batch, heads, length) for _ in range(2))
    states = inputs.x.new_empty(len(chunks(length)) - 1, *state)
    return *_like(inputs.x), last, whole, up, states


@_gradients.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return _like(*arguments[:7])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:8], *output[2:])
    ctx.flags = inputs[8:10]


def _backward(ctx: Any, dy: Tensor, dlast: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    tensors, kept = ctx.saved_tensors[:8], ctx.saved_tensors[8:]
    arguments: list[Any] = [*tensors, *ctx.flags, *kept, dy, dlast]
    found = iter(_gradients(*arguments))
    return *(None if x is None else next(found) for x in tensors[:7]), None, None, None, None


_ssd.register_autograd(_backward, setup_context=_setup)
