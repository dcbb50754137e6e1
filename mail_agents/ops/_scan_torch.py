"""Blocked selective scan with a hand-written backward pass, in plain PyTorch.

The recurrence (Gu & Dao 2023, "Mamba", equations 2a and 4) is evaluated in tiles of rows x steps
whose working set stays in the cache, laid out ``(rows, steps, N, D)`` with channels contiguous.
Per time step there is one ``addcmul_``; everything else is one operation per tile, or per block of
rows for what has no N axis. Besides the inputs only step sizes, ungated outputs and a few states
are kept for the backward pass, which recomputes each tile.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOG2E = math.log2(math.e)
#: softplus is the identity above this, as in ``torch.nn.functional.softplus``.
_THRESHOLD = 20

#: Elements of a tile and of one step of a tile, per thread. A third costs 20-40 % (too few elements
#: per call); three times as many leave the cache and make the allocator return pages every call.
_TILE = 3 * 2**17
_STEP = 2**15
#: A GPU wants few large launches instead.
_GPU_TILE = 2**25
#: Sequences up to this length are never split in time.
_SHORT = 16
#: More time blocks than this keep only some block starts and recompute the others in between.
_MAX_CHECKPOINTS = 16


class Plan(NamedTuple):
    """Tile size (batch rows and time steps) and distance of kept states in time blocks."""

    rows: int
    steps: int
    spacing: int


def plan_tiles(batch: int, length: int, width: int, device: torch.device) -> Plan:
    """Chooses tile sizes for ``width = N * D`` state elements per batch row."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        tile, step = _TILE * threads, _STEP * threads
    else:
        tile, step = _GPU_TILE, _GPU_TILE
    if length <= _SHORT:
        rows, steps = tile // (length * width), length
    else:
        rows = min(batch, max(1, step // width))
        steps = tile // (rows * width)
    rows, steps = _even(batch, rows), _even(length, steps)
    blocks = math.ceil(length / steps)
    spacing = 1 if blocks <= _MAX_CHECKPOINTS else math.ceil(math.sqrt(blocks))
    return Plan(rows, steps, spacing)


def _even(total: int, size: int) -> int:
    """The largest part when ``total`` is split evenly into parts of at most ``size``."""
    return math.ceil(total / math.ceil(total / max(1, min(total, size))))


class Inputs(NamedTuple):
    """Arguments of :class:`SelectiveScan`: one floating dtype, not empty.

    ``u``, ``delta`` (B, L, D), ``A`` (D, N), ``B``, ``C`` (B, L, N) are contiguous; ``D``, ``bias``
    (D,), ``z`` (B, L, D), ``h0`` (B, D, N) and ``reset`` (B, L) bool are optional.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    softplus: bool
    h0: Tensor | None
    reset: Tensor | None
    want_state: bool


class SelectiveScan(torch.autograd.Function):
    """The whole op, from step size to gate; ``apply(*Inputs)``, first-order gradients.

    Returns y (B, L, D) and the last state (B, D, N), or None unless wanted.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None]:
        inputs = Inputs(*args)
        found = scan_forward(inputs)
        tensors = [value if isinstance(value, Tensor) else None for value in inputs]
        ctx.save_for_backward(*tensors, found.dt, found.ungated, found.kept)
        ctx.flags = inputs.softplus, inputs.want_state
        ctx.set_materialize_grads(False)
        return found.out, found.last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, dt, y, kept = ctx.saved_tensors
        softplus, want_state = ctx.flags
        inputs = Inputs(*tensors)._replace(softplus=softplus, want_state=want_state)
        return scan_backward(inputs, dt, y, kept, dout, dlast)


class Found(NamedTuple):
    """Results of :func:`scan_forward` and what it keeps for :func:`scan_backward`.

    ``out``, ``dt`` and ``ungated`` (None without a gate, when it is ``out``) are (B, L, D),
    ``last`` (None unless wanted) (B, D, N), ``kept`` (states, B, N, D).
    """

    out: Tensor
    last: Tensor | None
    dt: Tensor
    ungated: Tensor | None
    kept: Tensor


def kept_states(batch: int, length: int, width: int, device: torch.device) -> int:
    """Number of states that :func:`scan_forward` keeps; arguments of :func:`plan_tiles`."""
    plan = plan_tiles(batch, length, width, device)
    return (math.ceil(length / plan.steps) - 1) // plan.spacing


def scan_forward(inputs: Inputs) -> Found:
    """The op without autograd."""
    work = _Workspace(inputs, parts=2)
    dt, y = torch.empty_like(inputs.u), torch.empty_like(inputs.u)
    out = y if inputs.z is None else torch.empty_like(y)
    last = work.states(work.batch) if inputs.want_state else None
    kept = work.states((len(work.blocks) - 1) // work.plan.spacing, work.batch)
    for rows in work.row_slices():
        _step_sizes(inputs, rows, dt[rows])
        part = work.select(inputs, rows, dt[rows])
        end = _forward_rows(work, part, y[rows], kept[:, rows])
        if last is not None:
            last[rows] = end
        if inputs.D is not None:
            y[rows].addcmul_(inputs.u[rows], inputs.D)
        if inputs.z is not None:
            torch.ops.aten.silu.out(inputs.z[rows], out=out[rows])
            out[rows].mul_(y[rows])
    ungated = None if inputs.z is None else y
    return Found(out, None if last is None else last.transpose(1, 2), dt, ungated, kept)


def scan_backward(
    inputs: Inputs,
    dt: Tensor,
    y: Tensor | None,
    kept: Tensor,
    dout: Tensor | None,
    dlast: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients by input, from what :func:`scan_forward` kept and the cotangents of its results."""
    work = _Workspace(inputs, parts=3)
    grads = _Gradients(work, inputs)
    gated = torch.zeros_like(inputs.u) if dout is None else dout
    for rows in work.row_slices():
        part = work.select(inputs, rows, dt[rows])
        dy = _gate_backward(grads, inputs, rows, gated[rows], None if y is None else y[rows])
        carry = None if dlast is None else dlast[rows].transpose(1, 2)
        carry = _backward_rows(work, grads, part, rows, dy, kept[:, rows], carry)
        if grads.h0 is not None and carry is not None:
            grads.h0[rows] = carry
        _input_backward(grads, inputs, rows, dt[rows], dy)
    dh0 = None if grads.h0 is None else grads.h0.transpose(1, 2)
    dA = grads.A.sum(0).t()
    found = (grads.u, grads.delta, dA, grads.B, grads.C, grads.D, grads.z, grads.bias)
    return (*found, None, dh0, None, None)


class _Tile:
    """Views of the scratch memory for one tile size: decay, state and (backward) cotangent."""

    def __init__(self, scratch: Tensor, parts: int, rows: int, steps: int, n: int, d: int) -> None:
        size = rows * steps * n * d
        flat = [scratch[i * size : (i + 1) * size] for i in range(parts)]
        self.full = [part.view(rows, steps, n, d) for part in flat]
        self.matrices = [part.view(rows * steps, n, d) for part in flat]
        # Unbound once: indexing inside the time loop costs about a microsecond per view.
        self.steps = [part.unbind(1) for part in self.full]


class _Rows(NamedTuple):
    """Inputs of some batch rows as the recurrence sees them; ``x`` is ``dt * u``."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    reset: Tensor | None
    start: Tensor | None


class _Workspace:
    """Tile sizes, scratch memory and constants of one call."""

    def __init__(self, inputs: Inputs, parts: int) -> None:
        self.batch, self.length, self.d = inputs.u.shape
        self.n = inputs.A.shape[1]
        self.A = inputs.A.t().contiguous()
        # exp2 of a pre-scaled argument is several times faster than exp on CPU.
        self.A2 = self.A * _LOG2E
        self.plan = plan_tiles(self.batch, self.length, self.n * self.d, inputs.u.device)
        starts = range(0, self.length, self.plan.steps)
        self.blocks = [slice(t, min(t + self.plan.steps, self.length)) for t in starts]
        # One allocation for all parts: the allocator then keeps the pages between calls.
        size = self.plan.rows * self.plan.steps * self.n * self.d
        self._scratch = inputs.u.new_empty(parts * size)
        self._x = inputs.u.new_empty(self.plan.rows, self.length, self.d)
        self._parts = parts
        self._tiles: dict[tuple[int, int], _Tile] = {}

    def row_slices(self) -> Iterator[slice]:
        for row in range(0, self.batch, self.plan.rows):
            yield slice(row, min(row + self.plan.rows, self.batch))

    def states(self, *lead: int) -> Tensor:
        return self._scratch.new_empty(*lead, self.n, self.d)

    def select(self, inputs: Inputs, rows: slice, dt: Tensor) -> _Rows:
        """Collects the inputs of some rows, with their step sizes ``dt``."""
        x = torch.mul(dt, inputs.u[rows], out=self._x[: len(dt)])
        reset = None if inputs.reset is None else inputs.reset[rows]
        start = None if inputs.h0 is None else inputs.h0[rows].transpose(1, 2).contiguous()
        return _Rows(x, dt, inputs.B[rows], inputs.C[rows], reset, start)

    def fill(self, part: _Rows, time: slice, start: Tensor | None) -> tuple[_Tile, Tensor]:
        """Computes decays and states of a tile; returns it with its last state.

        Without a start state the first step has nothing to decay, and its decay is not computed.
        """
        size = (len(part.x), time.stop - time.start)
        if size not in self._tiles:
            self._tiles[size] = _Tile(self._scratch, self._parts, *size, self.n, self.d)
        tile = self._tiles[size]
        decay, state = tile.full[:2]
        torch.mul(part.x[:, time].unsqueeze(2), part.B[:, time].unsqueeze(3), out=state)
        inner = time
        if start is None:
            inner, decay = slice(time.start + 1, time.stop), decay[:, 1:]
        torch.mul(part.dt[:, inner].unsqueeze(2), self.A2, out=decay)
        decay.exp2_()
        if part.reset is not None:
            decay.masked_fill_(part.reset[:, inner, None, None], 0.0)
        previous = start
        for e, h in zip(*tile.steps[:2], strict=True):
            if previous is not None:
                h.addcmul_(e, previous)
            previous = h
        return tile, tile.steps[1][-1]


class _Gradients:
    """Gradients of the inputs, filled row block by row block, and row-sized scratch memory."""

    def __init__(self, work: _Workspace, inputs: Inputs) -> None:
        self.u, self.delta = torch.empty_like(inputs.u), torch.empty_like(inputs.u)
        self.B, self.C = torch.empty_like(inputs.B), torch.empty_like(inputs.C)
        # Summed over rows once at the end: one addcmul_ per step instead of a product and a sum.
        self.A = work.states(work.plan.rows).zero_()
        self.D = None if inputs.D is None else torch.zeros_like(inputs.D)
        self.z = None if inputs.z is None else torch.empty_like(inputs.u)
        self.bias = None if inputs.bias is None else torch.zeros_like(inputs.bias)
        self.h0 = None if inputs.h0 is None else work.states(work.batch)
        self.carry = work.states(work.plan.rows)
        self.dy, self.x = inputs.u.new_empty(2, work.plan.rows, work.length, work.d)


def _step_sizes(inputs: Inputs, rows: slice, out: Tensor) -> None:
    """Writes ``delta + bias``, and its softplus if that is on."""
    if inputs.bias is not None:
        torch.add(inputs.delta[rows], inputs.bias, out=out)
    else:
        out.copy_(inputs.delta[rows])
    if inputs.softplus:
        torch.ops.aten.softplus.out(out, 1, _THRESHOLD, out=out)


def _gate_backward(
    grads: _Gradients, inputs: Inputs, rows: slice, dout: Tensor, y: Tensor | None
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


def _input_backward(grads: _Gradients, inputs: Inputs, rows: slice, dt: Tensor, dy: Tensor) -> None:
    """Gradients of u, delta and bias from those of ``x = dt * u`` and of ``dt``."""
    u, dx, ddt = inputs.u[rows], grads.x[: len(dy)], grads.delta[rows]
    ddt.addcmul_(dx, u)
    du = torch.mul(dx, dt, out=grads.u[rows])
    if inputs.D is not None:
        du.addcmul_(dy, inputs.D)
    if inputs.softplus:
        raw = inputs.delta[rows]
        if inputs.bias is not None:
            raw = torch.add(raw, inputs.bias, out=dx)
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


def _forward_rows(work: _Workspace, part: _Rows, y: Tensor, kept: Tensor) -> Tensor:
    """Writes outputs and kept states of some rows; returns the last state (scratch memory)."""
    spacing, start, end = work.plan.spacing, part.start, part.x
    for i, time in enumerate(work.blocks, start=1):
        tile, end = work.fill(part, time, start)
        _contract(part.C, tile.matrices[1], y, time)
        if i < len(work.blocks):
            store = kept[i // spacing - 1] if i % spacing == 0 else torch.empty_like(end)
            start = store.copy_(end)
    return end


def _backward_rows(
    work: _Workspace,
    grads: _Gradients,
    part: _Rows,
    rows: slice,
    dy: Tensor,
    kept: Tensor,
    carry: Tensor | None,
) -> Tensor | None:
    """Walks the time blocks of some rows backwards, group by group between the kept states.

    ``carry`` is the cotangent of the last state; returns that of the first one (or None if zero).
    """
    spacing = work.plan.spacing
    for group in reversed(range(len(kept) + 1)):
        blocks = work.blocks[group * spacing : (group + 1) * spacing]
        starts = [kept[group - 1] if group else part.start]
        for time in blocks[:-1]:
            starts.append(work.fill(part, time, starts[-1])[1].clone())
        for time, start in zip(reversed(blocks), reversed(starts), strict=True):
            carry = _backward_tile(work, grads, part, rows, dy, time, start, carry)
    return carry


def _backward_tile(
    work: _Workspace,
    grads: _Gradients,
    part: _Rows,
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
