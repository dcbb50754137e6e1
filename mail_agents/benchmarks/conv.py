"""The short causal convolution of Mamba against ``F.conv1d``."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mail_agents.benchmarks.arguments import Ops
from mail_agents.benchmarks.gradients import Differentiated, runnable
from mail_agents.benchmarks.kernels import Kind, time_kernels
from mail_agents.benchmarks.report import Bar, Report, ratio
from mail_agents.ops import causal_conv1d

TAPS = 4
#: The first is what a channel-last block has to do, the second is the convolution alone.
TRANSPOSED, ALONE = "F.conv1d + transposes", "F.conv1d"
BACKENDS = {"cpu": ("native", "torch"), "cuda": ("cuda", "torch")}
FULL = ((32, 150, 512), (8, 1024, 512))
Size = tuple[int, int, int]
#: Times faster than :data:`TRANSPOSED`, by number of steps.
BARS = {6: {"torch": 6.0, "native": 6.0}, 10: {"torch": 5.0}, 60: {"torch": 2.0}}


def _conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.conv1d(x, weight.unsqueeze(1), bias, padding=TAPS - 1, groups=x.shape[1])
    return F.silu(y[:, :, : x.shape[2]])


def _channel_last_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _conv1d(x.transpose(1, 2), weight, bias).transpose(1, 2)


def conv_candidates(size: Size, arguments: Ops, absent: list[str]) -> dict[str, Differentiated]:
    """Everything that can run a convolution of this size here, by column."""
    batch, length, width = size
    generator = torch.Generator().manual_seed(arguments.seed)
    shapes = {"x": (batch, length, width), "weight": (width, TAPS), "bias": (width,)}
    where = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    inputs = {
        name: torch.randn(shape, generator=generator).to(**where) for name, shape in shapes.items()
    }
    upstream = torch.randn_like(inputs["x"])
    kind = torch.device(arguments.device).type
    made = {
        name: Differentiated(
            name,
            lambda _backend=name, **given: causal_conv1d(**given, backend=_backend),
            inputs,
            upstream,
        )
        for name in BACKENDS[kind]
    }
    found: dict[str, Any] = runnable(made, absent, "causal_conv1d")
    found[TRANSPOSED] = Differentiated(TRANSPOSED, _channel_last_conv1d, inputs, upstream)
    found[ALONE] = Differentiated(ALONE, _conv1d, inputs, upstream, channel_first=True)
    return found


def time_convolutions(arguments: Ops, report: Report) -> None:
    """Adds the times of all sizes, and their bars."""
    ours = BACKENDS[torch.device(arguments.device).type]
    kind = Kind(
        "conv",
        "convolution",
        "Causal convolution and SiLU, forward and backward (batch x steps x channels)",
        ours,
        (*ours, TRANSPOSED, ALONE),
        judges=(TRANSPOSED,),
    )

    def bars(size: Size, label: str, best: Mapping[str, float]) -> list[Bar]:
        required = BARS.get(size[1], {}) if size[2] == 512 else {}
        return [
            Bar(f"conv {label}: {name}", ratio(best, TRANSPOSED, name), limit)
            for name, limit in required.items()
        ]

    time_kernels(
        kind,
        (*arguments.conv, *(FULL if arguments.full else ())),
        lambda size: conv_candidates(size, arguments, report.absent),
        *(bars, arguments, report),
    )
