"""Selective scan, the sequence operation of Mamba-1, channel-last, with interchangeable backends.

Equations 2a, 2b and 4 and algorithm 2 of Gu & Dao 2023 ("Mamba: Linear-Time Sequence Modeling with
Selective State Spaces"), with the simplified Euler discretisation of B that the released code uses
(``mamba_ssm/ops/selective_scan_interface.py``)::

    dt_t = softplus(delta_t + delta_bias)
    h_t  = exp(dt_t A) h_{t-1} + dt_t B_t u_t          (zero before the first step, or h0)
    y_t  = (C_t . h_t + D u_t) * silu(z_t)

A NaN or an infinity reaches the output of its step and later ones of its sequence; on CPU no
backend carries it to earlier ones, and none to other sequences. What a reset drops has to be
finite: ``native`` drops a NaN as well, the others keep it. All arithmetic is float32 (float64 when
an input is float64), whatever the dtype of the inputs.

==============  ==========================================  =====================================
backend         runs                                        gradients
==============  ==========================================  =====================================
``cuda``        CUDA tensors, float32 / float16 / bfloat16  first order; no h0, reset or gradient
                with the official extension                 through the last state
``native``      CPU, not float64; compiled on first use     first order
``numba``       CPU, not float64; where ``native`` cannot   first order
                be compiled and numba is installed
``torch``       everywhere                                  first order
``reference``   everywhere, slow, readable                  any order, forward mode, torch.func
==============  ==========================================  =====================================
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mail_agents.errors import InvalidInputError
from mail_agents.ops import _scan_cuda, _scan_native, _scan_numba, _scan_torch
from mail_agents.ops._checks import check_shapes
from mail_agents.ops._opaque import opaque_scan, tracing
from mail_agents.ops._precision import as_dtype, no_autocast
from mail_agents.ops._scan_autograd import run_scan
from mail_agents.ops._scan_inputs import ScanInputs
from mail_agents.ops.backends import (
    NUMBA,
    SELECTIVE_SCAN_CUDA,
    Candidate,
    choose,
    note_step,
    refuse_torch_func,
    refuse_without,
)

_LOG2E = math.log2(math.e)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Any:
    """Runs the selective state space recurrence over a batch of sequences.

    Any length including zero is allowed, and any strides.

    Args:
        u: Input, (B, L, D).
        delta: Step sizes before bias and softplus, (B, L, D).
        A: Decay rates, (D, N), real and normally negative.
        B: Input projection of each step, (B, L, N).
        C: Output projection of each step, (B, L, N).
        D: Skip weight, (D,).
        z: Gate, (B, L, D); the output is multiplied by silu(z).
        delta_bias: Added to ``delta``, (D,).
        delta_softplus: Whether step sizes go through softplus (identity above 20).
        h0: State before the first step, (B, D, N); zero when absent. Differentiable.
        reset: (B, L) bool; True drops the state before that step, so that a new sequence starts
            there. The dropped state has to be finite.
        return_state: Whether to return the state after the last step as well.
        backend: ``"auto"`` or a name of :data:`mail_agents.ops.backends.BACKENDS`.

    Returns:
        y (B, L, D) in the dtype of ``u``; with ``return_state`` the pair of y and the last state
        (B, D, N) in float32 (float64 when an input is float64), which is differentiable.

    Raises:
        InvalidInputError: Shapes or dtypes do not fit, or a backend named explicitly cannot run.
        UnknownNameError: There is no such backend.
        MissingDependencyError: A backend named explicitly is not installed.
    """
    inputs = ScanInputs(
        *(u, delta, A, B, C, D, z, delta_bias, delta_softplus, h0, reset, return_state)
    )
    inputs.check()
    with no_autocast(u.device):
        if tracing(u):
            full = u.numel() and A.numel()
            work = inputs.work_dtype()
            y, last = opaque_scan(inputs, work, backend) if full else _reference(inputs)
        else:
            y, last = choose("selective_scan", _CANDIDATES, backend, inputs).run(inputs)
    return (y, last) if return_state else y


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> tuple[Tensor, Tensor]:
    """Advances the recurrence of :func:`selective_scan` by one step.

    Runs on PyTorch whatever backend is named elsewhere, and is recorded as ``torch``: a step on its
    own is too short for a kernel to pay.

    Args:
        state: (B, D, N), float32 or float64; not modified.
        u: Input, (B, D).
        delta: Step size before bias and softplus, (B, D).
        A: Decay rates, (D, N).
        B: Input projection, (B, N).
        C: Output projection, (B, N).
        D: Skip weight, (D,).
        z: Gate, (B, D).
        delta_bias: Added to ``delta``, (D,).
        delta_softplus: Whether the step size goes through softplus.

    Returns:
        y (B, D) in the dtype of ``u``, and the new state (B, D, N) in the dtype of ``state``.

    Raises:
        InvalidInputError: Shapes do not fit.
    """
    _check_step(state, u, delta, A, B, C, D, z, delta_bias)
    note_step("selective_scan_step")
    with no_autocast(u.device):
        work, given = state.dtype, u.dtype
        u, A, B, C = as_dtype(u, work), as_dtype(A, work), as_dtype(B, work), as_dtype(C, work)
        dt = _step_size(as_dtype(delta, work), delta_bias, delta_softplus)
        # exp2 is several times faster than exp on CPU.
        decay = torch.exp2((dt * _LOG2E).unsqueeze(-1) * A)
        entering, direction = (dt * u).unsqueeze(-1), B.unsqueeze(1)
        if torch.is_grad_enabled():
            state = torch.addcmul(entering * direction, decay, state)
        else:
            state = decay.mul_(state).addcmul_(entering, direction)
        # With the vector on the left: matrix times column is several times slower on CPU.
        y = torch.bmm(C.unsqueeze(1), state.transpose(1, 2)).squeeze(1)
        return as_dtype(_skip_and_gate(y, u, D, z), given), state


def _check_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if state.dim() != 3:
        raise InvalidInputError(
            f"selective_scan_step needs a state (B, D, N), got {tuple(state.shape)}."
        )
    batch, d, n = state.shape
    check_shapes(
        "selective_scan_step",
        (
            ("u", u, (batch, d)),
            ("delta", delta, (batch, d)),
            ("A", A, (d, n)),
            ("B", B, (batch, n)),
            ("C", C, (batch, n)),
            ("D", D, (d,)),
            ("z", z, (batch, d)),
            ("delta_bias", delta_bias, (d,)),
        ),
        lambda: f"state (B, D, N) = {tuple(state.shape)}",
    )


def _step_size(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    if bias is not None:
        delta = delta + as_dtype(bias, delta.dtype)
    return F.softplus(delta) if softplus else delta


def _skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = torch.addcmul(y, u, as_dtype(D, y.dtype))
    return y if z is None else y * F.silu(as_dtype(z, y.dtype))


def _reference(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written down, one step at a time."""
    work = inputs.work_dtype()
    u, A, B, C = (t.to(work) for t in (inputs.u, inputs.A, inputs.B, inputs.C))
    dt = _step_size(inputs.delta.to(work), inputs.delta_bias, inputs.delta_softplus)
    h = u.new_zeros(u.shape[0], *A.shape) if inputs.h0 is None else inputs.h0.to(work)
    outputs = []
    for t in range(u.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * A)
        if inputs.reset is not None:
            decay = decay.masked_fill(inputs.reset[:, t, None, None], 0.0)
        h = decay * h + (dt[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        outputs.append((h * C[:, t, None, :]).sum(-1))
    y = torch.stack(outputs, 1) if outputs else u.clone()
    return _skip_and_gate(y, u, inputs.D, inputs.z).to(inputs.u.dtype), h


def _torch(inputs: ScanInputs) -> tuple[Tensor, Tensor | None]:
    """The blocked scan of :mod:`mail_agents.ops._scan_torch`."""
    if inputs.u.numel() == 0 or inputs.A.numel() == 0:
        return _reference(inputs)
    return run_scan(_scan_torch, inputs)


def _refuse_cuda(inputs: ScanInputs) -> str | None:
    missing = refuse_without(SELECTIVE_SCAN_CUDA, inputs.u.is_cuda)
    return _scan_cuda.limits(inputs) if missing is None else missing


_CANDIDATES = (
    Candidate("cuda", _scan_cuda.run, _refuse_cuda, SELECTIVE_SCAN_CUDA),
    Candidate("native", partial(run_scan, _scan_native), _scan_native.refuse),
    Candidate("numba", partial(run_scan, _scan_numba), _scan_numba.refuse, NUMBA),
    Candidate("torch", _torch, refuse_torch_func),
    Candidate("reference", _reference, lambda _: None),
)
