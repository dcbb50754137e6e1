"""Figures of benchmarks as PNG."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_INK, _FAINT, _OURS, _OTHERS = "#22262b", "#d5d9de", "#1f6f8b", "#b7bdc5"
_CYCLE = ("#1f6f8b", "#c0603f", "#5b8c3a", "#7a5a9e", "#8a8f98", "#b8902f")
_COLUMNS = 3


@dataclass(frozen=True)
class Chart:
    """Panels of values by candidate.

    Attributes:
        title: Above everything.
        unit: Of the values.
        panels: Heading -> candidate -> value; drawn as bars on a logarithmic axis.
        lines: Candidate -> (x, value) pairs; drawn as lines on logarithmic axes instead.
        x: Name of the x axis of lines.
        ours: Candidates whose bars are coloured.
    """

    title: str
    unit: str
    panels: Mapping[str, Mapping[str, float]]
    lines: Mapping[str, list[tuple[float, float]]] | None = None
    x: str = ""
    ours: tuple[str, ...] = ()


def draw(chart: Chart, path: Path) -> Path:
    """Writes a chart as PNG and returns the path; its folder is made."""
    figure = _lines(chart) if chart.lines is not None else _bars(chart)
    figure.suptitle(chart.title, x=0.01, ha="left", fontsize=12, color=_INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
    return path


def _bars(chart: Chart) -> Figure:
    count = max(1, len(chart.panels))
    columns = min(count, _COLUMNS)
    lines = -(-count // columns)
    most = max((len(values) for values in chart.panels.values()), default=1)
    figure = _figure(4.6 * columns, (0.34 * most + 1.0) * lines + 0.4)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for spare in axes[len(chart.panels) :]:
        spare.set_visible(False)
    for ax, (heading, values) in zip(axes, chart.panels.items(), strict=False):
        names = list(values)
        tints = [_OURS if name in chart.ours else _OTHERS for name in names]
        ax.barh(range(len(names)), list(values.values()), color=tints, height=0.66)
        ax.set_yticks(range(len(names)), names, fontsize=8, color=_INK)
        ax.set_xscale("log")
        ax.invert_yaxis()
        for row, value in enumerate(values.values()):
            text = f" {value:,.0f}" if value >= 100 else f" {value:.3g}"
            ax.text(value, row, text, va="center", fontsize=8, color=_INK)
        ax.margins(x=0.18)
        ax.set_title(f"{heading}, {chart.unit}", loc="left", fontsize=9, color=_INK)
        ax.grid(axis="x", color=_FAINT, linewidth=0.6)
        ax.set_axisbelow(True)
        _plain_frame(ax)
    return figure


def _lines(chart: Chart) -> Figure:
    figure = _figure(7.2, 4.0)
    ax = figure.subplots()
    for number, (name, points) in enumerate((chart.lines or {}).items()):
        xs, ys = zip(*points, strict=True)
        tint = _CYCLE[number % len(_CYCLE)]
        ax.plot(xs, ys, color=tint, linewidth=1.8, marker="o", markersize=3, label=name)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel(chart.x, fontsize=9)
    ax.set_ylabel(chart.unit, fontsize=9)
    ax.grid(color=_FAINT, linewidth=0.6)
    ax.legend(fontsize=8, frameon=False)
    _plain_frame(ax)
    return figure


def _plain_frame(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(labelsize=8, colors=_INK)


def _figure(width: float, height: float) -> Figure:
    # No pyplot: it keeps global state and may look for a display.
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure
