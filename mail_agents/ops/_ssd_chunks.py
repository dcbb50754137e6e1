"""How state space duality is cut in chunks, and the matrices of one, in plain PyTorch.

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
from typing import NamedTuple

import torch
from torch import Tensor

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
    """Arguments of :func:`~mail_agents.ops._ssd_torch.ssd_forward`: one floating dtype, not empty.

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


class Kept(NamedTuple):
    """What the backward pass needs: n and 2^f of the module's description, states between chunks.

    ``whole`` and ``up`` (B, H, L); ``states`` (chunks - 1, B, H, P, N).
    """

    whole: Tensor
    up: Tensor
    states: Tensor


def chunks(length: int) -> list[slice]:
    """The parts in which a sequence is processed, in order."""
    return _split(length, 1 if length <= _SINGLE else math.ceil(length / _CHUNK))


def _split(total: int, count: int) -> list[slice]:
    bounds = [total * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def row_blocks(inputs: Inputs) -> list[slice]:
    """Batch rows that are processed together."""
    batch, length, heads, head = inputs.x.shape
    if inputs.x.device.type != "cpu":
        return [slice(0, batch)]
    chunk = math.ceil(length / len(chunks(length)))
    rows = _BLOCK * torch.get_num_threads() // (heads * chunk * max(head, chunk))
    return _split(batch, math.ceil(batch / max(1, rows)))


def running_sums(inputs: Inputs) -> tuple[Tensor, Tensor]:
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


class Workspace:
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


class Chunk:
    """Some rows and steps, with groups or heads in front, and their decays."""

    def __init__(self, work: Workspace, rows: slice, time: slice) -> None:
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
        parts = [t.unflatten(2, split).transpose(1, 2) for t in (values, by_time(scale))]
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
        torch.mul(self.heads_by_time(rows), by_time(self.up), out=y)
        if start is not None:
            y.addcmul_(self.outputs_of_state(start), by_time(self.from_start()))
        if self.work.D is not None:
            y.addcmul_(self.x, self.work.D)

    def end_state(self, start: Tensor | None) -> Tensor:
        """The state after the chunk, (B, H, P, N)."""
        pushed = self.by_group(self.x, self.to_end() * self.at(self.work.dt))
        state = torch.bmm(pushed.mT, self.B).view(self.batch, self.heads, self.head, self.n)
        if start is not None:
            state.addcmul_(start, self.from_start()[..., -1, None, None])
        return state


def by_time(scale: Tensor) -> Tensor:
    """(B, H, L) as a factor of (B, L, H, P)."""
    return scale.transpose(1, 2).unsqueeze(-1)
