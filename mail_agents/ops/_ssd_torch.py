"""State space duality with a hand-written backward pass, in plain PyTorch.

Inside a chunk the recurrence is a masked matrix product, between chunks a state is carried (Dao &
Gu 2024, "Transformers are SSMs", section 6)::

    y_i = sum_{j <= i} 2^(s_i - s_j) (C_i . B_j) dt_j x_j + 2^(s_i) C_i h         (+ D x_i)

with ``s`` the running sum of ``dt A log2(e)`` in the chunk and ``h`` the state before it. A running
sum in float32 would cost most of the digits of a gradient, a pairwise table in float64 most of the
speed. So the sum is taken in float64 and split as ``s = n + f``, ``n`` whole and ``0 <= f < 1``:
differences of ``n`` are exact in float32, and ``2^f`` scales rows of x and y.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mail_agents.ops._precision import no_autocast

_LOG2E = math.log2(math.e)
#: Exponents of one step are cut here: 2 to the power of less than -1075 is zero even in float64,
#: and sums over a chunk of such steps are still exact in float32. Resets use it, too.
_ZERO = -1100.0
#: Sequences up to this length are one chunk; longer ones are split evenly into chunks of at most
#: ``_CHUNK`` steps, where the quadratic part costs about as much as the state.
_SINGLE = 192
_CHUNK = 64
#: Elements per thread of one intermediate result: such blocks of rows stay in the cache, and the
#: allocator keeps their memory between calls.
_BLOCK = 2**17


class Inputs(NamedTuple):
    """Arguments of :class:`StateSpaceDuality`: one floating dtype, not empty.

    ``x`` (B, L, H, P), ``dt`` (B, L, H) final step sizes, ``A`` (H,), ``B``, ``C`` (B, L, G, N);
    ``D`` (H,) or (H, P), ``h0`` (B, H, P, N) and ``reset`` (B, L) bool are optional.
    ``exact_zero`` says that the gradient of a step size that is zero matters: softplus never
    needs it, because its derivative is zero where it is.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    h0: Tensor | None
    reset: Tensor | None
    exact_zero: bool
    want_state: bool


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


class Kept(NamedTuple):
    """What the backward pass needs: n and 2^f of the module's description, states between chunks.

    ``whole`` and ``up`` (B, H, L); ``states`` (chunks - 1, B, H, P, N).
    """

    whole: Tensor
    up: Tensor
    states: Tensor


class Found(NamedTuple):
    """y (B, L, H, P), the last state (B, H, P, N) if wanted, and what the backward pass needs."""

    y: Tensor
    last: Tensor | None
    kept: Kept


def chunks(length: int) -> list[slice]:
    """The parts in which a sequence is processed, in order."""
    return _split(length, 1 if length <= _SINGLE else math.ceil(length / _CHUNK))


def _split(total: int, count: int) -> list[slice]:
    bounds = [total * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _row_blocks(inputs: Inputs) -> list[slice]:
    """Batch rows that are processed together."""
    batch, length, heads, head = inputs.x.shape
    if inputs.x.device.type != "cpu":
        return [slice(0, batch)]
    chunk = math.ceil(length / len(chunks(length)))
    rows = _BLOCK * torch.get_num_threads() // (heads * chunk * max(head, chunk))
    return _split(batch, math.ceil(batch / max(1, rows)))


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
    work = _Workspace(inputs, Kept(*_running_sums(inputs), states))
    for rows in _row_blocks(inputs):
        state = None if inputs.h0 is None else inputs.h0[rows]
        for i, time in enumerate(parts):
            chunk = _Chunk(work, rows, time)
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
    work, grads = _Workspace(inputs, kept), _Gradients(inputs)
    cotangent = torch.zeros_like(inputs.x) if dy is None else dy
    for rows in _row_blocks(inputs):
        back = None if dlast is None else dlast[rows]
        for time, start in zip(reversed(parts), reversed(starts), strict=True):
            chunk = _Chunk(work, rows, time)
            state = None if start is None else start[rows]
            back = _Backward(chunk, grads, cotangent[rows, time]).run(state, back)
        if grads.h0 is not None and back is not None:
            grads.h0[rows] = back
    return grads.finish(work, parts)


def _running_sums(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """``whole`` and ``up`` of :class:`Kept`."""
    steps = inputs.dt.transpose(1, 2).double() * (inputs.A.double() * _LOG2E)[:, None]
    steps.clamp_(_ZERO, -_ZERO)
    if inputs.reset is not None:
        steps.masked_fill_(inputs.reset.unsqueeze(1), _ZERO)
    sums = [steps[..., time].cumsum(-1) for time in chunks(steps.shape[2])]
    total = sums[0] if len(sums) == 1 else torch.cat(sums, -1)
    whole = total.floor()
    work = inputs.dt.dtype
    # In float64, too: see _softplus of the step sizes.
    return whole.to(work), total.sub_(whole).exp2_().to(work)


class _Workspace:
    """Inputs as all chunks see them; scales are (B, H, L)."""

    def __init__(self, inputs: Inputs, kept: Kept) -> None:
        self.inputs, self.kept = inputs, kept
        self.dt = inputs.dt.transpose(1, 2).contiguous()
        self.push = self.dt / kept.up
        self.B, self.C = (t.transpose(1, 2).flatten(0, 1) for t in (inputs.B, inputs.C))
        self.D = inputs.D if inputs.D is None or inputs.D.dim() == 2 else inputs.D.unsqueeze(-1)
        # Gradients of x are those of dt x times dt; or times 1 for as long as they are needed.
        self.size = torch.ones_like(self.dt) if inputs.exact_zero else self.dt
        self.pull = self.size / kept.up


class _Chunk:
    """Some rows and steps, with groups or heads in front, and their decays."""

    def __init__(self, work: _Workspace, rows: slice, time: slice) -> None:
        self.work, self.rows, self.time = work, rows, time
        self.x = work.inputs.x[rows, time]
        self.batch, self.length, self.heads, self.head = self.x.shape
        self.groups, self.n = work.inputs.B.shape[2:]
        self.by_rows = slice(rows.start * self.groups, rows.stop * self.groups)
        self.B, self.C = work.B[self.by_rows, time], work.C[self.by_rows, time]
        self.whole, self.up = self.at(work.kept.whole), self.at(work.kept.up)

    def at(self, scale: Tensor) -> Tensor:
        """These rows and steps of a (B, H, L) tensor."""
        return scale[self.rows, :, self.time]

    def tables(self) -> tuple[Tensor, Tensor]:
        """2^(n_i - n_j), zero above the diagonal, (B, G, H / G, L, L); C_i . B_j, (B, G, 1, L, L).

        The product of the two maps scaled inputs to scaled outputs.
        """
        shape = (self.batch, self.groups, -1, self.length, self.length)
        decays = torch.sub(self.whole.unsqueeze(-1), self.whole.unsqueeze(-2))
        # Above the diagonal there may be infinities, which are overwritten here.
        decays.exp2_().tril_()
        return decays.view(shape), torch.bmm(self.C, self.B.mT).view(shape)

    def matrices(self, table: Tensor) -> Tensor:
        """(B, G, H / G, L, L) as (B * H, L, L)."""
        return table.view(-1, self.length, self.length)

    def from_start(self) -> Tensor:
        """Decay from the state before the chunk to every step, (B, H, L)."""
        return torch.exp2(self.whole) * self.up

    def to_end(self) -> Tensor:
        """Decay from every step to the end of the chunk, (B, H, L)."""
        return torch.exp2(self.whole[..., -1:] - self.whole) * (self.up[..., -1:] / self.up)

    def by_head(self, values: Tensor, scale: Tensor) -> Tensor:
        """(B, L, H, P) times (B, H, L) as (B * H, L, P)."""
        out = values.new_empty(self.batch, self.heads, self.length, self.head)
        torch.mul(values.transpose(1, 2), scale.unsqueeze(-1), out=out)
        return out.view(-1, self.length, self.head)

    def by_group(self, values: Tensor, scale: Tensor) -> Tensor:
        """(B, L, H, P) times (B, H, L) as (B * G, L, H / G * P)."""
        split = (self.groups, self.heads // self.groups)
        out = values.new_empty(self.batch, self.groups, self.length, split[1], self.head)
        parts = [t.unflatten(2, split).transpose(1, 2) for t in (values, _by_time(scale))]
        torch.mul(*parts, out=out)
        return out.view(self.batch * self.groups, self.length, -1)

    def heads_by_time(self, rows: Tensor) -> Tensor:
        """(B * H, L, P) as (B, L, H, P)."""
        return rows.view(self.batch, self.heads, self.length, self.head).transpose(1, 2)

    def groups_by_time(self, rows: Tensor) -> Tensor:
        """(B * G, L, H / G * P) as (B, L, H, P)."""
        form = rows.view(self.batch, self.groups, self.length, -1, self.head)
        return form.transpose(1, 2).flatten(2, 3)

    def state_rows(self, state: Tensor) -> Tensor:
        """(B, H, P, N) as (B * G, H / G * P, N)."""
        return state.reshape(self.batch * self.groups, -1, self.n)

    def outputs_of_state(self, start: Tensor) -> Tensor:
        """C_i h, (B, L, H, P)."""
        return self.groups_by_time(torch.bmm(self.C, self.state_rows(start).mT))

    def outputs(self, start: Tensor | None, y: Tensor) -> None:
        """Writes y (B, L, H, P) from the state before the chunk."""
        decays, products = self.tables()
        matrices = self.matrices(decays.mul_(products))
        rows = torch.bmm(matrices, self.by_head(self.x, self.at(self.work.push)))
        torch.mul(self.heads_by_time(rows), _by_time(self.up), out=y)
        if start is not None:
            y.addcmul_(self.outputs_of_state(start), _by_time(self.from_start()))
        if self.work.D is not None:
            y.addcmul_(self.x, self.work.D)

    def end_state(self, start: Tensor | None) -> Tensor:
        """The state after the chunk, (B, H, P, N)."""
        pushed = self.by_group(self.x, self.to_end() * self.at(self.work.dt))
        state = torch.bmm(pushed.mT, self.B).view(self.batch, self.heads, self.head, self.n)
        if start is not None:
            state.addcmul_(start, self.from_start()[..., -1, None, None])
        return state


def _by_time(scale: Tensor) -> Tensor:
    """(B, H, L) as a factor of (B, L, H, P)."""
    return scale.transpose(1, 2).unsqueeze(-1)


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

    def finish(self, work: _Workspace, parts: list[slice]) -> tuple[Tensor | None, ...]:
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

    def __init__(self, chunk: _Chunk, grads: _Gradients, dy: Tensor) -> None:
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
            self.dx.mul_(_by_time(chunk.at(chunk.work.dt)))
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
        torch.mul(chunk.heads_by_time(dx), _by_time(chunk.at(work.pull)), out=self.dx)
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
        self.dx.addcmul_(dx, _by_time(decay * chunk.at(work.size)))
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
