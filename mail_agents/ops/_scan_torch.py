"""Blocked selective scan with a hand-written backward pass, in plain PyTorch.

The recurrence (Gu & Dao 2023, "Mamba", equations 2a and 4) is evaluated in tiles of rows x steps
whose working set stays in the cache, laid out ``(rows, steps, N, D)`` with channels contiguous.
Per time step there is one ``addcmul_``; everything else is one operation per tile. Only inputs and
a few states are kept for the backward pass, which recomputes each tile.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOG2E = math.log2(math.e)

#: Elements of a tile and of one step of a tile, per thread. Half or double costs about 5 %,
#: an eighth or eight times 30-100 %: too few elements per call, or tiles that leave the cache.
_TILE = 2**19
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


class _Tile:
    """Views of the scratch memory for one tile size: decay, state and (backward) cotangent."""

    def __init__(self, scratch: Tensor, parts: int, rows: int, steps: int, n: int, d: int) -> None:
        size = rows * steps * n * d
        flat = [scratch[i * size : (i + 1) * size] for i in range(parts)]
        self.full = [part.view(rows, steps, n, d) for part in flat]
        self.matrices = [part.view(rows * steps, n, d) for part in flat]
        # Unbound once: indexing inside the time loop costs about a microsecond per view.
        self.steps = [part.unbind(1) for part in self.full]


class _Scan:
    """Inputs of one scan and the arithmetic of one tile. All tensors contiguous, one dtype."""

    def __init__(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        h0: Tensor | None,
        reset: Tensor | None,
        parts: int,
    ) -> None:
        self.dt, self.B, self.C, self.reset = dt, B, C, reset
        self.x = dt * u
        self.A = A.t().contiguous()
        # exp2 of a pre-scaled argument is several times faster than exp on CPU.
        self.A2 = self.A * _LOG2E
        self.h0 = None if h0 is None else h0.transpose(1, 2).contiguous()
        self.batch, self.length, self.d = u.shape
        self.n = B.shape[2]
        self.plan = plan_tiles(self.batch, self.length, self.n * self.d, u.device)
        starts = range(0, self.length, self.plan.steps)
        self.blocks = [(t, min(t + self.plan.steps, self.length)) for t in starts]
        # One allocation for all parts: the allocator then keeps the pages between calls.
        self._scratch = u.new_empty(parts * self.plan.rows * self.plan.steps * self.n * self.d)
        self._parts = parts
        self._tiles: dict[tuple[int, int], _Tile] = {}

    def row_slices(self) -> Iterator[slice]:
        for row in range(0, self.batch, self.plan.rows):
            yield slice(row, min(row + self.plan.rows, self.batch))

    def empty_states(self, *lead: int) -> Tensor:
        return self.x.new_empty(*lead, self.n, self.d)

    def tile(self, rows: int, steps: int) -> _Tile:
        key = (rows, steps)
        if key not in self._tiles:
            self._tiles[key] = _Tile(self._scratch, self._parts, rows, steps, self.n, self.d)
        return self._tiles[key]

    def fill(
        self, rows: slice, block: tuple[int, int], start: Tensor | None
    ) -> tuple[_Tile, Tensor]:
        """Computes decays and states of a tile; returns it with its last state.

        Without a start state the first step has nothing to decay, and its decay is not computed.
        """
        time = slice(*block)
        tile = self.tile(rows.stop - rows.start, block[1] - block[0])
        decay, state = tile.full[:2]
        torch.mul(self.x[rows, time].unsqueeze(2), self.B[rows, time].unsqueeze(3), out=state)
        inner = slice(block[0] + (start is None), block[1])
        decay = decay[:, inner.start - block[0] :]
        torch.mul(self.dt[rows, inner].unsqueeze(2), self.A2, out=decay)
        decay.exp2_()
        if self.reset is not None:
            decay.masked_fill_(self.reset[rows, inner, None, None], 0.0)
        previous = start
        for e, h in zip(*tile.steps[:2], strict=True):
            if previous is not None:
                h.addcmul_(e, previous)
            previous = h
        return tile, tile.steps[1][-1]


def _contract(vectors: Tensor, matrices: Tensor, out: Tensor, rows: slice, time: slice) -> None:
    """Writes ``vectors @ matrices`` per (row, step) into ``out[rows, time]``.

    The vector stands on the left: matrix times column is ten times slower on CPU.
    """
    left = vectors[rows, time].reshape(-1, 1, vectors.shape[2])
    target = out[rows, time]
    if target.is_contiguous():
        torch.bmm(left, matrices, out=target.view(-1, 1, out.shape[2]))
    else:
        target.copy_(torch.bmm(left, matrices).view(target.shape))


class SelectiveScan(torch.autograd.Function):
    """``h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t``, ``y_t = C_t . h_t``; first-order gradients.

    Args of ``apply``: u and dt (B, L, D), A (D, N), B and C (B, L, N), h0 (B, D, N) or None, reset
    (B, L) bool or None, whether the last state is wanted. All floating tensors have one dtype, are
    contiguous and not empty. Returns y (B, L, D) and the last state (B, D, N) or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        h0: Tensor | None,
        reset: Tensor | None,
        want_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        scan = _Scan(u, dt, A, B, C, h0, reset, parts=2)
        y = torch.empty_like(u)
        last = scan.empty_states(scan.batch) if want_state else None
        spacing = scan.plan.spacing
        kept = scan.empty_states((len(scan.blocks) - 1) // spacing, scan.batch)
        carry = scan.empty_states(scan.plan.rows if spacing > 1 else 0)
        for rows in scan.row_slices():
            start = None if scan.h0 is None else scan.h0[rows]
            for i, block in enumerate(scan.blocks, start=1):
                tile, end = scan.fill(rows, block, start)
                _contract(C, tile.matrices[1], y, rows, slice(*block))
                if i < len(scan.blocks):
                    keep = i % spacing == 0
                    to = kept[i // spacing - 1, rows] if keep else carry[: rows.stop - rows.start]
                    start = to.copy_(end)
                elif last is not None:
                    last[rows] = end
        ctx.save_for_backward(u, dt, A, B, C, h0, reset, kept)
        ctx.set_materialize_grads(False)
        return y, None if last is None else last.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, h0, reset, kept = ctx.saved_tensors
        if dy is None and dlast is None:
            return (None,) * 8
        dy = torch.zeros_like(u) if dy is None else dy.contiguous()
        scan = _Scan(u, dt, A, B, C, h0, reset, parts=3)
        grads = _Gradients(scan, dy, None if dlast is None else dlast.transpose(1, 2))
        for rows in scan.row_slices():
            _backward_rows(scan, grads, rows, kept)
        du = grads.x * dt
        ddt = grads.dt.addcmul_(grads.x, u)
        dh0 = None if grads.h0 is None else grads.h0.transpose(1, 2)
        return du, ddt, grads.A.sum(0).t(), grads.B, grads.C, dh0, None, None


class _Gradients:
    """Cotangents that come in and gradients that are accumulated over the tiles."""

    def __init__(self, scan: _Scan, dy: Tensor, dlast: Tensor | None) -> None:
        self.dy, self.dlast = dy, dlast
        self.x, self.dt = torch.empty_like(scan.x), torch.empty_like(scan.x)
        self.B, self.C = torch.empty_like(scan.B), torch.empty_like(scan.C)
        # Summed over rows once at the end: one addcmul_ per step instead of a product and a sum.
        self.A = scan.empty_states(scan.plan.rows).zero_()
        self.h0 = None if scan.h0 is None else torch.empty_like(scan.h0)
        self.carry = scan.empty_states(scan.plan.rows)


def _backward_rows(scan: _Scan, grads: _Gradients, rows: slice, kept: Tensor) -> None:
    """Walks the time blocks of some rows backwards, group by group between the kept states."""
    spacing = scan.plan.spacing
    carry = None if grads.dlast is None else grads.dlast[rows]
    between = scan.empty_states(spacing - 1, rows.stop - rows.start)
    for group in reversed(range(len(kept) + 1)):
        blocks = scan.blocks[group * spacing : (group + 1) * spacing]
        if group:
            starts = [kept[group - 1, rows]]
        else:
            starts = [None if scan.h0 is None else scan.h0[rows]]
        for block, store in zip(blocks[:-1], between, strict=False):
            _, end = scan.fill(rows, block, starts[-1])
            starts.append(store.copy_(end))
        for block, start in zip(reversed(blocks), reversed(starts), strict=True):
            carry = _backward_tile(scan, grads, rows, block, start, carry)
    if grads.h0 is not None:
        grads.h0[rows] = carry


def _backward_tile(
    scan: _Scan,
    grads: _Gradients,
    rows: slice,
    block: tuple[int, int],
    start: Tensor | None,
    carry: Tensor | None,
) -> Tensor | None:
    """Adds the gradients of one tile and returns the cotangent of the state before it.

    ``start`` is the state before the block and ``carry`` the cotangent of the state after it, both
    None when zero. The returned tensor is scratch memory, or None without a start state.
    """
    time = slice(*block)
    tile, _ = scan.fill(rows, block, start)
    decay, state, cotangent = tile.full
    e, _, g = tile.steps
    torch.mul(grads.dy[rows, time].unsqueeze(2), scan.C[rows, time].unsqueeze(3), out=cotangent)
    if carry is not None:
        g[-1].add_(carry)
    # From here on the decay buffer holds decay * cotangent, which is what flows one step back.
    for j in range(len(g) - 1, 0, -1):
        g[j - 1].add_(e[j].mul_(g[j]))
    _contract(grads.dy, tile.matrices[1].transpose(1, 2), grads.C, rows, time)
    _contract(scan.x, tile.matrices[2].transpose(1, 2), grads.B, rows, time)
    _contract(scan.B, tile.matrices[2], grads.x, rows, time)
    # ... and now, times the previous state, the gradient of the exponent dt * A.
    first = 0
    back = None
    if start is None:
        first = 1
        grads.dt[rows, block[0]] = 0.0
    else:
        back = grads.carry[: rows.stop - rows.start]
        torch.mul(e[0], g[0], out=back)
        torch.mul(back, start, out=e[0])
    decay[:, 1:].mul_(state[:, :-1])
    total = grads.A[: rows.stop - rows.start]
    steps = scan.dt[rows, time].unsqueeze(2).unbind(1)
    for weight, dt in zip(e[first:], steps[first:], strict=True):
        total.addcmul_(weight, dt)
    inner = decay[:, first:].mul_(scan.A)
    torch.sum(inner, 2, out=grads.dt[rows, block[0] + first : block[1]])
    return back
