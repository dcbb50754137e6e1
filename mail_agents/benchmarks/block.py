"""The subject ``block``: whole Mamba and Mamba-2 layers, and their linear maps alone."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mail_agents.benchmarks import alternatives
from mail_agents.benchmarks.arguments import Block
from mail_agents.benchmarks.charts import Chart
from mail_agents.benchmarks.gradients import TOLERANCE, Layer, runnable
from mail_agents.benchmarks.report import Bar, Report, Table, ratio, times_row
from mail_agents.benchmarks.timing import check_equal, describe, interleaved, stopwatch
from mail_agents.mixers.mamba import Mamba
from mail_agents.mixers.mamba2 import Mamba2

LINEAR = "linears alone"
MAMBAPY, SLOW, SMALL_CHUNK, OFFICIAL = (
    "mambapy",
    "transformers",
    "transformers, small chunk",
    "mamba_ssm",
)
#: Mamba-2 has kernels of several backends in one layer: "auto" is the fastest that work here.
BACKENDS = {
    Mamba: {"cpu": ("native", "torch"), "cuda": ("cuda", "torch")},
    Mamba2: {"cpu": ("auto", "torch"), "cuda": ("auto", "torch")},
}
FULL_MAMBA = ((256, 10, 256), (32, 150, 256))
FULL_MAMBA2 = ((32, 150, 256, 128),)
#: Times faster than an alternative, by number of steps; ``LINEAR`` is an upper bound of the time.
MAMBA_BARS = {
    10: {MAMBAPY: {"torch": 3.5, "native": 5.5}, SLOW: {"torch": 3, "native": 5}},
    60: {MAMBAPY: {"torch": 6, "native": 10}, SLOW: {"torch": 18, "native": 30}},
}
LINEAR_BAR = 2.0
MAMBA2_BARS = {
    10: {SLOW: {"auto": 50}, SMALL_CHUNK: {"auto": 2.2}},
    60: {SLOW: {"auto": 10}, SMALL_CHUNK: {"auto": 2}},
    150: {SLOW: {"auto": 3.5}, SMALL_CHUNK: {"auto": 2}},
}


def run(arguments: Block) -> Report:
    """Measures both kinds of layers."""
    torch.set_num_threads(arguments.threads)
    conditions = f"{describe(arguments.device, arguments.threads)}, minimum of {arguments.rounds}"
    report = Report("block", dataclasses.asdict(arguments), f"{conditions} rounds")
    report.absent += alternatives.absences(alternatives.mambapy(), alternatives.transformers())
    _time_mamba(arguments, report)
    _time_mamba2(arguments, report)
    report.absent = list(dict.fromkeys(report.absent))
    return report


def linear_maps(layer: nn.Module, batch: int, length: int) -> Callable[[], Any]:
    """Forward and backward of all linear maps of a layer, each by itself."""
    weights = [part.weight for part in layer.modules() if isinstance(part, nn.Linear)]
    inputs = [w.new_empty(batch, length, w.shape[1]).normal_().requires_grad_() for w in weights]
    upstream = [w.new_empty(batch, length, w.shape[0]).normal_() for w in weights]

    def work() -> Sequence[Tensor]:
        outputs = [F.linear(x, w) for x, w in zip(inputs, weights, strict=True)]
        return torch.autograd.grad(outputs, [*inputs, *weights], upstream)

    return work


def _place(arguments: Block) -> dict[str, Any]:
    return {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}


def _ours(
    layer: Mamba | Mamba2, x: Tensor, upstream: Tensor, arguments: Block, absent: list[str]
) -> dict[str, Any]:
    kind = torch.device(arguments.device).type
    made = {
        name: Layer(name, copy.deepcopy(layer), x, upstream, name)
        for name in BACKENDS[type(layer)][kind]
    }
    return runnable(made, absent, type(layer).__name__)


def mamba_layers(
    size: tuple[int, int, int], arguments: Block, absent: list[str]
) -> tuple[dict[str, Layer], Mamba]:
    """Everything that can run a Mamba layer of this size here, with equal weights; and ours."""
    batch, length, width = size
    torch.manual_seed(arguments.seed)
    layer = Mamba(width)
    x, upstream = (torch.randn(batch, length, width).to(**_place(arguments)) for _ in range(2))
    others: dict[str, nn.Module] = {}
    mambapy, slow = alternatives.mambapy(), alternatives.transformers()
    if not mambapy.absent:
        config = mambapy.mamba.MambaConfig(d_model=width, n_layers=1)
        others[MAMBAPY] = mambapy.mamba.MambaBlock(config)
    if not slow.absent:
        config = slow.package.MambaConfig(hidden_size=width, use_mambapy=False)
        others[SLOW] = slow.mamba.MambaMixer(config, layer_idx=0)
    if torch.device(arguments.device).type == "cuda":  # pragma: needs gpu
        official = alternatives.official()
        absent += alternatives.absences(official)
        if not official.absent:
            others[OFFICIAL] = official.mamba.Mamba(width)
    for other in others.values():
        other.load_state_dict(layer.state_dict())
        other.to(**_place(arguments))
    layer.to(**_place(arguments))
    found = _ours(layer, x, upstream, arguments, absent)
    found |= {name: Layer(name, other, x, upstream) for name, other in others.items()}
    return found, layer


def mamba2_layers(
    size: tuple[int, int, int, int], arguments: Block, absent: list[str]
) -> tuple[dict[str, Layer], Mamba2]:
    """Everything that can run a Mamba-2 layer of this size here, with equal weights; and ours."""
    batch, length, width, states = size
    torch.manual_seed(arguments.seed)
    layer = Mamba2(width, d_state=states)
    x, upstream = (torch.randn(batch, length, width).to(**_place(arguments)) for _ in range(2))
    slow, others = alternatives.transformers(), {}
    for name, chunk in ((SLOW, 256), (SMALL_CHUNK, min(64, length))):
        if not slow.absent:
            config = slow.package.Mamba2Config(
                hidden_size=width,
                state_size=states,
                num_heads=layer.nheads,
                head_dim=layer.headdim,
                n_groups=layer.ngroups,
                chunk_size=chunk,
                num_hidden_layers=1,
            )
            others[name] = slow.mamba2.Mamba2Mixer(config, layer_idx=0)
            others[name].load_state_dict(layer.state_dict())
            others[name].to(**_place(arguments))
    layer.to(**_place(arguments))
    found = _ours(layer, x, upstream, arguments, absent)
    found |= {name: Layer(name, other, x, upstream) for name, other in others.items()}
    return found, layer


def _time_layers(
    found: dict[str, Layer], layer: Mamba | Mamba2, size: tuple[int, ...], arguments: Block
) -> tuple[dict[str, float], dict[str, Any]]:
    tolerance = 10 * TOLERANCE[getattr(torch, arguments.dtype)]
    candidates = [each.candidate() for each in found.values()]
    if torch.device(arguments.device).type == "cuda":  # pragma: needs gpu
        ours = BACKENDS[type(layer)]["cuda"]
        candidates += [each.on_graph() for each in found.values() if each.name in ours]
    errors = check_equal(candidates, tolerance, found["torch"].candidate())
    functions = {c.name: c.run for c in candidates}
    functions[LINEAR] = linear_maps(layer, *size[:2])
    watch = stopwatch(arguments.device, arguments.threads)
    times = interleaved(functions, arguments.rounds, watch)
    best = {name: each.best for name, each in times.items()}
    return best, {"seconds": times, "differences": errors}


def _add(
    report: Report,
    arguments: Block,
    layer: type[Mamba] | type[Mamba2],
    title: str,
    others: tuple[str, ...],
    results: dict,
) -> None:
    kind, name = torch.device(arguments.device).type, layer.__name__.lower()
    ours = BACKENDS[layer][kind]
    graphs = tuple(f"{each}, graph" for each in ours) if kind == "cuda" else ()
    columns = (*ours, *graphs, *others, LINEAR)
    rows, panels = [], {}
    for label, (best, _) in results.items():
        rows.append(times_row(label, best, columns, LINEAR))
        panels[label] = {each: 1e3 * seconds for each, seconds in best.items()}
    report.tables.append(Table(f"block {name}", title, (name, *columns), tuple(rows)))
    report.charts.append(Chart(title, "ms", panels, ours=ours))
    report.figures[name] = {label: raw for label, (_, raw) in results.items()}


def _time_mamba(arguments: Block, report: Report) -> None:
    results, on_gpu = {}, torch.device(arguments.device).type == "cuda"
    for size in (*arguments.mamba, *(FULL_MAMBA if arguments.full else ())):
        label = " x ".join(map(str, size))
        found, layer = mamba_layers(size, arguments, report.absent)
        results[label] = best, _ = _time_layers(found, layer, size, arguments)
        if on_gpu or size not in Block.mamba:
            continue
        text = f"Mamba {label}"
        report.bars.append(
            Bar(f"{text}: native / linears", ratio(best, "native", LINEAR), LINEAR_BAR, True)
        )
        report.bars += _bars(text, best, MAMBA_BARS.get(size[1], {}))
    others = (MAMBAPY, SLOW, OFFICIAL) if on_gpu else (MAMBAPY, SLOW)
    title = "Mamba layer, forward and backward (batch x steps x width)"
    _add(report, arguments, Mamba, title, others, results)


def _time_mamba2(arguments: Block, report: Report) -> None:
    results, on_gpu = {}, torch.device(arguments.device).type == "cuda"
    for size in (*arguments.mamba2, *(FULL_MAMBA2 if arguments.full else ())):
        label = " x ".join(map(str, size))
        found, layer = mamba2_layers(size, arguments, report.absent)
        results[label] = best, _ = _time_layers(found, layer, size, arguments)
        if not on_gpu and size in (*Block.mamba2, *FULL_MAMBA2):
            report.bars += _bars(f"Mamba-2 {label}", best, MAMBA2_BARS.get(size[1], {}))
    title = "Mamba-2 layer, forward and backward (batch x steps x width x states)"
    _add(report, arguments, Mamba2, title, (SLOW, SMALL_CHUNK), results)


def _bars(text: str, best: dict[str, float], required: dict[str, dict[str, float]]) -> list[Bar]:
    return [
        Bar(f"{text}: {ours} against {other}", ratio(best, other, ours), limit)
        for other, limits in required.items()
        for ours, limit in limits.items()
    ]
