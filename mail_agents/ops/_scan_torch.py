"""Blocked selective scan with a hand-written backward pass, in plain PyTorch.

The recurrence (Gu & Dao 2023, "Mamba", equations 2a and 4) is evaluated tile by tile, see
:mod:`mail_agents.ops._scan_tiles`; what has no N axis is one operation per block of rows. Besides
the inputs only ungated outputs and a few states are kept for the backward pass, which recomputes
each tile.
"""

import torch
from torch import Tensor

from mail_agents.ops._scan_inputs import Forward, ScanInputs
from mail_agents.ops._scan_tiles import Rows, Workspace, plan_tiles

#: softplus is the identity above this, as in ``torch.nn.functional.softplus``.
_THRESHOLD = 20


def kept_states(batch: int, length: int, width: int, device: torch.device) -> int:
    """Number of states that :func:`scan_forward` keeps; arguments of :func:`plan_tiles`."""
    return plan_tiles(batch, length, width, device).kept(length)


def new_kept(inputs: ScanInputs) -> Tensor:
    """Memory for these states, (:func:`kept_states`, B, N, D)."""
    (batch, length, d), n = inputs.u.shape, inputs.A.shape[1]
    return inputs.u.new_empty(kept_states(batch, length, n * d, inputs.u.device), batch, n, d)


def prepare(inputs: ScanInputs) -> ScanInputs:
    """One dtype, contiguous sequences and rates; what is absent stays so."""
    inputs = inputs.to(inputs.work_dtype())
    u, delta, A, B, C = (tensor.contiguous() for tensor in inputs[:5])
    return inputs._replace(u=u, delta=delta, A=A, B=B, C=C)


def scan_forward(inputs: ScanInputs, kept: Tensor | None) -> Forward:
    """The op without autograd.

    Args:
        inputs: Of one floating dtype, not empty, as :func:`prepare` returns them.
        kept: Memory for states, at least (:func:`kept_states`, B, N, D); without it there is no
            backward pass.
    """
    work = Workspace(inputs, parts=2)
    y = torch.empty_like(inputs.u)
    out = y if inputs.z is None else torch.empty_like(y)
    last = work.states(work.batch) if inputs.return_state else None
    for rows in work.row_slices():
        part = work.select(inputs, rows, _step_sizes(work, inputs, rows))
        end = _forward_rows(work, part, y[rows], None if kept is None else kept[:, rows])
        if last is not None:
            last[rows] = end
        if inputs.D is not None:
            y[rows].addcmul_(inputs.u[rows], inputs.D)
        if inputs.z is not None:
            torch.ops.aten.silu.out(inputs.z[rows], out=out[rows])
            out[rows].mul_(y[rows])
    return Forward(out, None if inputs.z is None else y, last)


def scan_backward(
    inputs: ScanInputs,
    y: Tensor | None,
    kept: Tensor,
    dout: Tensor | None,
    dlast: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients by input, from what the forward pass kept and the cotangents of its results.

    ``dlast`` is (B, N, D), like ``last``.
    """
    work = Workspace(inputs, parts=3)
    grads = _Gradients(work, inputs)
    gated = torch.zeros_like(inputs.u) if dout is None else dout
    for rows in work.row_slices():
        part = work.select(inputs, rows, _step_sizes(work, inputs, rows))
        dy = _gate_backward(grads, inputs, rows, gated[rows], None if y is None else y[rows])
        carry = None if dlast is None else dlast[rows]
        carry = _backward_rows(work, grads, part, rows, dy, kept[:, rows], carry)
        if grads.h0 is not None and carry is not None:
            grads.h0[rows] = carry
        _input_backward(grads, inputs, rows, part.dt, dy)
    dh0 = None if grads.h0 is None else grads.h0.transpose(1, 2)
    dA = grads.A.sum(0).t()
    found = (grads.u, grads.delta, dA, grads.B, grads.C, grads.D, grads.z, grads.bias)
    return (*found, None, dh0, None, None)


class _Gradients:
    """Gradients of the inputs, filled row block by row block, and row-sized scratch memory."""

    def __init__(self, work: Workspace, inputs: ScanInputs) -> None:
        self.u, self.delta = torch.empty_like(inputs.u), torch.empty_like(inputs.u)
        self.B, self.C = torch.empty_like(inputs.B), torch.empty_like(inputs.C)
        # Summed over rows once at the end: one addcmul_ per step instead of a product and a sum.
        self.A = work.states(work.plan.rows).zero_()
        self.D = None if inputs.D is None else torch.zeros_like(inputs.D)
        self.z = None if inputs.z is None else torch.empty_like(inputs.u)
        self.bias = None if inputs.delta_bias is None else torch.zeros_like(inputs.delta_bias)
        self.h0 = None if inputs.h0 is None else work.states(work.batch)
        self.carry = work.states(work.plan.rows)
        self.dy, self.x = inputs.u.new_empty(2, work.plan.rows, work.length, work.d)


def _step_sizes(work: Workspace, inputs: ScanInputs, rows: slice) -> Tensor:
    """``delta + bias``, or its softplus, of some rows; scratch memory."""
    out = work.step_sizes(rows.stop - rows.start)
    if inputs.delta_bias is not None:
        torch.add(inputs.delta[rows], inputs.delta_bias, out=out)
    else:
        out.copy_(inputs.delta[rows])
    if inputs.delta_softplus:
        torch.ops.aten.softplus.out(out, 1, _THRESHOLD, out=out)
    return out


def _gate_backward(
    grads: _Gradients, inputs: ScanInputs, rows: slice, dout: Tensor, y: Tensor | None
) -> Tensor:
    """Gradients of gate and skip weight; returns the cotangent of the ungated output."""
    scratch = grads.dy[: len(dout)]
    if inputs.z is None or grads.z is None or y is None:
        dy = dout.contiguous()
    else:
        z = inputs.z[rows]
        torch.mul(dout, y, out=scratch)
        torch.ops.aten.silu_backward.grad_input(scratch, z, grad_input=grads.z[rows])
        torch.ops.aten.silu.out(z, out=scratch)
        dy = scratch.mul_(dout)
    if grads.D is not None:
        product = torch.mul(dy, inputs.u[rows], out=grads.x[: len(dout)])
        grads.D += product.sum((0, 1))
    return dy


def _input_backward(
    grads: _Gradients, inputs: ScanInputs, rows: slice, dt: Tensor, dy: Tensor
) -> None:
    """Gradients of u, delta and bias from those of ``x = dt * u`` and of ``dt``."""
    u, dx, ddt = inputs.u[rows], grads.x[: len(dy)], grads.delta[rows]
    ddt.addcmul_(dx, u)
    du = torch.mul(dx, dt, out=grads.u[rows])
    if inputs.D is not None:
        du.addcmul_(dy, inputs.D)
    if inputs.delta_softplus:
        raw = inputs.delta[rows]
        if inputs.delta_bias is not None:
            raw = torch.add(raw, inputs.delta_bias, out=dx)
        torch.ops.aten.softplus_backward.grad_input(ddt, raw, 1, _THRESHOLD, grad_input=ddt)
    if grads.bias is not None:
        grads.bias += ddt.sum((0, 1))


def _contract(vectors: Tensor, matrices: Tensor, out: Tensor, time: slice) -> None:
    """Writes ``vectors @ matrices`` per (row, step) into ``out[:, time]``.

    The vector stands on the left: matrix times column is ten times slower on CPU.
    """
    left = vectors[:, time].reshape(-1, 1, vectors.shape[2])
    target = out[:, time]
    if target.is_contiguous():
        torch.bmm(left, matrices, out=target.view(-1, 1, out.shape[2]))
    else:
        target.copy_(torch.bmm(left, matrices).view(target.shape))


def _forward_rows(work: Workspace, part: Rows, y: Tensor, kept: Tensor | None) -> Tensor:
    """Writes outputs and kept states of some rows; returns the last state (scratch memory)."""
    spacing, start, end = work.plan.spacing, part.start, part.x
    for i, time in enumerate(work.blocks, start=1):
        tile, end = work.fill(part, time, start)
        _contract(part.C, tile.matrices[1], y, time)
        if i < len(work.blocks):
            if kept is None or i % spacing:
                start = end.clone()
            else:
                start = kept[i // spacing - 1].copy_(end)
    return end


def _backward_rows(
    work: Workspace,
    grads: _Gradients,
    part: Rows,
    rows: slice,
    dy: Tensor,
    kept: Tensor,
    carry: Tensor | None,
) -> Tensor | None:
    """Walks the time blocks of some rows backwards, group by group between the kept states.

    ``carry`` is the cotangent of the last state; returns that of the first one (or None if zero).
    """
    spacing = work.plan.spacing
    for group in reversed(range(work.plan.kept(work.length) + 1)):
        blocks = work.blocks[group * spacing : (group + 1) * spacing]
        starts = [kept[group - 1] if group else part.start]
        for time in blocks[:-1]:
            starts.append(work.fill(part, time, starts[-1])[1].clone())
        for time, start in zip(reversed(blocks), reversed(starts), strict=True):
            carry = _backward_tile(work, grads, part, rows, dy, time, start, carry)
    return carry


def _backward_tile(
    work: Workspace,
    grads: _Gradients,
    part: Rows,
    rows: slice,
    dy: Tensor,
    time: slice,
    start: Tensor | None,
    carry: Tensor | None,
) -> Tensor | None:
    """Adds the gradients of one tile and returns the cotangent of the state before it.

    ``start`` is the state before the block and ``carry`` the cotangent of the state after it, both
    None when zero. The returned tensor is scratch memory, or None without a start state.
    """
    tile, _ = work.fill(part, time, start)
    decay, state, cotangent = tile.full
    e, _, g = tile.steps
    torch.mul(dy[:, time].unsqueeze(2), part.C[:, time].unsqueeze(3), out=cotangent)
    if carry is not None:
        g[-1].add_(carry)
    # From here on the decay buffer holds decay * cotangent, which is what flows one step back.
    for j in range(len(g) - 1, 0, -1):
        g[j - 1].add_(e[j].mul_(g[j]))
    _contract(dy, tile.matrices[1].transpose(1, 2), grads.C[rows], time)
    _contract(part.x, tile.matrices[2].transpose(1, 2), grads.B[rows], time)
    _contract(part.B, tile.matrices[2], grads.x[: len(dy)], time)
    # ... and now, times the previous state, the gradient of the exponent dt * A.
    first, back, ddt = 0, None, grads.delta[rows]
    if start is None:
        first = 1
        ddt[:, time.start] = 0.0
    else:
        back = grads.carry[: len(dy)]
        torch.mul(e[0], g[0], out=back)
        torch.mul(back, start, out=e[0])
    decay[:, 1:].mul_(state[:, :-1])
    total, dt = grads.A[: len(dy)], part.dt[:, time].unsqueeze(2).unbind(1)
    for j in range(first, len(e)):
        total.addcmul_(e[j], dt[j])
    inner = decay[:, first:].mul_(work.A)
    torch.sum(inner, 2, out=ddt[:, time.start + first : time.stop])
    return back
