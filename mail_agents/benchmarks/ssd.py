"""State space duality, the operation of Mamba-2: ours against the recurrence and two chunked ones.

The alternatives get the chunk that suits them best: 64 steps, or the whole sequence where it is
shorter. (transformers' default of 256 pads every sequence to that length, see ``block``.)
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mail_agents.benchmarks import alternatives
from mail_agents.benchmarks.arguments import Ops
from mail_agents.benchmarks.gradients import Differentiated, runnable
from mail_agents.benchmarks.kernels import Kind, time_kernels
from mail_agents.benchmarks.report import Bar, Report, ratio
from mail_agents.ops.ssd import ssd

CHANNELS = 64
SLOW, MINIMAL = "transformers", "ssd_minimal_discrete"
#: "reference" is the recurrence, one step at a time.
BACKENDS = {"cpu": ("native", "torch", "reference"), "cuda": ("cuda", "torch", "reference")}
FULL = ((32, 150, 512, 128),)
Size = tuple[int, int, int, int]
#: Times faster than an alternative, by number of steps.
BARS = {
    10: {"reference": 25.0, MINIMAL: 6.0},
    60: {"reference": 25.0, MINIMAL: 3.5},
    150: {"reference": 10.0, MINIMAL: 2.0},
}


def ssd_inputs(size: Size, arguments: Ops) -> dict[str, Tensor]:
    """Random inputs as a Mamba-2 layer has them when training begins; one group."""
    batch, length, width, states = size
    heads, generator = width // CHANNELS, torch.Generator().manual_seed(arguments.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    dt = torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1), generator=generator))
    inputs = {
        "x": normal(batch, length, heads, CHANNELS),
        "dt": 0.5 * normal(batch, length, heads),
        "A": -torch.empty(heads).uniform_(1, 16, generator=generator),
        "B": normal(batch, length, 1, states),
        "C": normal(batch, length, 1, states),
        "D": torch.ones(heads),
        "dt_bias": dt + torch.log(-torch.expm1(-dt)),
    }
    per_head = ("A", "D", "dt_bias")
    work = getattr(torch, arguments.dtype)
    return {
        name: value.to(arguments.device, torch.float32 if name in per_head else work)
        for name, value in inputs.items()
    }


def _chunk(length: int) -> int:
    """The largest chunk of at most 64 steps of which the sequence is made."""
    return max(size for size in range(1, min(64, length) + 1) if length % size == 0)


def _slow(x: Tensor, dt: Tensor, A: Tensor, **rest: Tensor) -> Tensor:
    function: Any = alternatives.transformers().mamba2.mamba2_chunk_scan
    chunk = min(64, x.shape[1])
    return function(x, dt, A, chunk_size=chunk, dt_softplus=True, **rest)


def _minimal(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
) -> Tensor:
    function: Any = alternatives.official().ssd.ssd_minimal_discrete
    step = F.softplus(dt + dt_bias)
    B, C = (each.expand(-1, -1, x.shape[2], -1) for each in (B, C))
    chunk = _chunk(x.shape[1])
    return function(x * step.unsqueeze(-1), A * step, B, C, chunk)[0] + D.unsqueeze(-1) * x


def ssd_candidates(size: Size, arguments: Ops, absent: list[str]) -> dict[str, Differentiated]:
    """Everything that can run this size here, by column."""
    inputs = ssd_inputs(size, arguments)
    upstream = torch.randn_like(inputs["x"])
    kind = torch.device(arguments.device).type
    made = {
        name: Differentiated(
            name, lambda _backend=name, **given: ssd(**given, backend=_backend), inputs, upstream
        )
        for name in BACKENDS[kind]
    }
    found: dict[str, Any] = runnable(made, absent, "ssd")
    if not alternatives.transformers().absent:
        found[SLOW] = Differentiated(SLOW, _slow, inputs, upstream)
    if not alternatives.official().absent:
        found[MINIMAL] = Differentiated(MINIMAL, _minimal, inputs, upstream)
    return found


def time_duality(arguments: Ops, report: Report) -> None:
    """Adds the times of all sizes, and their bars."""
    ours = BACKENDS[torch.device(arguments.device).type]
    kind = Kind(
        "ssd",
        "ssd",
        "State space duality, forward and backward (batch x steps x channels x states)",
        ours,
        (*ours, SLOW, MINIMAL),
        judges=("reference",),
        slack=5,  # chunked sums round in float32
    )

    def bars(size: Size, label: str, best: Mapping[str, float]) -> list[Bar]:
        required = BARS.get(size[1], {}) if size[2] == 512 else {}
        return [
            Bar(f"ssd {label}: {name} against {other}", ratio(best, other, name), limit)
            for other, limit in required.items()
            for name in ("torch", "native")
        ]

    time_kernels(
        kind,
        (*arguments.ssd, *(FULL if arguments.full else ())),
        lambda size: ssd_candidates(size, arguments, report.absent),
        *(bars, arguments, report),
    )
