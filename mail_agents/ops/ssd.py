"""State space duality, the sequence operation of Mamba-2, with interchangeable backends.

Section 3 and listing 1 of Dao & Gu 2024 ("Transformers are SSMs: Generalized Models and Efficient
Algorithms Through Structured State Space Duality"), with the conventions of the released code
(``mamba_ssm/ops/triton/ssd_combined.py``): one decay rate per head, B and C shared by the heads of
a group::

    dt_t = clamp(softplus(dt_t + dt_bias), dt_limit)
    h_t  = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T         (zero before the first step, or h0)
    y_t  = (h_t C_t + D x_t) * silu(z_t)

A NaN or an infinity reaches the output of its step and later ones of its sequence, and no other
sequence. ``native`` and ``reference`` carry it to no earlier one; the matrix products of ``cuda``
and ``torch`` do, as far as their chunk. All arithmetic is float32 (float64 when an input is
float64), whatever the dtype of the inputs.

==============  ==========================================  =====================================
backend         runs                                        gradients
==============  ==========================================  =====================================
``cuda``        CUDA tensors, float32 / float16 / bfloat16  first order
                with the official package
``native``      CPU, not float64, up to 192 steps;          first order; none with h0 or
                compiled on first use                       return_state
``torch``       everywhere                                  first order
``reference``   everywhere, slow, readable                  any order, forward mode, torch.func
==============  ==========================================  =====================================

The name ``numba``, by which other ops have a backend, means ``torch`` here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mail_agents.errors import InvalidInputError
from mail_agents.ops import _ssd_cuda, _ssd_native
from mail_agents.ops._checks import check_shapes
from mail_agents.ops._opaque import tracing
from mail_agents.ops._precision import as_dtype, no_autocast
from mail_agents.ops._ssd_chunks import Inputs
from mail_agents.ops._ssd_inputs import UNLIMITED, SsdInputs, check_groups, skip_shape, step_sizes
from mail_agents.ops._ssd_opaque import opaque_ssd
from mail_agents.ops._ssd_torch import StateSpaceDuality
from mail_agents.ops.backends import (
    SSD_CUDA,
    Candidate,
    choose,
    note_step,
    refuse_torch_func,
    refuse_without,
)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = UNLIMITED,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Any:
    """Runs the state space recurrence of Mamba-2 over a batch of sequences.

    Any length including zero is allowed, and any strides. A step whose raw step size is -inf is an
    exact no-op: it leaves the state as it is, and no gradient goes through it. Sequences of several
    lengths are padded that way. Inputs of such steps have to be finite.

    Args:
        x: Input, (B, L, H, P).
        dt: Step sizes before bias, softplus and limits, (B, L, H).
        A: Decay rates, (H,), real and normally negative.
        B: Input projection of each step, (B, L, G, N); G divides H.
        C: Output projection of each step, (B, L, G, N).
        D: Skip weight, (H,) or (H, P).
        z: Gate, (B, L, H, P); the output is multiplied by silu(z).
        dt_bias: Added to ``dt``, (H,).
        dt_softplus: Whether step sizes go through softplus (identity above 20).
        dt_limit: Smallest and largest step size, (low, high) with 0 <= low <= high.
        h0: State before the first step, (B, H, P, N); zero when absent. Differentiable.
        reset: (B, L) bool; True drops the state before that step, so that a new sequence starts
            there. The dropped state has to be finite.
        return_state: Whether to return the state after the last step as well.
        backend: ``"auto"`` or a name of :data:`mail_agents.ops.backends.BACKENDS`.

    Returns:
        y (B, L, H, P) in the dtype of ``x``; with ``return_state`` the pair of y and the last state
        (B, H, P, N) in float32 (float64 when an input is float64), which is differentiable.

    Raises:
        InvalidInputError: Shapes, dtypes or limits do not fit, or a backend named explicitly cannot
            run.
        UnknownNameError: There is no such backend.
        MissingDependencyError: A backend named explicitly is not installed.
    """
    inputs = SsdInputs(
        *(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, h0, reset, return_state)
    )
    inputs.check()
    with no_autocast(x.device):
        if tracing(x) and not _is_empty(inputs):
            y, last = _traced(inputs, backend)
        else:
            y, last = choose("ssd", _CANDIDATES, backend, inputs).run(inputs)
    return (y, last) if return_state else y


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = UNLIMITED,
) -> tuple[Tensor, Tensor]:
    """Advances the recurrence of :func:`ssd` by one step.

    Runs on PyTorch whatever backend is named elsewhere, and is recorded as ``torch``: a step on its
    own is too short for a kernel to pay.

    Args:
        state: (B, H, P, N), float32 or float64; not modified.
        x: Input, (B, H, P).
        dt: Step size before bias, softplus and limits, (B, H).
        A: Decay rates, (H,).
        B: Input projection, (B, G, N).
        C: Output projection, (B, G, N).
        D: Skip weight, (H,) or (H, P).
        z: Gate, (B, H, P).
        dt_bias: Added to ``dt``, (H,).
        dt_softplus: Whether the step size goes through softplus.
        dt_limit: Smallest and largest step size.

    Returns:
        y (B, H, P) in the dtype of ``x``, and the new state (B, H, P, N) in the dtype of ``state``.

    Raises:
        InvalidInputError: Shapes do not fit.
    """
    batch, heads, head, n, groups = _step_shapes(state, x, dt, A, B, C, D, z, dt_bias)
    note_step("ssd_step")
    with no_autocast(x.device):
        work = state.dtype
        u = as_dtype(x, work)
        size = step_sizes(as_dtype(dt, work), dt_bias, dt_softplus, dt_limit)
        decay = torch.exp(size * as_dtype(A, work))
        # Heads of a group side by side: one matrix per group, changed in place, because a temporary
        # of the size of the state costs more than all arithmetic.
        rows = (batch * groups, heads // groups * head, n)
        push = (size.unsqueeze(-1) * u).reshape(*rows[:2], 1)
        state = (state * decay[:, :, None, None]).reshape(rows)
        state.addcmul_(push, as_dtype(B, work).reshape(-1, 1, n))
        # The vector on the left: matrix times column is ten times slower on CPU.
        y = torch.bmm(as_dtype(C, work).reshape(-1, 1, n), state.mT).view(u.shape)
        return as_dtype(_skip_and_gate(y, u, D, z), x.dtype), state.view(batch, heads, head, n)


def _step_shapes(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> tuple[int, int, int, int, int]:
    """Checks the arguments of :func:`ssd_step`; returns the sizes B, H, P, N and G."""
    if state.dim() != 4 or B.dim() != 3:
        raise InvalidInputError(
            f"ssd_step needs state (B, H, P, N) and B (B, G, N), got state {tuple(state.shape)} "
            f"and B {tuple(B.shape)}."
        )
    (batch, heads, head, n), groups = state.shape, B.shape[1]
    check_shapes(
        "ssd_step",
        (
            ("x", x, (batch, heads, head)),
            ("dt", dt, (batch, heads)),
            ("A", A, (heads,)),
            ("B", B, (batch, groups, n)),
            ("C", C, (batch, groups, n)),
            ("D", D, skip_shape(D, heads, head)),
            ("z", z, (batch, heads, head)),
            ("dt_bias", dt_bias, (heads,)),
        ),
        lambda: f"state (B, H, P, N) = {tuple(state.shape)} and G = {groups}",
    )
    check_groups("ssd_step", heads, groups)
    return batch, heads, head, n, groups


def _skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = torch.addcmul(y, x, as_dtype(D if D.dim() == 2 else D.unsqueeze(-1), y.dtype))
    return y if z is None else y * F.silu(as_dtype(z, y.dtype))


def _reference(inputs: SsdInputs) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written down, one step at a time."""
    work = inputs.work_dtype()
    x, A = inputs.x.to(work), inputs.A.to(work)
    per_group = x.shape[2] // inputs.B.shape[2]
    B, C = (t.to(work).repeat_interleave(per_group, dim=2) for t in (inputs.B, inputs.C))
    dt = step_sizes(inputs.dt.to(work), inputs.dt_bias, inputs.dt_softplus, inputs.dt_limit)
    first = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3])
    h = first if inputs.h0 is None else inputs.h0.to(work)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)
        if inputs.reset is not None:
            decay = decay.masked_fill(inputs.reset[:, t, None], 0.0)
        push = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        h = decay[:, :, None, None] * h + push
        outputs.append((h * C[:, t, :, None]).sum(-1))
    y = torch.stack(outputs, 1) if outputs else x.clone()
    return _skip_and_gate(y, x, inputs.D, inputs.z).to(inputs.x.dtype), h


def _prepared(inputs: SsdInputs) -> Inputs:
    """What lies between step size and gate, in one dtype."""
    work = inputs.work_dtype()
    x, dt, A, B, C = (t.to(work) for t in inputs[:5])
    D, h0 = (None if t is None else t.to(work) for t in (inputs.D, inputs.h0))
    dt = step_sizes(dt, inputs.dt_bias, inputs.dt_softplus, inputs.dt_limit)
    flags = not inputs.dt_softplus, inputs.return_state
    return Inputs(x, dt, A, B, C, D, h0, inputs.reset, *flags)


def _native(inputs: SsdInputs) -> tuple[Tensor, Tensor | None]:
    """The kernel of :mod:`mail_agents.ops._ssd_native`."""
    ready, last = _prepared(inputs), None
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs.tensors()):
        y = _ssd_native.NativeDuality.apply(*ready)  # type: ignore[misc]
    else:
        y, last = _ssd_native.forward(ready)
    return _skip_and_gate(y, inputs.x, None, inputs.z).to(inputs.x.dtype), last


def _torch(inputs: SsdInputs) -> tuple[Tensor, Tensor | None]:
    """The chunked form of :mod:`mail_agents.ops._ssd_torch`."""
    if _is_empty(inputs):
        return _reference(inputs)
    y, last = StateSpaceDuality.apply(*_prepared(inputs))  # type: ignore[misc]
    return _skip_and_gate(y, inputs.x, None, inputs.z).to(inputs.x.dtype), last


def _traced(inputs: SsdInputs, backend: str) -> tuple[Tensor, Tensor | None]:
    """The op as one operation of a compiled graph."""
    y, last = opaque_ssd(_prepared(inputs), backend)
    return _skip_and_gate(y, inputs.x, None, inputs.z).to(inputs.x.dtype), last


def _is_empty(inputs: SsdInputs) -> bool:
    return inputs.x.numel() == 0 or inputs.B.numel() == 0


def _refuse_cuda(inputs: SsdInputs) -> str | None:
    missing = refuse_without(SSD_CUDA, inputs.x.is_cuda)
    return _ssd_cuda.limits(inputs) if missing is None else missing


_CANDIDATES = (
    Candidate("cuda", _ssd_cuda.run, _refuse_cuda, SSD_CUDA),
    Candidate("native", _native, _ssd_native.refuse),
    Candidate("torch", _torch, refuse_torch_func, stands_in_for=("numba",)),
    Candidate("reference", _reference, lambda _: None),
)
