"""The CPU kernels of Mamba blocks as single operations that ``torch.compile`` does not look into.

Only traced code calls them: eager code needs no dispatcher in between. Which backend runs is
decided, and recorded, at every call and not when code is traced; ``native`` and ``torch`` can.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mail_agents.ops import _conv_native, _scan_native, _scan_torch
from mail_agents.ops._conv_torch import conv_backward, conv_forward
from mail_agents.ops._native import refuse_native
from mail_agents.ops._scan_autograd import Kernels
from mail_agents.ops._scan_inputs import ScanInputs
from mail_agents.ops.backends import Candidate, choose


def tracing(x: Tensor) -> bool:
    """Whether code on CPU tensors is being traced by ``torch.compile``."""
    return torch.compiler.is_compiling() and x.device.type == "cpu"


def opaque_scan(
    inputs: ScanInputs, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor | None]:
    """The selective scan in ``dtype``: y (B, L, D) and the last state (B, D, N), if wanted."""
    arguments: list[Any] = [*inputs.to(dtype), backend]
    y, last, *_ = _scan(*arguments)
    return y.to(inputs.u.dtype), last.transpose(1, 2) if inputs.return_state else None


def opaque_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    history: Tensor | None,
    backend: str,
) -> Tensor:
    """The causal convolution, (B, L, D)."""
    arguments: list[Any] = [x, weight, bias, silu, history, backend]
    return _conv(*arguments)[0]


def chosen(op: str, backend: str, refusal: Callable[[], str | None], numba: bool) -> str:
    """Returns the name of the backend that runs, ``native`` or ``torch``.

    Args:
        op: Name of the op.
        backend: Its ``backend`` argument.
        refusal: Why ``native`` cannot run, or None.
        numba: Whether the op has kernels of numba, which are not to be had here.
    """

    def refuse(_: Any) -> str:
        return "it cannot be compiled, leave out --compile or policy.compile()"

    def run(_: Any) -> None:
        """Stands for backends that run here without their autograd functions."""

    candidates = [
        Candidate("cuda", run, lambda _: "its kernels need tensors on a CUDA device"),
        Candidate("native", run, lambda _: refusal()),
        Candidate("torch", run, lambda _: None, stands_in_for=() if numba else ("numba",)),
        Candidate("reference", run, refuse),
    ]
    if numba:
        candidates.insert(2, Candidate("numba", run, refuse))
    return choose(op, candidates, backend, None).name


#: Arguments in the language of torch: those of an op, and of its backward pass before what that
#: keeps.
_SCAN = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, "
    "bool softplus, Tensor? h0, Tensor? reset, bool want_state"
)
_CONV = "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? history"


@torch.library.custom_op(
    "mail_agents::selective_scan",
    mutates_args=(),
    schema=f"({_SCAN}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:class:`ScanInputs` of one floating dtype, and the backend; what is not wanted is empty.

    Returns:
        y (B, L, D), the last state (B, N, D), y before the gate (B, L, D), kept states
        (:func:`_kept_states`, B, N, D), and 1 where ``native`` ran, else 0.
    """
    inputs, backend = ScanInputs(*arguments[:-1]), arguments[-1]
    refusal = functools.partial(refuse_native, *inputs.tensors())
    native = chosen("selective_scan", backend, refusal, numba=True) == "native"
    kernels, kept = _kernels(native), _new_kept(inputs)
    found = kernels.scan_forward(kernels.prepare(inputs), kept)
    none = inputs.u.new_empty(0)
    last, ungated = (none.clone() if x is None else x for x in (found.last, found.ungated))
    return found.out, last, ungated, kept, torch.tensor(int(native))


@torch.library.custom_op(
    "mail_agents::selective_scan_backward",
    mutates_args=(),
    schema=f"({_SCAN}, Tensor ungated, Tensor kept, Tensor native, Tensor dout, Tensor dlast)"
    " -> Tensor[]",
)
def _scan_gradients(*arguments: Any) -> list[Tensor]:
    """Gradients of the floating arguments that are there."""
    inputs = ScanInputs(*arguments[:12])
    ungated, kept, native, dout, dlast = arguments[12:]
    kernels = _kernels(native.item())
    found = kernels.scan_backward(
        *(kernels.prepare(inputs), None if inputs.z is None else ungated, kept),
        *(dout, dlast if inputs.return_state else None),
    )
    return [gradient.contiguous() for gradient in found if gradient is not None]


def _kernels(native: bool) -> Kernels:
    return _scan_native if native else _scan_torch


@torch.library.custom_op(
    "mail_agents::causal_conv1d",
    mutates_args=(),
    schema=f"({_CONV}, str backend) -> (Tensor, Tensor)",
)
def _conv(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Returns y (B, L, D), and 1 where ``native`` ran, else 0."""
    x, weight, bias, silu, history, backend = arguments
    refusal = functools.partial(_conv_native.refuse, x, weight, bias, history)
    if chosen("causal_conv1d", backend, refusal, numba=False) == "native":
        ready = _conv_native.prepare(x, weight, bias, silu, history)
        return _conv_native.conv_forward(*ready).to(x.dtype), torch.tensor(1)
    taps = weight.t().contiguous()
    y = conv_forward(x, taps, bias, "silu" if silu else None, history)[0]
    return y, torch.tensor(0)


@torch.library.custom_op(
    "mail_agents::causal_conv1d_backward",
    mutates_args=(),
    schema=f"({_CONV}, Tensor native, Tensor dy) -> Tensor[]",
)
def _conv_gradients(*arguments: Any) -> list[Tensor]:
    """Gradients of the tensors that are there."""
    x, weight, bias, silu, history, native, dy = arguments
    if native.item():
        ready = _conv_native.prepare(x, weight, bias, silu, history)
        found = _conv_native.conv_backward(*ready, dy.float())
    else:
        # Recomputed, because only this backend would read it from memory.
        taps, pre = weight.t().contiguous(), None
        if silu:
            pre = conv_forward(x, taps, bias, None, history)[0]
        dx, dtaps, dbias, dhistory = conv_backward(x, taps, history, pre, dy)
        found = dx, dtaps.t(), None if bias is None else dbias, dhistory
    return [gradient.to(x.dtype).contiguous() for gradient in found if gradient is not None]


def _kept_states(u: Tensor, n: int) -> int:
    """Number of states that either backend may keep."""
    batch, length, d = u.shape
    return max(
        _scan_native.kept_states(length), _scan_torch.kept_states(batch, length, n * d, u.device)
    )


def _new_kept(inputs: ScanInputs) -> Tensor:
    u, n = inputs.u, inputs.A.shape[1]
    return u.new_empty(_kept_states(u, n), u.shape[0], n, u.shape[2])


def like(*arguments: Any) -> list[Tensor]:
    """Contiguous tensors like those among the arguments that hold real numbers."""
    return [
        torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in arguments
        if isinstance(x, Tensor) and x.is_floating_point()
    ]


@_scan.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = ScanInputs(*arguments[:12])
    u, n = inputs.u, inputs.A.shape[1]
    none = u.new_empty(0)
    out, ungated = like(u, u)
    last = u.new_empty(u.shape[0], n, u.shape[2]) if inputs.return_state else none
    return (
        *(out, last, none.clone() if inputs.z is None else ungated, _new_kept(inputs)),
        u.new_empty((), dtype=torch.int64),
    )


@_scan_gradients.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return like(*arguments[:12])


@_conv.register_fake
def _(x: Any, *_: Any) -> tuple[Tensor, Tensor]:
    return like(x)[0], x.new_empty((), dtype=torch.int64)


@_conv_gradients.register_fake
def _(x: Any, weight: Any, bias: Any, silu: Any, history: Any, *_: Any) -> list[Tensor]:
    return like(x, weight, bias, history)


def _setup_scan(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    keep(ctx, inputs, output[2:])


def _setup_conv(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    keep(ctx, inputs, output[1:])


def keep(ctx: Any, inputs: tuple[Any, ...], kept: Sequence[Tensor]) -> None:
    """Keeps all arguments and, of the results, what the backward pass needs."""
    ctx.arguments = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *kept)
    ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]


def restore(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    """Returns the arguments and what else :func:`keep` kept."""
    saved = iter(ctx.saved_tensors)
    pairs = zip(ctx.arguments, ctx.is_tensor, strict=True)
    return [next(saved) if tensor else x for x, tensor in pairs], list(saved)


def spread(arguments: list[Any], gradients: list[Tensor]) -> tuple[Tensor | None, ...]:
    """One gradient, or None, per argument."""
    found = iter(gradients)
    return tuple(
        next(found) if isinstance(x, Tensor) and x.is_floating_point() else None for x in arguments
    )


def _scan_backward(ctx: Any, dout: Tensor, dlast: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    arguments, kept = restore(ctx)
    every: list[Any] = [*arguments[:12], *kept, dout, dlast]
    return spread(arguments, _scan_gradients(*every))


def _conv_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    arguments, kept = restore(ctx)
    every: list[Any] = [*arguments[:5], *kept, dy]
    return spread(arguments, _conv_gradients(*every))


_scan.register_autograd(_scan_backward, setup_context=_setup_scan)
_conv.register_autograd(_conv_backward, setup_context=_setup_conv)
