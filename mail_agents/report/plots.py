"""Figures as PNG: success bars with intervals, and training curves.

Colours follow :func:`mail_agents.report.summary.colours`: an agent has one colour everywhere.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mail_agents.report import stats, summary
from mail_agents.report.results import RunResult, agents_of, task_names

_INK, _FAINT = "#22262b", "#d5d9de"


def success_bars(
    results: Sequence[RunResult], path: str | Path, *, which: str = "last", title: str = ""
) -> Path:
    """Draws a panel per task with a bar per agent, its 95 % interval, and the score beside it.

    Args:
        results: Runs evaluated under ``which``.
        path: PNG file to write; its folder is made.
        which: Name of the evaluation.
        title: Written above the panels.

    Returns:
        The path.
    """
    groups, tints = agents_of(results), summary.colours(results)
    tasks = task_names(results, which)
    success = summary.is_success(results, which)
    names = [*tasks, None] if len(tasks) > 1 else tasks
    columns = min(len(names), 4)
    lines = -(-len(names) // columns)
    figure = _figure(3.1 * columns + 1.2, (0.42 * len(groups) + 0.75) * lines + 0.4 * bool(title))
    axes = figure.subplots(lines, columns, squeeze=False, sharex=success)
    for spare in axes.flat[len(names) :]:
        spare.set_visible(False)
    for position, (task, ax) in enumerate(zip(names, axes.flat, strict=False)):
        _bars(ax, groups, tints, task, which, success)
        ax.set_title(task or "all tasks", loc="left", fontsize=10, weight="bold", color=_INK)
        labels = list(groups) if position % columns == 0 else [""] * len(groups)
        ax.set_yticks(range(len(groups)), labels, fontsize=9, color=_INK)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=_INK)
    return _save(figure, path)


def learning_curves(results: Sequence[RunResult], path: str | Path, *, title: str = "") -> Path:
    """Draws the training loss against updates: mean over seeds, and the range they span as a band.

    Losses with different ``curve_label`` do not share axes, because their sizes cannot be compared.

    Args:
        results: Runs; those without a curve are left out.
        path: PNG file to write; its folder is made.
        title: Written above the panels.

    Returns:
        The path.
    """
    tints = summary.colours(results)
    panels = curves(results)
    figure = _figure(4.6 * max(1, len(panels)), 3.2)
    axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    for ax, (name, lines) in zip(axes, panels.items(), strict=False):
        for label, (steps, losses) in lines.items():
            mean = losses.mean(axis=0)
            ax.plot(steps, mean, color=tints[label], linewidth=1.8)
            if len(losses) > 1:
                band = losses.min(axis=0), losses.max(axis=0)
                ax.fill_between(steps, *band, color=tints[label], alpha=0.18, linewidth=0)
        if all((losses > 0).all() for _, losses in lines.values()):
            ax.set_yscale("log")
        _label_ends(ax, lines, tints)
        ax.set_xlabel("updates", fontsize=9)
        ax.set_title(name, loc="left", fontsize=10, weight="bold", color=_INK)
        ax.grid(axis="y", color=_FAINT, linewidth=0.6)
        _plain_frame(ax)
    if not panels:
        axes[0].text(0.5, 0.5, "no training curves", ha="center", va="center")
        axes[0].set_axis_off()
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=_INK)
    return _save(figure, path)


def curves(
    results: Sequence[RunResult], points: int = 80
) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Training curves on one grid per agent: ``{curve label: {label: (steps, losses)}}``.

    Returns:
        ``steps`` has shape ``(P,)`` with P at most ``points``; ``losses`` has shape ``(seeds, P)``.
        Each loss is the mean of its neighbourhood, so that thinning does not pick lucky batches.
    """
    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for label, runs in agents_of(results).items():
        lines = [np.asarray(run.curve, np.float64) for run in runs if len(run.curve) > 1]
        if not lines:
            continue
        start, end = max(c[0, 0] for c in lines), min(c[-1, 0] for c in lines)
        count = min(points, *(len(line) for line in lines))
        grid = np.linspace(start, end, count)
        losses = np.stack([_smooth(line, grid) for line in lines])
        panels.setdefault(runs[0].curve_label, {})[label] = (grid, losses)
    return panels


def _smooth(curve: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Means of a ``(N, 2)`` curve over windows two grid cells wide, sampled at ``grid``."""
    if len(grid) >= len(curve):
        return np.interp(grid, curve[:, 0], curve[:, 1])
    half = (grid[-1] - grid[0]) / (len(grid) - 1)
    near = np.abs(curve[:, 0] - grid[:, None]) <= half
    return (near @ curve[:, 1]) / near.sum(axis=1)


def _bars(
    ax: Axes,
    groups: dict[str, list[RunResult]],
    tints: dict[str, str],
    task: str | None,
    which: str,
    success: bool,
) -> None:
    scale = 100.0 if success else 1.0
    for row, (label, runs) in enumerate(groups.items()):
        if task is not None and all(t.task != task for run in runs for t in run.tasks(which)):
            ax.text(0, row, " not run", va="center", fontsize=8, color=_INK)
            continue
        estimate = stats.summarise(runs, task, which)
        value, low, high = (scale * x for x in (estimate.value, estimate.low, estimate.high))
        ax.barh(row, value, color=tints[label], height=0.62)
        ax.plot([low, high], [row, row], color=_INK, linewidth=1.3, solid_capstyle="butt")
        text = summary.format_score(estimate, success, interval=False)
        ax.text(max(high, value), row, f" {text}", va="center", fontsize=9, color=_INK)
    ax.invert_yaxis()
    if success:
        ax.set_xlim(0, 122)
        ax.set_xticks([0, 50, 100], ["0", "50", "100 %"])
    else:
        ax.margins(x=0.2)
    ax.grid(axis="x", color=_FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    _plain_frame(ax)
    ax.tick_params(axis="y", length=0)


def _label_ends(ax: Axes, lines: dict, tints: dict[str, str]) -> None:
    """Writes each agent's name at the end of its line, moved apart where they would overlap."""
    ax.margins(x=0.02)
    ax.autoscale_view()
    ends = {label: losses.mean(axis=0)[-1] for label, (_, losses) in lines.items()}
    to_axes = ax.transData + ax.transAxes.inverted()
    steps = {label: grid[-1] for label, (grid, _) in lines.items()}
    height = {name: to_axes.transform((steps[name], y))[1] for name, y in ends.items()}
    floor = -np.inf
    for label in sorted(height, key=height.__getitem__):
        floor = max(height[label], floor + 0.075)
        ax.text(
            1.01, floor, label, transform=ax.transAxes, color=tints[label], fontsize=9, va="center"
        )


def _plain_frame(ax: Axes) -> None:
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(_FAINT)
    ax.tick_params(labelsize=8, colors=_INK)


def _figure(width: float, height: float) -> Figure:
    # No pyplot: it keeps global state and may look for a display.
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
    return path
