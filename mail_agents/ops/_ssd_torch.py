"""State space duality with a hand-written backward pass, in plain PyTorch.

Chunk by chunk, for a few rows at a time; see :mod:`mail_agents.ops._ssd_chunks`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mail_agents.ops._precision import no_autocast
from mail_agents.ops._ssd_chunks import (
    Chunk,
    Inputs,
    Kept,
    Workspace,
    by_time,
    chunks,
    row_blocks,
    running_sums,
)


class StateSpaceDuality(torch.autograd.Function):
    """The op between step size and gate; ``apply(*Inputs)``, first-order gradients.

    Returns y (B, L, H, P) and the last state (B, H, P, N), or None unless wanted.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None]:
        inputs = Inputs(*args)
        found = ssd_forward(inputs)
        tensors = [value if isinstance(value, Tensor) else None for value in inputs]
        ctx.save_for_backward(*tensors, *found.kept)
        ctx.flags = inputs.exact_zero, inputs.want_state
        ctx.set_materialize_grads(False)
        return found.y, found.last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, whole, up, states = ctx.saved_tensors
        exact_zero, want_state = ctx.flags
        inputs = Inputs(*tensors)._replace(exact_zero=exact_zero, want_state=want_state)
        return *ssd_backward(inputs, Kept(whole, up, states), dy, dlast), None, None, None


class Found(NamedTuple):
    """y (B, L, H, P), the last state (B, H, P, N) if wanted, and what the backward pass needs."""

    y: Tensor
    last: Tensor | None
    kept: Kept


def _exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps mixed precision out of a function, which a caller of backward may have switched on."""

    @functools.wraps(function)
    def run(inputs: Inputs, *args: Any) -> Any:
        with no_autocast(inputs.x.device):
            return function(inputs, *args)

    return run


@_exactly
def ssd_forward(inputs: Inputs) -> Found:
    """The op without autograd."""
    batch, length, heads, head = inputs.x.shape
    parts = chunks(length)
    y = torch.empty(inputs.x.shape, dtype=inputs.x.dtype, device=inputs.x.device)
    states = y.new_empty(len(parts) - 1, batch, heads, head, inputs.B.shape[3])
    last = y.new_empty(batch, *states.shape[2:]) if inputs.want_state else None
    work = Workspace(inputs, Kept(*running_sums(inputs), states))
    for rows in row_blocks(inputs):
        state = None if inputs.h0 is None else inputs.h0[rows]
        for i, time in enumerate(parts):
            chunk = Chunk(work, rows, time)
            chunk.outputs(state, y[rows, time])
            if i < len(states):
                state = states[i, rows].copy_(chunk.end_state(state))
            elif last is not None:
                last[rows] = chunk.end_state(state)
    return Found(y, last, work.kept)


@_exactly
def ssd_backward(
    inputs: Inputs, kept: Kept, dy: Tensor | None, dlast: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D and h0 from the cotangents of y and the last state."""
    parts, starts = chunks(inputs.x.shape[1]), [inputs.h0, *kept.states.unbind(0)]
    work, grads = Workspace(inputs, kept), _Gradients(inputs)
    cotangent = torch.zeros_like(inputs.x) if dy is None else dy
    for rows in row_blocks(inputs):
        back = None if dlast is None else dlast[rows]
        for time, start in zip(reversed(parts), reversed(starts), strict=True):
            chunk = Chunk(work, rows, time)
            state = None if start is None else start[rows]
            back = _Backward(chunk, grads, cotangent[rows, time]).run(state, back)
        if grads.h0 is not None and back is not None:
            grads.h0[rows] = back
    return grads.finish(work, parts)


class _Gradients:
    """Gradients of the inputs, filled chunk by chunk.

    ``pushed`` (B, H, L) is that of every term with the factor dt, times dt (with ``exact_zero``:
    not times dt); ``sums`` (B, H, L) that of the running sum of dt A; ``B`` and ``C`` are
    (B * G, L, N).
    """

    def __init__(self, inputs: Inputs) -> None:
        batch, length, heads, head = inputs.x.shape
        groups, n = inputs.B.shape[2:]
        self.x = torch.empty(inputs.x.shape, dtype=inputs.x.dtype, device=inputs.x.device)
        # Not halves of one tensor: what an operation returns to the compiler must not be views.
        self.B, self.C = (self.x.new_empty(batch * groups, length, n) for _ in range(2))
        self.pushed, self.sums = self.x.new_empty(2, batch, heads, length, dtype=torch.double)
        self.D = None if inputs.D is None else self.x.new_zeros(heads, head)
        self.h0 = None if inputs.h0 is None else self.x.new_empty(inputs.h0.shape)

    def finish(self, work: Workspace, parts: list[slice]) -> tuple[Tensor | None, ...]:
        """Returns the gradients of x, dt, A, B, C, D and h0."""
        inputs = work.inputs
        for time in parts:
            self.sums[..., time] = self.sums[..., time].flip(-1).cumsum(-1).flip(-1)
        if inputs.reset is not None:
            self.sums.masked_fill_(inputs.reset.unsqueeze(1), 0.0)
        dA = (self.sums * work.dt).sum((0, 2)).to(self.x.dtype)
        if not inputs.exact_zero:
            self.pushed.div_(work.dt).masked_fill_(work.dt == 0, 0.0)
        ddt = self.pushed.addcmul_(self.sums, inputs.A.double()[:, None]).to(self.x.dtype)
        shape = inputs.B.transpose(1, 2).shape
        dB, dC = (t.view(shape).transpose(1, 2) for t in (self.B, self.C))
        dD = self.D
        if dD is not None and inputs.D is not None and inputs.D.dim() == 1:
            dD = dD.sum(-1)
        return self.x, ddt.transpose(1, 2), dA, dB, dC, dD, self.h0


class _Backward:
    """The backward pass of one chunk; writes into ``grads`` from the cotangent ``dy`` of y."""

    def __init__(self, chunk: Chunk, grads: _Gradients, dy: Tensor) -> None:
        self.chunk, self.dy, self.dD = chunk, dy, grads.D
        self.dx = grads.x[chunk.rows, chunk.time]
        self.dB, self.dC = (t[chunk.by_rows, chunk.time] for t in (grads.B, grads.C))
        self.pushed, self.sums = chunk.at(grads.pushed), chunk.at(grads.sums)

    def run(self, start: Tensor | None, carry: Tensor | None) -> Tensor | None:
        """Takes the state before the chunk and the cotangent of that after it, None when zero.

        Returns the cotangent of the state before the chunk, None without a state.
        """
        chunk, back = self.chunk, None
        self._inside()
        if carry is not None:
            back = self._end(start, carry)
        if start is not None:
            back = self._start(start, back)
        if chunk.work.inputs.exact_zero:
            self.pushed.copy_((chunk.x * self.dx).sum(-1).transpose(1, 2))
            self.dx.mul_(by_time(chunk.at(chunk.work.dt)))
        if chunk.work.D is not None and self.dD is not None:
            self.dD += (self.dy * chunk.x).sum((0, 1))
            self.dx.addcmul_(self.dy, chunk.work.D)
        return back

    def _inside(self) -> None:
        """What goes through pairs of steps inside the chunk."""
        chunk, work = self.chunk, self.chunk.work
        rows = chunk.by_head(self.dy, chunk.up)
        table = torch.bmm(rows, chunk.by_head(chunk.x, chunk.at(work.push)).mT)
        decays, products = chunk.tables()
        through = table.view(decays.shape).mul_(decays)
        dx = torch.bmm(chunk.matrices(decays.mul_(products)).mT, rows)
        torch.mul(chunk.heads_by_time(dx), by_time(chunk.at(work.pull)), out=self.dx)
        dproducts = chunk.matrices(through.sum(2))
        torch.bmm(dproducts, chunk.B, out=self.dC)
        torch.bmm(dproducts.mT, chunk.C, out=self.dB)
        # Row and column sums nearly cancel below, so both have to be of the very same numbers; the
        # diagonal cancels altogether, because no step decays itself.
        exact = through.mul_(products).double()
        diagonal = exact.diagonal(dim1=-2, dim2=-1)
        own = diagonal.clone()
        diagonal.zero_()
        columns, shape = exact.sum(-2), self.sums.shape
        torch.sub(exact.sum(-1).view(shape), columns.view(shape), out=self.sums)
        torch.add(columns.view(shape), own.view(shape), out=self.pushed)

    def _end(self, start: Tensor | None, carry: Tensor) -> Tensor | None:
        """What goes through the state after the chunk."""
        chunk, work = self.chunk, self.chunk.work
        decay, rows = chunk.to_end(), chunk.state_rows(carry)
        weight = decay * chunk.at(work.dt)
        self.dB += torch.bmm(chunk.by_group(chunk.x, weight), rows)
        dx = chunk.groups_by_time(torch.bmm(chunk.B, rows.mT))
        self.dx.addcmul_(dx, by_time(decay * chunk.at(work.size)))
        through = (chunk.x * dx).sum(-1).transpose(1, 2).double() * weight
        self.pushed += through
        through[..., -1] = 0.0  # it does not decay until the end
        self.sums -= through
        self.sums[..., -1] += through.sum(-1)
        if start is None:
            return None
        back = carry * chunk.from_start()[..., -1, None, None]
        self.sums[..., -1] += (back * start).sum((-2, -1))
        return back

    def _start(self, start: Tensor, back: Tensor | None) -> Tensor:
        """What goes through the state before the chunk."""
        chunk, decay = self.chunk, self.chunk.from_start()
        dy = chunk.by_group(self.dy, decay)
        self.dC += torch.bmm(dy, chunk.state_rows(start))
        through = (self.dy * chunk.outputs_of_state(start)).sum(-1).transpose(1, 2)
        self.sums += through * decay
        found = torch.bmm(dy.mT, chunk.C).view(start.shape)
        return found if back is None else found.add_(back)
