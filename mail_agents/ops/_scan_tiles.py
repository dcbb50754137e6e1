"""Tiles of the selective scan in plain PyTorch: sizes, scratch memory, and the recurrence in one.

A tile is some rows of the batch times some steps, laid out ``(rows, steps, N, D)`` with channels
contiguous, so small that it stays in the cache. Per time step there is one ``addcmul_``; everything
else is one operation per tile.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mail_agents.ops._scan_inputs import ScanInputs

_LOG2E = math.log2(math.e)
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

    def kept(self, length: int) -> int:
        """Number of states that are kept of a sequence."""
        return (-(-length // self.steps) - 1) // self.spacing


def plan_tiles(batch: int, length: int, width: int, device: torch.device) -> Plan:
    """Chooses tile sizes for ``width = N * D`` state elements per batch row.

    Only ``rows`` depends on the number of threads, which may change between forward and backward.
    """
    cpu = device.type == "cpu"
    threads = torch.get_num_threads() if cpu else 1
    tile, step = (_TILE, _STEP) if cpu else (_GPU_TILE, _GPU_TILE)
    if length <= _SHORT:
        rows, steps = threads * tile // (length * width), length
    else:
        rows = min(batch, max(1, step // width))
        steps = tile // (rows * width)
        rows = max(rows, threads * step // width)
    rows, steps = _even(batch, rows), _even(length, steps)
    blocks = math.ceil(length / steps)
    spacing = 1 if blocks <= _MAX_CHECKPOINTS else math.ceil(math.sqrt(blocks))
    return Plan(rows, steps, spacing)


def _even(total: int, size: int) -> int:
    """The largest part when ``total`` is split evenly into parts of at most ``size``."""
    return math.ceil(total / math.ceil(total / max(1, min(total, size))))


class Tile:
    """Views of the scratch memory for one tile size: decay, state and (backward) cotangent."""

    def __init__(self, scratch: Tensor, parts: int, rows: int, steps: int, n: int, d: int) -> None:
        size = rows * steps * n * d
        flat = [scratch[i * size : (i + 1) * size] for i in range(parts)]
        self.full = [part.view(rows, steps, n, d) for part in flat]
        self.matrices = [part.view(rows * steps, n, d) for part in flat]
        # Unbound once: indexing inside the time loop costs about a microsecond per view.
        self.steps = [part.unbind(1) for part in self.full]


class Rows(NamedTuple):
    """Inputs of some batch rows as the recurrence sees them; ``x`` is ``dt * u``."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    reset: Tensor | None
    start: Tensor | None


class Workspace:
    """Tile sizes, scratch memory and constants of one call."""

    def __init__(self, inputs: ScanInputs, parts: int) -> None:
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
        self._x, self._dt = inputs.u.new_empty(2, self.plan.rows, self.length, self.d)
        self._parts = parts
        self._tiles: dict[tuple[int, int], Tile] = {}

    def row_slices(self) -> Iterator[slice]:
        for row in range(0, self.batch, self.plan.rows):
            yield slice(row, min(row + self.plan.rows, self.batch))

    def states(self, *lead: int) -> Tensor:
        return self._scratch.new_empty(*lead, self.n, self.d)

    def step_sizes(self, rows: int) -> Tensor:
        """Scratch memory for the step sizes of some rows, (rows, L, D)."""
        return self._dt[:rows]

    def select(self, inputs: ScanInputs, rows: slice, dt: Tensor) -> Rows:
        """Collects the inputs of some rows, with their step sizes ``dt``."""
        x = torch.mul(dt, inputs.u[rows], out=self._x[: len(dt)])
        reset = None if inputs.reset is None else inputs.reset[rows]
        start = None if inputs.h0 is None else inputs.h0[rows].transpose(1, 2).contiguous()
        return Rows(x, dt, inputs.B[rows], inputs.C[rows], reset, start)

    def fill(self, part: Rows, time: slice, start: Tensor | None) -> tuple[Tile, Tensor]:
        """Computes decays and states of a tile; returns it with its last state.

        Without a start state the first step has nothing to decay, and its decay is not computed.
        """
        size = (len(part.x), time.stop - time.start)
        if size not in self._tiles:
            self._tiles[size] = Tile(self._scratch, self._parts, *size, self.n, self.d)
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
