"""Times one kind of kernel at several sizes: what scan, convolution and duality have in common."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from mail_agents.benchmarks.arguments import Ops
from mail_agents.benchmarks.charts import Chart
from mail_agents.benchmarks.gradients import TOLERANCE, Differentiated
from mail_agents.benchmarks.report import Bar, Report, Table, times_row
from mail_agents.benchmarks.timing import check_equal, interleaved, stopwatch


class Kind(NamedTuple):
    """One kind of kernel.

    Attributes:
        name: Of its table.
        heading: Of the first column.
        title: Of its table and its chart.
        backends: Ours; ratios are to the first, or to ``torch`` where that does not run.
        columns: All candidates. A backend is replayed as a CUDA graph, too, where there is a column
            for that.
        judges: Others are compared with the first of these that runs.
        slack: Allowed difference in units of that of all kernels.
    """

    name: str
    heading: str
    title: str
    backends: tuple[str, ...]
    columns: tuple[str, ...]
    judges: tuple[str, ...]
    slack: float = 1.0


def time_kernels(
    kind: Kind,
    sizes: Iterable[tuple[int, ...]],
    candidates_of: Callable[[Any], Mapping[str, Differentiated]],
    bars_of: Callable[[Any, str, Mapping[str, float]], Iterable[Bar]],
    arguments: Ops,
    report: Report,
) -> None:
    """Adds the times of all sizes, and on a CPU their bars.

    Args:
        kind: What is timed.
        sizes: Of the inputs.
        candidates_of: Everything that can run a size here, by column.
        bars_of: Bars of a size, given its label and the seconds by column.
        arguments: Rounds, device, dtype and threads.
        report: Takes the table, the chart, the figures and the bars.
    """
    watch = stopwatch(arguments.device, arguments.threads)
    tolerance = kind.slack * TOLERANCE[getattr(torch, arguments.dtype)]
    rows, panels, figures = [], {}, {}
    for size in sizes:
        label = " x ".join(map(str, size))
        found = candidates_of(size)
        graphs = [each for name, each in found.items() if f"{name}, graph" in kind.columns]
        candidates = [each.candidate() for each in found.values()]
        candidates += [each.on_graph() for each in graphs]
        judge = next(found[name] for name in kind.judges if name in found)
        errors = check_equal(candidates, tolerance, judge.candidate())
        times = interleaved({c.name: c.run for c in candidates}, arguments.rounds, watch)
        best = {name: each.best for name, each in times.items()}
        unit = kind.backends[0] if kind.backends[0] in best else "torch"
        rows.append(times_row(label, best, kind.columns, unit))
        panels[label] = {name: 1e3 * seconds for name, seconds in best.items()}
        figures[label] = {"seconds": times, "differences": errors}
        if torch.device(arguments.device).type == "cpu":
            report.bars += bars_of(size, label, best)
    header = (kind.heading, *kind.columns)
    report.tables.append(Table(f"ops {kind.name}", kind.title, header, tuple(rows)))
    report.charts.append(Chart(kind.title, "ms", panels, ours=kind.backends))
    report.figures[kind.name] = figures
