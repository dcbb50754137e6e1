"""State space duality with a hand-written backward pass, in plain PyTorch.

Inside a chunk the recurrence is a masked matrix product, between chunks a state is carried (Dao &
Gu 2024, "Transformers are SSMs", section 6)::

    y_i = sum_{j <= i} 2^(s_i - s_j) (C_i . B_j) dt_j x_j + 2^(s_i) C_i h         (+ D x_i)

with ``s`` the running sum of ``dt A log2(e)`` in the chunk and ``h`` the state before it. A running
sum in float32 would cost most of the digits of a gradient, a pairwise table in float64 most of the
speed. So the sum is taken in float64 and split as ``s = n + f``, ``n`` whole and ``0 <= f < 1``:
differences of ``n`` are exact in float32, and ``2^f`` scales rows of x and y.
"""

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOG2E = math.log2(math.e)
#: Exponents of one step are cut here: 2 to the power of less than -1075 is zero even in float64,
#: and sums over a chunk of such steps are still exact in float32. Resets use it, too.
_ZERO = -1100.0
#: Sequences up to this length are one chunk; longer ones are split evenly into chunks of at most
#: ``_CHUNK`` steps, where the quadratic part costs about as much as the state.
_SINGLE = 256
_CHUNK = 64


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
        y, last, kept = ssd_forward(inputs)
        tensors = [value if isinstance(value, Tensor) else None for value in inputs]
        ctx.save_for_backward(*tensors, kept)
        ctx.flags = inputs.exact_zero, inputs.want_state
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, kept = ctx.saved_tensors
        exact_zero, want_state = ctx.flags
        inputs = Inputs(*tensors)._replace(exact_zero=exact_zero, want_state=want_state)
        return (*ssd_backward(inputs, kept, dy, dlast), None, None, None)


def chunks(length: int) -> list[slice]:
    """The parts in which a sequence is processed, in order."""
    count = 1 if length <= _SINGLE else math.ceil(length / _CHUNK)
    bounds = [length * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def ssd_forward(inputs: Inputs) -> tuple[Tensor, Tensor | None, Tensor]:
    """The op without autograd: y, the last state unless not wanted, states between chunks.

    The states between chunks are (chunks - 1, B, H, P, N).
    """
    batch, length, heads, head = inputs.x.shape
    parts = chunks(length)
    y = torch.empty(inputs.x.shape, dtype=inputs.x.dtype, device=inputs.x.device)
    kept = inputs.x.new_empty(len(parts) - 1, batch, heads, head, inputs.B.shape[3])
    state = inputs.h0
    for i, time in enumerate(parts):
        chunk = _Chunk(inputs, time)
        chunk.outputs(state, y[:, time])
        if i < len(kept):
            state = kept[i].copy_(chunk.end_state(state))
        elif inputs.want_state:
            state = chunk.end_state(state)
    return y, state if inputs.want_state else None, kept


def ssd_backward(
    inputs: Inputs, kept: Tensor, dy: Tensor | None, dlast: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D and h0 from the cotangents of y and the last state."""
    batch, length, heads, _ = inputs.x.shape
    parts, starts = chunks(length), [inputs.h0, *kept.unbind(0)]
    dx = torch.empty(inputs.x.shape, dtype=inputs.x.dtype, device=inputs.x.device)
    if dy is None:
        dy = torch.zeros_like(dx)
    ddt, dexponent = inputs.dt.new_empty(2, batch, heads, length)
    dB, dC = inputs.B.new_empty(2, batch, inputs.B.shape[2], length, inputs.B.shape[3])
    back = dlast
    for time, start in zip(reversed(parts), reversed(starts), strict=True):
        part = _Part(
            dx[:, time], ddt[..., time], dexponent[..., time], dB[:, :, time], dC[:, :, time]
        )
        grads = _Backward(_Chunk(inputs, time), part, dy[:, time])
        if back is not None:
            back = grads.end(start, back)
        if start is not None:
            back = grads.start(start, back)
        grads.finish()
    dA = (dexponent * inputs.dt.transpose(1, 2)).sum((0, 2))
    ddt.addcmul_(dexponent, inputs.A[:, None])
    dD = None
    if inputs.D is not None:
        product = (dy * inputs.x).sum((0, 1))
        dD = product if inputs.D.dim() == 2 else product.sum(-1)
    return dx, ddt.transpose(1, 2), dA, dB.transpose(1, 2), dC.transpose(1, 2), dD, back


class _Chunk:
    """Some steps of the inputs with groups or heads in front, and their decays.

    ``dt`` (B, H, L); ``B``, ``C`` (B * G, L, N); ``whole`` and ``up`` are n and 2^f of the module's
    description, (B, H, L).
    """

    def __init__(self, inputs: Inputs, time: slice) -> None:
        self.x, self.D, self.exact_zero = inputs.x[:, time], inputs.D, inputs.exact_zero
        self.batch, self.length, self.heads, self.head = self.x.shape
        self.groups, self.n = inputs.B.shape[2:]
        self.reset = None if inputs.reset is None else inputs.reset[:, None, time]
        self.dt = inputs.dt[:, time].transpose(1, 2).contiguous()
        flat = (self.batch * self.groups, self.length, self.n)
        self.B, self.C = (t[:, time].transpose(1, 2).reshape(flat) for t in (inputs.B, inputs.C))
        steps = (self.dt.double() * (inputs.A.double() * _LOG2E)[:, None]).clamp_(_ZERO, -_ZERO)
        if self.reset is not None:
            steps.masked_fill_(self.reset, _ZERO)
        total = steps.cumsum(-1)
        whole = total.floor()
        self.whole = whole.to(self.dt.dtype)
        self.up = torch.exp2(total.sub_(whole).to(self.dt.dtype))

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
        parts = [t.unflatten(2, split).transpose(1, 2) for t in (values, _to_time(scale))]
        torch.mul(*parts, out=out)
        return out.view(self.batch * self.groups, self.length, -1)

    def heads_to_time(self, rows: Tensor) -> Tensor:
        """(B * H, L, P) as (B, L, H, P)."""
        return rows.view(self.batch, self.heads, self.length, self.head).transpose(1, 2)

    def groups_to_time(self, rows: Tensor) -> Tensor:
        """(B * G, L, H / G * P) as (B, L, H, P)."""
        form = rows.view(self.batch, self.groups, self.length, -1, self.head)
        return form.transpose(1, 2).flatten(2, 3)

    def state_rows(self, state: Tensor) -> Tensor:
        """(B, H, P, N) as (B * G, H / G * P, N)."""
        return state.reshape(self.batch * self.groups, -1, self.n)

    def outputs_of_state(self, start: Tensor) -> Tensor:
        """C_i h, (B, L, H, P)."""
        return self.groups_to_time(torch.bmm(self.C, self.state_rows(start).mT))

    def outputs(self, start: Tensor | None, y: Tensor) -> None:
        """Writes y (B, L, H, P) from the state before the chunk."""
        decays, products = self.tables()
        rows = torch.bmm(
            self.matrices(decays.mul_(products)), self.by_head(self.x, self.dt / self.up)
        )
        torch.mul(self.heads_to_time(rows), _to_time(self.up), out=y)
        if start is not None:
            y.addcmul_(self.outputs_of_state(start), _to_time(self.from_start()))
        if self.D is not None:
            y.addcmul_(self.x, _per_channel(self.D))

    def end_state(self, start: Tensor | None) -> Tensor:
        """The state after the chunk, (B, H, P, N)."""
        pushed = self.by_group(self.x, self.to_end() * self.dt)
        state = torch.bmm(pushed.mT, self.B).view(self.batch, self.heads, self.head, self.n)
        if start is not None:
            state.addcmul_(start, self.from_start()[..., -1, None, None])
        return state


def _to_time(scale: Tensor) -> Tensor:
    """(B, H, L) as a factor of (B, L, H, P)."""
    return scale.transpose(1, 2).unsqueeze(-1)


def _per_channel(D: Tensor) -> Tensor:
    """D as a factor of (B, L, H, P)."""
    return D if D.dim() == 2 else D.unsqueeze(-1)


class _Part(NamedTuple):
    """Where a chunk writes its gradients.

    x (B, L, H, P); dt and dt A (B, H, L); B and C (B, G, L, N).
    """

    x: Tensor
    dt: Tensor
    exponent: Tensor
    B: Tensor
    C: Tensor


class _Backward:
    """Gradients of one chunk.

    ``pushed`` sums those through every term that has dt_j as a factor, times dt_j; ``sums`` those
    of the running sum of dt A. Both are (B, H, L).
    """

    def __init__(self, chunk: _Chunk, grads: _Part, dy: Tensor) -> None:
        self.chunk, self.grads, self.dy = chunk, grads, dy
        # Gradients of x are those of dt x times dt, or times 1 for as long as they are needed.
        self.size = torch.ones_like(chunk.dt) if chunk.exact_zero else chunk.dt
        self._inside()

    def _inside(self) -> None:
        """What goes through pairs of steps inside the chunk."""
        chunk, grads = self.chunk, self.grads
        rows = chunk.by_head(self.dy, chunk.up)
        table = torch.bmm(rows, chunk.by_head(chunk.x, chunk.dt / chunk.up).mT)
        decays, products = chunk.tables()
        through = table.view(decays.shape).mul_(decays)
        dx = torch.bmm(chunk.matrices(decays.mul_(products)).mT, rows)
        torch.mul(chunk.heads_to_time(dx), _to_time(self.size / chunk.up), out=grads.x)
        dproducts = chunk.matrices(through.sum(2))
        grads.C.copy_(torch.bmm(dproducts, chunk.B).view(grads.C.shape))
        grads.B.copy_(torch.bmm(dproducts.mT, chunk.C).view(grads.B.shape))
        through.mul_(products)
        # Row and column sums nearly cancel below, so both have to be of the very same numbers; the
        # diagonal cancels altogether, because no step decays itself.
        exact = through.double()
        diagonal = exact.diagonal(dim1=-2, dim2=-1)
        own = diagonal.clone()
        diagonal.zero_()
        columns, shape = exact.sum(-2), chunk.dt.shape
        self.pushed = (columns + own).view(shape)
        self.sums = (exact.sum(-1) - columns).view(shape)

    def end(self, start: Tensor | None, carry: Tensor) -> Tensor | None:
        """What goes through the state after the chunk; ``carry`` is its cotangent.

        Returns the part of the cotangent of the state before the chunk, if there is one.
        """
        chunk, grads = self.chunk, self.grads
        decay, rows = chunk.to_end(), chunk.state_rows(carry)
        weight = decay * chunk.dt
        grads.B.add_(torch.bmm(chunk.by_group(chunk.x, weight), rows).view(grads.B.shape))
        dx = chunk.groups_to_time(torch.bmm(chunk.B, rows.mT))
        grads.x.addcmul_(dx, _to_time(decay * self.size))
        through = (chunk.x * dx).sum(-1).transpose(1, 2).double() * weight
        self.pushed += through
        self.sums -= through
        self.sums[..., -1] += through.sum(-1)
        if start is None:
            return None
        back = carry * chunk.from_start()[..., -1, None, None]
        self.sums[..., -1] += (back * start).sum((-2, -1))
        return back

    def start(self, start: Tensor, back: Tensor | None) -> Tensor:
        """What goes through the state before the chunk; returns its whole cotangent."""
        chunk, grads = self.chunk, self.grads
        decay = chunk.from_start()
        dy = chunk.by_group(self.dy, decay)
        grads.C.add_(torch.bmm(dy, chunk.state_rows(start)).view(grads.C.shape))
        through = (self.dy * chunk.outputs_of_state(start)).sum(-1).transpose(1, 2)
        self.sums += through * decay
        found = torch.bmm(dy.mT, chunk.C).view(start.shape)
        return found if back is None else found.add_(back)

    def finish(self) -> None:
        """Writes the gradients of step sizes and adds what goes through the skip weight."""
        chunk, grads = self.chunk, self.grads
        grads.exponent.copy_(self.sums.flip(-1).cumsum(-1).flip(-1))
        if chunk.reset is not None:
            grads.exponent.masked_fill_(chunk.reset, 0.0)
        if chunk.exact_zero:
            grads.dt.copy_((chunk.x * grads.x).sum(-1).transpose(1, 2))
            grads.x.mul_(_to_time(chunk.dt))
        else:
            grads.dt.copy_((self.pushed / chunk.dt).masked_fill_(chunk.dt == 0, 0.0))
        if chunk.D is not None:
            grads.x.addcmul_(self.dy, _per_channel(chunk.D))
