"""The selective scan of Mamba-1: time, peak memory and rounding errors."""

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
from mail_agents.benchmarks.report import MISSING, Bar, Report, Table, ratio
from mail_agents.benchmarks.timing import peak_bytes, relative_error, rms_error
from mail_agents.ops import selective_scan

STATES = 16
MAMBAPY, SLOW, OFFICIAL = "mambapy", "transformers", "selective_scan_ref"
BACKENDS = {"cpu": ("native", "numba", "torch", "reference"), "cuda": ("cuda", "torch")}
COLUMNS = {
    "cpu": (*BACKENDS["cpu"], MAMBAPY, SLOW, OFFICIAL),
    "cuda": ("cuda", "torch", "cuda, graph", "torch, graph", MAMBAPY, SLOW, OFFICIAL),
}
#: Their backward takes time that grows with the square of the length: the most steps that they are
#: timed at without ``--full``.
_LONGEST = {SLOW: 60, OFFICIAL: 15}
FULL = ((64, 15, 1024), (32, 150, 512), (8, 1024, 256))
Size = tuple[int, int, int]


def scan_inputs(
    size: Size, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random inputs of :func:`selective_scan` as a Mamba layer has them when training begins."""
    batch, length, width = size
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    dt = torch.exp(torch.empty(width).uniform_(math.log(1e-3), math.log(0.1), generator=generator))
    inputs = {
        "u": normal(batch, length, width),
        "delta": 0.5 * normal(batch, length, width),
        "A": -torch.arange(1.0, STATES + 1).repeat(width, 1),
        "B": normal(batch, length, STATES),
        "C": normal(batch, length, STATES),
        "D": torch.ones(width),
        "z": normal(batch, length, width),
        "delta_bias": dt + torch.log(-torch.expm1(-dt)),
    }
    per_channel = ("A", "D", "delta_bias")
    return {
        name: value.to(device, torch.float32 if name in per_channel else dtype)
        for name, value in inputs.items()
    }


def _mambapy_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
) -> Tensor:
    """What mambapy's block does between its projections; its scan method uses no attribute."""
    step = F.softplus(delta + delta_bias)
    block: Any = alternatives.mambapy().mamba.MambaBlock
    return block.selective_scan(None, u, step, A, B, C, D) * F.silu(z)


def scan_candidates(size: Size, arguments: Ops, absent: list[str]) -> dict[str, Differentiated]:
    """Everything that can run a scan of this size here, by column."""
    kind = torch.device(arguments.device).type
    inputs = scan_inputs(size, arguments.seed, arguments.device, getattr(torch, arguments.dtype))
    upstream = torch.randn_like(inputs["u"])
    made = {
        name: Differentiated(
            name,
            lambda _backend=name, **given: selective_scan(**given, backend=_backend),
            inputs,
            upstream,
        )
        for name in BACKENDS[kind]
    }
    found: dict[str, Any] = runnable(made, absent, "selective_scan")
    slow, official = alternatives.transformers(), alternatives.official()
    if not alternatives.mambapy().absent:
        found[MAMBAPY] = Differentiated(MAMBAPY, _mambapy_scan, inputs, upstream)
    others = {} if slow.absent else {SLOW: _slow_scan}
    others |= {} if official.absent else {OFFICIAL: _official_scan}
    for name, function in others.items():
        if arguments.full or size[1] <= _LONGEST[name]:
            found[name] = Differentiated(name, function, inputs, upstream, channel_first=True)
    return found


def _slow_scan(u: Tensor, delta: Tensor, **rest: Tensor) -> Tensor:
    function: Any = alternatives.transformers().mamba.mamba_selective_scan
    return function(hidden_states=u, dt=delta, delta_softplus=True, **rest)


def _official_scan(**given: Tensor) -> Tensor:
    function: Any = alternatives.official().scan.selective_scan_ref
    return function(delta_softplus=True, **given)


def bars_of(size: Size) -> dict[tuple[str, str], float]:
    """Required ratios ``(alternative, backend) -> times faster`` for a size on a CPU.

    They follow from a prototype's measurements and hold within one run.
    """
    batch, length, width = size
    found: dict[tuple[str, str], float] = {}

    def need(alternative: str, torch_bar: float, native_bar: float) -> None:
        found[alternative, "torch"], found[alternative, "native"] = torch_bar, native_bar

    if size in ((32, 10, 256), (64, 6, 256)):
        need(MAMBAPY, 3, 9)
    elif length <= 15 and batch >= 64 and width >= 512:
        need(MAMBAPY, 6, 18)
    elif length >= 60 and batch * width >= 2048:
        need(MAMBAPY, 8, 25)
    if size == (256, 10, 512):
        need(SLOW, 12, 35)
    if size == (64, 60, 512):
        need(SLOW, 40, 130)
    if size == (32, 150, 512):
        need(SLOW, 100, 300)
    if found:
        need("reference", 1.8, 6)
    return found


def time_scans(arguments: Ops, report: Report) -> None:
    """Adds the times of all sizes, and their bars."""
    where = torch.device(arguments.device).type
    kind = Kind(
        "scan",
        "scan",
        "Selective scan, forward and backward (batch x steps x channels)",
        BACKENDS[where],
        COLUMNS[where],
        judges=("reference", "torch"),
    )

    def bars(size: Size, label: str, best: Mapping[str, float]) -> list[Bar]:
        return [
            Bar(f"scan {label}: {ours} against {other}", ratio(best, other, ours), required)
            for (other, ours), required in bars_of(size).items()
        ]

    time_kernels(
        kind,
        (*arguments.scan, *(FULL if arguments.full else ())),
        lambda size: scan_candidates(size, arguments, report.absent),
        *(bars, arguments, report),
    )


def measure_memory(arguments: Ops, report: Report) -> None:
    """Adds the peak memory of forward and backward, and its bars."""
    kind = torch.device(arguments.device).type
    columns = tuple(name for name in COLUMNS[kind] if "graph" not in name)
    rows, figures = [], {}
    for size in arguments.memory:
        label = " x ".join(map(str, size))
        found = scan_candidates(size, arguments, [])
        peaks = {name: peak_bytes(each, arguments.device) for name, each in found.items()}
        known = {name: peak for name, peak in peaks.items() if peak is not None}
        cells = (f"{known[name] / 2**20:.0f} MB" if name in known else MISSING for name in columns)
        rows.append((label, *cells))
        figures[label] = known
        if kind == "cpu" and size == (64, 60, 512):
            report.bars += [
                Bar(f"peak memory of {MAMBAPY} / {ours}", ratio(known, MAMBAPY, ours), required)
                for ours, required in (("torch", 5), ("native", 15))
            ]
    title = "Peak memory of a scan, forward and backward"
    report.tables.append(Table("ops memory", title, ("scan", *columns), tuple(rows)))
    report.figures["memory"] = figures


def _errors(given: list[Tensor], exact: list[Tensor]) -> dict[str, tuple[float, float]]:
    """Mean and largest error of the result and of the gradient of every input, by name."""
    names = ("result", *scan_inputs((1, 1, 1), 0))
    return {
        name: (rms_error([a], [b]), relative_error([a], [b]))
        for name, a, b in zip(names, given, exact, strict=True)
    }


def measure_accuracy(arguments: Ops, report: Report) -> None:
    """Adds the rounding errors of result and gradients against float64."""
    kind = torch.device(arguments.device).type
    names = tuple(n for n in COLUMNS[kind] if "graph" not in n and n != SLOW)
    rows, worst, detail = [], {}, {}
    for size in arguments.accuracy:
        label = " x ".join(map(str, size))
        found = scan_candidates(size, arguments, [])
        inputs = scan_inputs(size, arguments.seed, arguments.device)
        exact = Differentiated(
            "float64",
            lambda **given: selective_scan(**given, backend="reference"),
            {name: value.double() for name, value in inputs.items()},
            next(iter(found.values())).upstream.double(),
        ).outputs()
        detail[label] = errors = {
            name: _errors(each.outputs(), exact) for name, each in found.items() if name in names
        }
        for part, chosen in (("result", ["result"]), ("gradients", list(inputs))):
            cells = dict.fromkeys(names, MISSING)
            for name, each in errors.items():
                mean, largest = (max(each[key][place] for key in chosen) for place in (0, 1))
                worst[name, part] = max(worst.get((name, part), 0.0), mean)
                cells[name] = f"{mean:.1e}, {largest:.1e}"
            rows.append((f"{label}, {part}", *cells.values()))
    title = "Rounding error against float64: root mean square, and largest"
    report.tables.append(Table("ops accuracy", title, ("scan", *names), tuple(rows)))
    report.figures["accuracy"] = detail
    if kind == "cpu":
        report.bars += [
            Bar(
                f"rounding error of native / reference, {part}",
                ratio({n: e for (n, p), e in worst.items() if p == part}, "native", "reference"),
                1.0,
                at_most=True,
            )
            for part in ("result", "gradients")
        ]
